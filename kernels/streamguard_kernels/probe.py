"""What a probe's scores say of a text so far: running statistics, one float a token.

A rule fires when its statistic reaches the rule's threshold. Training, calibration and serving use
this one definition; `device_probe` is the same on the device.
"""

from __future__ import annotations

import numpy as np

from streamguard_kernels.compiled import borrowing, compiled

#: Kinds of statistic. RAW is WINDOW over one token.
WINDOW, CONSECUTIVE, EMA, CUSUM = 0, 1, 2, 3
MAX_SIZE = 64


@borrowing
def next_statistic(kind, size, weight, drift, count, value, ring, score):
    """Take in one score; return (the statistic, the value to remember).

    WINDOW       mean of the last `size` scores (of all while there are fewer)
    CONSECUTIVE  least of the last `size` scores, -inf while there are fewer
    EMA          max(0, value + weight * (score - value)), from 0: however calm a text was for how
                 long, it takes as few alarming tokens to be noticed as at its beginning
    CUSUM        max(0, value + score - drift), from 0

    count  scores taken in before this one. ring float32[>= size], in/out: the last scores, score i at
    i % size. A NaN makes every statistic that it enters NaN (CUSUM too), which is no verdict but a
    failure: whoever feeds scores looks for it first.
    """
    score = np.float32(score)
    if kind == EMA or kind == CUSUM:
        if kind == EMA:
            total = np.float32(value + np.float32(weight * np.float32(score - value)))
        else:
            total = np.float32(np.float32(value + score) - drift)
        if total < np.float32(0):
            total = np.float32(0)
        return total, total
    ring[count % size] = score
    known = min(count + 1, size)
    if kind == CONSECUTIVE:
        if known < size:
            return np.float32(-np.inf), value
        least = ring[0]
        for i in range(1, size):
            if not ring[i] >= least:
                least = ring[i]
        return least, value
    total = np.float32(0)
    for i in range(known):
        total += ring[i]
    return np.float32(total / np.float32(known)), value


@compiled
def running_statistics(kind, size, weight, drift, scores, offsets, out):
    """The statistic behind each token of each text.

    scores, out  float32[num_tokens]; offsets int64[num_texts + 1]: text i owns
                 scores[offsets[i]:offsets[i + 1]].
    """
    ring = np.zeros(size, np.float32)
    w, d = np.float32(weight), np.float32(drift)
    for text in range(len(offsets) - 1):
        value = np.float32(0)
        for at in range(offsets[text], offsets[text + 1]):
            count = at - offsets[text]
            out[at], value = next_statistic(kind, size, w, d, count, value, ring, scores[at])


@compiled
def peaks(running, offsets, warmup, out):
    """The highest statistic of each text from token `warmup` (counted from 1) on, -inf if it is shorter.

    running float32[num_tokens]; out float32[num_texts].
    """
    for text in range(len(offsets) - 1):
        highest = np.float32(-np.inf)
        for at in range(offsets[text] + warmup - 1, offsets[text + 1]):
            if not running[at] <= highest:
                highest = running[at]
        out[text] = highest
