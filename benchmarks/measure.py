"""Interleaved timing of contestants that do the same work.

All times are CPU times of the calling thread (time.thread_time): other processes on the machine then
cost what they take in cache and memory bandwidth, not their time slices. Contestants take turns round
by round, so that such a disturbance meets all of them; a ratio is taken within a round, and the
median over the rounds is what counts, with the smallest and largest beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: A clock reading costs 0.7 µs, half of what a batch of 256 tokens takes: read it once for this many.
_TOKENS_PER_READING = 4_096


@dataclass(frozen=True)
class Contestant:
    """Does step k of the workload when called with k.

    Build what it needs before: constructing, compiling and warming up are not timed here.
    share  the part of the steps that it takes part in (a very slow peer need not do all of them).
    """

    step: Callable[[int], object]
    share: float = 1.0


@dataclass(frozen=True)
class Timing:
    """CPU seconds per unit (a token, or an apply) of one contestant.

    rounds  float64[num_rounds]: mean of each round; samples: each clock interval's.
    """

    rounds: NDArray[np.float64]
    samples: NDArray[np.float64]

    @property
    def median(self) -> float:
        return float(np.median(self.rounds))

    @property
    def p99(self) -> float:
        return float(np.percentile(self.samples, 99))


@dataclass(frozen=True)
class Ratio:
    """A quotient taken within each round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> Ratio:
        quotients = numerator / denominator
        return cls(float(np.median(quotients)), float(quotients.min()), float(quotients.max()))


def interleave(
    contestants: Mapping[str, Contestant],
    *,
    num_steps: int,
    units_per_step: int,
    steps_per_reading: int | None = None,
    num_rounds: int,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time all contestants over steps 0..num_steps in turns.

    units_per_step     what a step's time is divided by.
    steps_per_reading  steps between two readings of the clock; by default enough for 4,096 units.
    The order turns by one place a round; round 0 warms up and is dropped.
    """
    per_reading = steps_per_reading or max(1, _TOKENS_PER_READING // units_per_step)
    rounds: dict[str, list[float]] = {name: [] for name in contestants}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(num_rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            contestant = contestants[name]
            steps = max(1, int(num_steps * contestant.share))
            readings = _run(contestant.step, steps, per_reading)
            if turn:
                per_unit = readings[:, 0] / (readings[:, 1] * units_per_step)
                samples[name] += per_unit.tolist()
                rounds[name].append(float(readings[:, 0].sum() / (steps * units_per_step)))
        on_round()
    return {n: Timing(np.array(rounds[n]), np.array(samples[n])) for n in names}


def _run(step: Callable[[int], object], num_steps: int, per_reading: int) -> NDArray[np.float64]:
    """float64[num_readings, 2]: CPU seconds and number of steps."""
    out = []
    clock = time.thread_time
    for low in range(0, num_steps, per_reading):
        high = min(low + per_reading, num_steps)
        started = clock()
        for k in range(low, high):
            step(k)
        out.append((clock() - started, float(high - low)))
    return np.array(out)


def seconds(action: Callable[[], object]) -> float:
    """CPU seconds of one call: for what is done once, such as compiling."""
    started = time.thread_time()
    action()
    return time.thread_time() - started
