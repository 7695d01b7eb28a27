"""The linear probe's training: segments of one label, three losses, standardised features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamguard.errors import ProbeError
from streamguard.probe.texts import Text

LOSSES = ("token", "mean", "window")
#: What spliced texts weigh within the benign pieces and within the harmful ones, however many they
#: are beside the others: without them a probe learns openings, with more of them sources apart suffer.
SPLICED_SHARE = (0.3, 0.5)
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Segments:
    """Runs of tokens with one label each, over rows of hidden states.

    begin, end  int64[num_segments]: rows of a segment
    label       float32[num_segments, num_heads], 0 or 1
    weight      float32[num_segments, num_heads], 0 = says nothing of this head
    text        int64[num_segments], the text that it is part of
    """

    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    label: NDArray[np.float32]
    weight: NDArray[np.float32]
    text: NDArray[np.int64]

    def take(self, index: NDArray[Any]) -> Segments:
        """Some of them."""
        return Segments(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def segments(
    texts: Sequence[Text],
    offsets: NDArray[np.int64],
    labels: NDArray[np.int8],
    sources: Sequence[str],
    chosen: NDArray[np.int64],
) -> Segments:
    """Cut texts where their label changes, and weigh the pieces.

    labels   int8[num_texts, num_heads]: 1, 0 or -1 (not known: weight 0) of a text's harmful tokens;
             its other tokens are 0 for every head.
    sources  where each text comes from. chosen: the texts to take.

    Each class of a head weighs the same in all; in a class spliced texts weigh SPLICED_SHARE, if there
    are any; within these and within the others a source weighs as the square root of its number of
    segments, and each segment of a source the same, long or short: otherwise the largest set and its
    longest answers would decide.
    """
    begin, end, rows, text_of = [], [], [], []
    for i in chosen.tolist():
        harmful = texts[i].harmful
        cuts = [0, *(np.flatnonzero(harmful[1:] != harmful[:-1]) + 1).tolist(), len(harmful)]
        for low, high in pairwise(cuts):
            if low < high:
                begin.append(offsets[i] + low)
                end.append(offsets[i] + high)
                rows.append(labels[i] if harmful[low] else np.zeros_like(labels[i]))
                text_of.append(i)
    if not begin:
        raise ProbeError("no text to train on has a token. Give responses that are not empty.")
    label = np.array(rows, np.int8)
    source = np.array([sources[i] for i in text_of])
    spliced = np.array([texts[i].onset >= 0 for i in text_of])
    weight = np.zeros(label.shape, np.float32)
    for head in range(label.shape[1]):
        for value, share in enumerate(SPLICED_SHARE):
            of_class = label[:, head] == value
            for part, weighs in ((of_class & spliced, share), (of_class & ~spliced, 1 - share)):
                _, which, counts = np.unique(source[part], return_inverse=True, return_counts=True)
                each = counts[which] ** -0.5
                weight[part, head] = weighs * each / each.sum()
            if of_class.any():
                weight[of_class, head] *= len(label) / 2 / weight[of_class, head].sum()
    arrays = (np.array(begin, np.int64), np.array(end, np.int64))
    return Segments(*arrays, np.maximum(label, 0).astype(np.float32), weight, np.array(text_of))


class LinearProbe:
    """Logistic regression on hidden states, one column a head.

    loss    token   every token of a segment has its label
            mean    the segment's mean score has it
            window  means over `window` tokens have it, weighed by their softmax: the most telling
                    stretch of a harmful text counts, and the most alarming one of a benign text
                    (Constitutional Classifiers++, arXiv 2601.04603)
    l2      weight of the squared coefficients of standardised features. Large, since what counts is
            sources that were not fitted on: their mean AUROC rose up to here, each left out in turn.

    After `fit`: coef_ float32[hidden_size, num_heads] and intercept_ float32[num_heads], for
    features as they are.
    """

    def __init__(
        self,
        loss: str = "token",
        *,
        l2: float = 0.05,
        window: int = 16,
        epochs: int = 6,
        rate: float = 2e-3,
        seed: int = 0,
    ) -> None:
        self.loss = loss
        self.l2 = l2
        self.window = window
        self.epochs = epochs
        self.rate = rate
        self.seed = seed

    def fit(
        self, states: Any, parts: Segments, progress: Callable[[int], None] = lambda _: None
    ) -> LinearProbe:
        """Fit by Adam over batches of segments; returns itself.

        states    uint16[num_rows, hidden_size], bfloat16 in it; read in batches, may be mapped.
        progress  called with the number of segments done since the last call; epochs x segments in
                  all. Raises ProbeError for an unknown loss, or if the loss becomes NaN.
        """
        import torch

        if self.loss not in LOSSES:
            raise ProbeError(f"loss {self.loss!r} is unknown; allowed: {', '.join(LOSSES)}.")
        rng = np.random.default_rng(self.seed)
        mean, scale = _moments(states, parts, rng)
        heads = parts.label.shape[1]
        weight = torch.zeros((states.shape[1], heads), requires_grad=True)
        bias = torch.zeros(heads, requires_grad=True)
        optimiser = torch.optim.Adam([weight, bias], lr=self.rate)
        batch = 128
        total = self.epochs * -(-len(parts.begin) // batch)
        step = 0
        for _ in range(self.epochs):
            order = rng.permutation(len(parts.begin))
            for at in range(0, len(order), batch):
                piece = parts.take(order[at : at + batch])
                features, segment = _features(states, piece, mean, scale)
                loss = self._loss(features @ weight + bias, segment, piece)
                loss = loss + self.l2 * (weight * weight).sum()
                if not torch.isfinite(loss):
                    raise ProbeError(
                        "the training loss became NaN or infinite: the hidden states of this layer "
                        "are not usable. Choose another layer (--layers)."
                    )
                for group in optimiser.param_groups:
                    group["lr"] = self.rate * (1 - step / total)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                step += 1
                progress(len(piece.begin))
        coefficients = weight.detach() / scale[:, None]
        self.coef_ = coefficients.numpy().astype(np.float32)
        self.intercept_ = (bias.detach() - mean @ coefficients).numpy().astype(np.float32)
        return self

    def _loss(self, scores: Any, segment: Any, piece: Segments) -> Any:
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits as entropy

        label, weight = torch.from_numpy(piece.label), torch.from_numpy(piece.weight)
        length = torch.from_numpy(piece.end - piece.begin).float()[:, None]
        # Each head by itself: its weights must not depend on what other heads there are.
        norm = weight.sum(0).clamp_min(1e-6)
        if self.loss == "token":
            each = entropy(scores, label[segment], reduction="none")
            return ((each * (weight / length)[segment]).sum(0) / norm).sum()
        count = len(piece.begin)
        if self.loss == "mean":
            pooled = _sum_by(scores, segment, count) / length
        else:
            windows = _window_means(scores, segment, length, self.window)
            top = torch.full((count, scores.shape[1]), -torch.inf)
            index = segment[:, None].expand_as(windows)
            top = top.scatter_reduce(0, index, windows.detach(), "amax")
            share = torch.exp(windows - top[segment])
            pooled = _sum_by(share * windows, segment, count) / _sum_by(share, segment, count)
        return ((entropy(pooled, label, reduction="none") * weight).sum(0) / norm).sum()

    def scores(self, states: Any) -> NDArray[np.float32]:
        """Scores of rows: float32[num_rows, num_heads] of uint16[num_rows, hidden_size]."""
        out = np.empty((states.shape[0], self.coef_.shape[1]), np.float32)
        for at in range(0, len(out), _CHUNK):
            rows = as_float(states[at : at + _CHUNK])
            out[at : at + _CHUNK] = rows @ self.coef_ + self.intercept_
        return out


def as_float(states: Any) -> NDArray[np.float32]:
    """bfloat16 kept in uint16, as float32."""
    return (np.asarray(states).astype(np.uint32) << 16).view(np.float32)


def _moments(states: Any, parts: Segments, rng: np.random.Generator) -> tuple[Any, Any]:
    """Mean and standard deviation of each feature over a sample of the segments' rows."""
    import torch

    picked = rng.choice(len(parts.begin), min(len(parts.begin), 4000), replace=False)
    rows = np.concatenate(
        [rng.integers(parts.begin[i], parts.end[i], 16, dtype=np.int64) for i in picked]
    )
    found = torch.from_numpy(as_float(states[np.sort(rows)]))
    return found.mean(0), found.std(0) + 1e-3


def _features(states: Any, piece: Segments, mean: Any, scale: Any) -> tuple[Any, Any]:
    import torch

    rows = np.concatenate([np.arange(b, e) for b, e in zip(piece.begin, piece.end, strict=True)])
    lengths = torch.from_numpy(piece.end - piece.begin)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return (torch.from_numpy(as_float(states[rows])) - mean) / scale, segment


def _sum_by(values: Any, segment: Any, count: int) -> Any:
    import torch

    return torch.zeros((count, values.shape[1])).index_add(0, segment, values)


def _window_means(scores: Any, segment: Any, length: Any, window: int) -> Any:
    """Mean of the last `window` scores at each token, of its own segment only."""
    import torch

    lengths = length[:, 0].long()
    first = (lengths.cumsum(0) - lengths)[segment]
    total = torch.cat([torch.zeros((1, scores.shape[1])), scores.double().cumsum(0)])
    here = torch.arange(len(scores))
    low = torch.maximum(here - window + 1, first)
    return ((total[here + 1] - total[low]) / (here + 1 - low)[:, None]).float()
