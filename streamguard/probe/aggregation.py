"""From scores of tokens to one number a text: what a threshold is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamguard.errors import ProbeError

KINDS = ("window", "consecutive", "ema", "cusum")
MAX_SIZE = 64


@dataclass(frozen=True)
class Aggregation:
    """How the scores of a text's tokens become a running statistic; immutable, comparable.

    kind    window       mean of the last `size` scores (size 1: the raw score)
            consecutive  the least of the last `size`: all of them reached the threshold
            ema          exponential moving average, from 0 and never below; `weight` is that of
                         the newest score
            cusum        max(0, sum so far + score - drift)
    warmup  tokens read before the first decision, at least 1.

    Raises ProbeError for values outside what is stated.
    """

    kind: str = "window"
    size: int = 1
    weight: float = 1.0
    drift: float = 0.0
    warmup: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ProbeError(f"aggregation {self.kind!r} is unknown; allowed: {', '.join(KINDS)}.")
        if not 1 <= self.size <= MAX_SIZE:
            raise ProbeError(f"aggregation size is {self.size}; allowed: 1..{MAX_SIZE} tokens.")
        if not 0 < self.weight <= 1:
            raise ProbeError(f"aggregation weight is {self.weight}; allowed: above 0, at most 1.")
        if self.warmup < 1:
            raise ProbeError(f"aggregation warmup is {self.warmup}; allowed: 1 token or more.")

    @property
    def never_negative(self) -> bool:
        """Whether the statistic starts at 0 and never falls below."""
        return self.kind in ("ema", "cusum")

    @property
    def code(self) -> int:
        """The kind as the kernels number it."""
        return KINDS.index(self.kind)

    def running(
        self, scores: NDArray[np.float32], offsets: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """The statistic behind each token.

        scores float32[num_tokens]; offsets int64[num_texts + 1] -> float32[num_tokens].
        """
        from streamguard_kernels.probe import running_statistics

        out = np.empty(len(scores), np.float32)
        flat = np.ascontiguousarray(scores, np.float32)
        running_statistics(self.code, self.size, self.weight, self.drift, flat, offsets, out)
        return out

    def peaks(self, scores: NDArray[np.float32], offsets: NDArray[np.int64]) -> NDArray[np.float32]:
        """The highest statistic that each text reaches after its warm-up; -inf for shorter texts.

        A text is halted at a threshold exactly if its peak reaches it. float32[num_texts].
        """
        from streamguard_kernels.probe import peaks

        out = np.empty(len(offsets) - 1, np.float32)
        peaks(self.running(scores, offsets), offsets, self.warmup, out)
        return out

    def alarms(
        self, scores: NDArray[np.float32], offsets: NDArray[np.int64], threshold: float
    ) -> NDArray[np.int64]:
        """Index in its text of the token behind which each text is halted, -1 if never."""
        running = self.running(scores, offsets)
        reached = running >= np.float32(threshold)
        found = np.full(len(offsets) - 1, -1, np.int64)
        for text in range(len(found)):
            begin, end = offsets[text] + self.warmup - 1, offsets[text + 1]
            at = np.flatnonzero(reached[begin:end])
            if len(at):
                found[text] = at[0] + self.warmup - 1
        return found

    def __str__(self) -> str:
        shape = {
            "window": f"mean of {self.size}" if self.size > 1 else "raw",
            "consecutive": f"{self.size} consecutive",
            "ema": f"ema {self.weight:g}",
            "cusum": f"cusum {self.drift:g}",
        }[self.kind]
        return f"{shape}, from token {self.warmup}" if self.warmup > 1 else shape
