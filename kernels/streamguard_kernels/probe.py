"""What a probe's scores say of a text so far: running statistics, one float a token.

A rule fires when its statistic reaches the rule's threshold. Training, calibration and serving use
this one definition; `device_probe` is the same on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from streamguard_kernels.compiled import borrowing, compiled
from streamguard_kernels.packing import pack, unpacker

#: Kinds of statistic. RAW is WINDOW over one token.
WINDOW, CONSECUTIVE, EMA, CUSUM = 0, 1, 2, 3
MAX_SIZE = 64
#: Scores are counted in buckets up to the whole numbers LOWEST .. -LOWEST, and above.
LOWEST = -8
NUM_BUCKETS = 2 - 2 * LOWEST


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
    if kind in (EMA, CUSUM):
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
            one = running[at]
            if one > highest or one != one:  # a NaN stays
                highest = one
        out[text] = highest


class Monitors(NamedTuple):
    """What policies watch scores for; frozen. Arrays [num_policies, max_monitors], most severe first.

    rule                   int32, -1 = no monitor here nor behind
    column                 int32, of the scores
    kind, size, warmup     int32; weight, drift float32: see `next_statistic`
    threshold, hysteresis  float32
    stage                  int32: 0 = reads the output, 1 = the prompt
    stop                   uint8: 1 = latched once it fired; else it observes, and counts crossings
    watched                int32[num_policies, num_columns]: 1 = some monitor reads the column in
                           outputs, 2 = in prompts, 3 = in both
    """

    rule: np.ndarray
    column: np.ndarray
    kind: np.ndarray
    size: np.ndarray
    weight: np.ndarray
    drift: np.ndarray
    warmup: np.ndarray
    threshold: np.ndarray
    hysteresis: np.ndarray
    stage: np.ndarray
    stop: np.ndarray
    watched: np.ndarray


class MonitorSlots(NamedTuple):
    """What monitors remember of each text, and how often scores fell into which bucket.

    policy      int64[num_slots]: -1 = not watched
    prompt_len  int64[num_slots]
    count_from  int64[num_slots]: crossings before this position were counted already
    expected    int64[num_slots]: next position to be read
    value       float32[num_slots, max_monitors]; ring float32[num_slots, max_monitors, largest size]
    above       uint8[num_slots, max_monitors]: 1 = the threshold was reached; a stop rule's stays
    pending     uint8[num_slots, max_monitors]: 1 = a crossing that was not reported yet
    failed      uint8[num_slots]: 1 = scores were missing or no numbers; nothing is read any more
    news        uint8[num_slots]: 1 = a stop rule fired, or something is pending
    counts      int64[num_columns, NUM_BUCKETS]; sums float64[num_columns]: of the newest scores
    """

    policy: np.ndarray
    prompt_len: np.ndarray
    count_from: np.ndarray
    expected: np.ndarray
    value: np.ndarray
    ring: np.ndarray
    above: np.ndarray
    pending: np.ndarray
    failed: np.ndarray
    news: np.ndarray
    counts: np.ndarray
    sums: np.ndarray


_MONITORS, _SLOTS = "i i i i f f i f f i b i", "l l l l f f b b b b l d"
_unpack_monitors = unpacker(Monitors, _MONITORS)
_unpack_slots = unpacker(MonitorSlots, _SLOTS)


def pack_monitors(monitors, slots):
    """The addresses of `Monitors` and of `MonitorSlots`, whose own addresses kernels take."""
    return pack(monitors, _MONITORS), pack(slots, _SLOTS)


@borrowing
def _read_row(call, slot, position, scores, row):
    """Take the scores of one position into the monitors that read it."""
    m, s = _unpack_monitors(call[0]), _unpack_slots(call[1])
    policy, prompt_len = s.policy[slot], s.prompt_len[slot]
    width = s.value.shape[0] // s.policy.shape[0]
    longest = s.ring.shape[0] // s.value.shape[0]
    stage = np.int32(position < prompt_len)
    first, mine = policy * width, slot * width
    for k in range(first, first + width):
        if m.rule[k] >= 0 and m.stage[k] == stage:
            if not np.isfinite(scores[row, m.column[k]]):
                s.failed[slot] = 1
                return
    count = position if stage else position - prompt_len
    # The prompt's crossings are reported with the first sample, which follows its last token.
    counts = (prompt_len - 1 if stage else position) >= s.count_from[slot]
    for k in range(first, first + width):
        if m.rule[k] < 0 or m.stage[k] != stage:
            continue
        at = mine + k - first
        statistic, s.value[at] = next_statistic(
            m.kind[k], m.size[k], m.weight[k], m.drift[k], count, s.value[at],
            s.ring[at * longest : (at + 1) * longest], scores[row, m.column[k]],
        )  # fmt: skip
        if np.isnan(statistic):  # finite scores so large that their differences are not
            s.failed[slot] = 1
        if count + 1 < m.warmup[k]:
            continue
        if statistic >= m.threshold[k]:
            if m.stop[k]:
                s.above[at] = s.news[slot] = 1
            elif not s.above[at]:
                s.above[at] = 1
                if counts:
                    s.pending[at] = s.news[slot] = 1
        elif statistic < np.float32(m.threshold[k] - m.hysteresis[k]):
            if not m.stop[k]:
                s.above[at] = 0


@borrowing
def _count_row(call, policy, stage, scores, row):
    """Count the scores of one position that the policy reads in this stage (1 output, 2 prompt)."""
    m, s = _unpack_monitors(call[0]), _unpack_slots(call[1])
    num_columns = s.sums.shape[0]
    for column in range(num_columns):
        score = scores[row, column]
        # A row that came again was not looked at, and need not be what it was.
        if m.watched[policy * num_columns + column] & stage and np.isfinite(score):
            bucket = min(max(np.ceil(score) - LOWEST, 0), NUM_BUCKETS - 1)
            s.counts[column * NUM_BUCKETS + np.int64(bucket)] += 1
            s.sums[column] += score


@compiled
def read_scores(call, slots, starts, row_offsets, scores, num_output, commits, failed):
    """Take each slot's new scores into its monitors; see `probe.monitor.Monitor.feed`.

    call         int64[2]: addresses of packed `Monitors` and `MonitorSlots`.
    slots        int64[n]; starts int64[n]: position of each slot's first row.
    row_offsets  int64[n + 1]: slot i owns scores[row_offsets[i]:row_offsets[i + 1]].
    scores       float32[num_rows, num_columns].
    num_output   int64[n]: tokens of each text behind its prompt.
    commits      bool[n]: the engine commits a token behind these scores: all of the text is to have
                 been read by now, and the newest score is counted.
    failed       bool[n], out: whether the slot has failed, now or before.
    Returns whether slots and row_offsets are in range; nothing is read if not.
    """
    m, s = _unpack_monitors(call[0]), _unpack_slots(call[1])
    width = s.value.shape[0] // s.policy.shape[0]
    wrong = row_offsets[0] < 0 or row_offsets[slots.shape[0]] > scores.shape[0]
    for i in range(slots.shape[0]):
        wrong |= slots[i] < 0 or slots[i] >= s.policy.shape[0]
        wrong |= row_offsets[i] > row_offsets[i + 1]
    if wrong:
        return False
    for i in range(slots.shape[0]):
        slot = slots[i]
        policy = s.policy[slot]
        failed[i] = False
        if policy < 0 or m.rule[policy * width] < 0:
            continue
        begin, end = row_offsets[i], row_offsets[i + 1]
        if begin < end and starts[i] > s.expected[slot]:
            s.failed[slot] = 1  # scores in between were never seen
        for row in range(begin + max(0, s.expected[slot] - starts[i]), end):
            if s.failed[slot]:
                break
            _read_row(call, slot, starts[i] + row - begin, scores, row)
            s.expected[slot] += np.int64(s.failed[slot] == 0)
        failed[i] = s.failed[slot] != 0
        if commits[i] and not failed[i]:
            # Else nothing would fire, and nobody would know.
            failed[i] = s.expected[slot] < s.prompt_len[slot] + num_output[i]
            if begin < end and not failed[i]:
                # What a prompt's last token says is the newest of a text that has no output yet.
                _count_row(call, policy, 1 if num_output[i] else 2, scores, end - 1)
    return True
