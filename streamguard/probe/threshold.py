"""Thresholds with a stated bound on the share of benign texts that they halt."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from streamguard.errors import ProbeError

DEFAULT_CONFIDENCE = 0.9


def allowed_alarms(num_benign: int, fpr: float, confidence: float) -> int:
    """Most alarms among the benign texts that still show an FPR <= `fpr`; -1 if none does.

    Exact binomial (Clopper-Pearson): with true rate p > fpr, seeing that few or fewer has a
    probability of at most 1 - confidence. Raises ProbeError for rates outside (0, 1).
    """
    if not (0 < fpr < 1 and 0 < confidence < 1):
        raise ProbeError(
            f"fpr {fpr:g} at confidence {confidence:g}: both must lie between 0 and 1, exclusive."
        )
    total, most = 0.0, -1
    log_p, log_q = math.log(fpr), math.log1p(-fpr)
    for k in range(num_benign + 1):
        total += math.exp(
            math.lgamma(num_benign + 1) - math.lgamma(k + 1) - math.lgamma(num_benign - k + 1)
            + k * log_p + (num_benign - k) * log_q
        )  # fmt: skip
        if total > 1 - confidence:
            break
        most = k
    return most


def needed_benign(fpr: float, confidence: float) -> int:
    """Fewest benign texts that can show an FPR <= `fpr` (with no alarm among them)."""
    allowed_alarms(0, fpr, confidence)
    return math.ceil(math.log(1 - confidence) / math.log1p(-fpr))


def threshold_for(
    benign: NDArray[np.float32], fpr: float, confidence: float = DEFAULT_CONFIDENCE
) -> float:
    """The lowest threshold whose FPR is at most `fpr`, with the given confidence.

    benign  float32[num_benign], peaks of benign texts that are like those to come.
    confidence is over the draw of these texts. Raises ProbeError, with how many it takes, if there
    are too few of them, or if one is NaN.
    """
    count = len(benign)
    if np.isnan(benign).any():
        raise ProbeError(
            f"{int(np.isnan(benign).sum())} of {count} benign texts have a NaN score; a threshold "
            f"from them would mean nothing. Find out which layer gives NaN activations."
        )
    most = allowed_alarms(count, fpr, confidence)
    if most < 0:
        raise ProbeError(
            f"{count} benign texts cannot show an FPR of {fpr:g} with confidence {confidence:g}; "
            f"it takes at least {needed_benign(fpr, confidence)}. Give more "
            f"(streamguard probe calibrate --benign FILE), or ask for a higher fpr or a lower "
            f"confidence."
        )
    highest_first = np.sort(benign)[::-1]
    # Texts that reach the threshold are halted: it lies just above the first one that must not be.
    return just_above(highest_first[most])


def just_above(statistic: np.float32) -> float:
    """The lowest threshold that a statistic of this value does not reach.

    Never a subnormal number, as the next one above 0 is, where the peak of a CUSUM mostly lies:
    hardware that takes these for 0 would halt every text.
    """
    above = np.nextafter(statistic, np.float32(np.inf), dtype=np.float32)
    least = np.finfo(np.float32).tiny
    return float(least if abs(above) < least else above)


def realised_bounds(alarms: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval of a rate; (0, 1) if count is 0."""
    if not count:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    log_choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
    successes = np.arange(count + 1)

    def at_most(p: float, k: int) -> float:
        if k < 0:
            return 0.0
        if p <= 0 or k >= count:
            return 1.0
        if p >= 1:
            return 0.0
        i = successes[: k + 1]
        logs = log_choose[: k + 1] + i * math.log(p) + (count - i) * math.log1p(-p)
        return min(1.0, float(np.exp(logs).sum()))

    def solve(too_low) -> float:  # type: ignore[no-untyped-def]
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if too_low(middle) else (low, middle)
        return (low + high) / 2

    lower = 0.0 if alarms == 0 else solve(lambda p: 1 - at_most(p, alarms - 1) < tail)
    upper = 1.0 if alarms == count else solve(lambda p: at_most(p, alarms) > tail)
    return lower, upper
