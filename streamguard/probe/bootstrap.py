"""Figures of weighted texts, many weightings at once: what a bootstrap by prompt is made of.

A round of the bootstrap draws prompts with replacement; a text weighs as often as its prompt was
drawn. `weights` is float64[num_rounds, num_texts] throughout, and a row of ones gives the figure
itself, so that a figure and its interval have one definition. A round in which a figure does not
exist (no harmful text was drawn) is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Weights of one block: large enough for numpy, small enough for a cache.
_BLOCK = 1 << 18


def rounds(
    cluster: NDArray[np.int64], num_rounds: int, rng: np.random.Generator
) -> Iterator[NDArray[np.float64]]:
    """Weights of `num_rounds` resamples of whole clusters, a block of rounds at a time.

    cluster int64[num_texts], numbered from 0 without gaps.
    """
    count = int(cluster.max()) + 1 if len(cluster) else 0
    for first in range(0, num_rounds, step := max(1, _BLOCK // max(1, len(cluster)))):
        size = min(step, num_rounds - first)
        drawn = rng.integers(count, size=(size, count)) if count else np.zeros((size, 0), int)
        drawn += count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        yield times.astype(np.float64).take(cluster, axis=1)


class Roc:
    """The order of texts by score, from which the curve of any weighting follows.

    scores  float[num_texts], no NaN; higher = more harmful; equal ones are halted together.
    label   int[num_texts], 1 harmful.
    """

    def __init__(self, scores: NDArray[Any], label: NDArray[Any]) -> None:
        self._order = np.argsort(-scores, kind="stable")
        ordered = scores[self._order]
        self._last = np.ones(len(scores), bool)
        self._last[:-1] = ordered[1:] != ordered[:-1]
        self._harmful = label[self._order] == 1

    def figures(
        self, weights: NDArray[np.float64], fprs: tuple[float, ...] = ()
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """AUROC float64[num_rounds]; recall float64[num_rounds, num_fprs].

        Recall is that of the lowest threshold that halts at most that share of the benign weight.
        """
        from streamguard_kernels.roc import roc_figures

        auroc, recall = np.empty(len(weights)), np.empty((len(weights), len(fprs)))
        rates = np.array(fprs, np.float64)
        weights = np.ascontiguousarray(weights, np.float64)
        roc_figures(weights, self._order, self._last, self._harmful, rates, auroc, recall)
        return auroc, recall

    def curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """FPR and recall at each distinct score, from (0, 0) to (1, 1); texts weigh the same.

        Needs both labels.
        """
        recall = np.cumsum(self._harmful)[self._last] / self._harmful.sum()
        fpr = np.cumsum(~self._harmful)[self._last] / (~self._harmful).sum()
        return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], recall])


def auroc(scores: NDArray[Any], label: NDArray[Any]) -> float:
    """P(harmful above benign) + P(equal) / 2; NaN with one label only."""
    return float(Roc(scores, label).figures(np.ones((1, len(scores))))[0][0])


def quantiles(
    values: NDArray[Any], weights: NDArray[np.float64], levels: tuple[float, ...]
) -> tuple[NDArray[np.float64], ...]:
    """The least value that at least that share of the weight does not exceed, by level.

    values float[num_texts] -> float64[num_rounds] each; NaN where nothing has weight.
    """
    if not len(values):
        return tuple(np.full(len(weights), np.nan) for _ in levels)
    order = np.argsort(values, kind="stable")
    ordered = values[order].astype(np.float64)
    below = np.cumsum(weights[:, order], axis=1)
    total = below[:, -1]
    found = []
    for level in levels:
        at = (below < level * total[:, None] - 1e-9).sum(1)
        found.append(np.where(total > 0, ordered[np.minimum(at, len(ordered) - 1)], np.nan))
    return tuple(found)


def share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def equal_mass_bins(scores: NDArray[Any], num_bins: int) -> NDArray[np.float64]:
    """Which bin each text falls into, as ones; equal scores share a bin.

    float64[num_texts, num_bins]; bins hold about as many texts each.
    """
    ordered = np.sort(scores)
    middle = np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")
    bins = np.minimum(middle * num_bins // max(1, 2 * len(scores)), num_bins - 1)
    return np.eye(num_bins)[bins]


def interval(values: NDArray[np.float64], confidence: float = 0.95) -> tuple[float, float] | None:
    """Percentile interval over rounds; None if the figure exists in fewer than half of them."""
    known = values[~np.isnan(values)]
    if not len(known) or 2 * len(known) < len(values):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)
