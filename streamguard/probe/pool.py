"""Texts with what was read of them, and how their labels are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamguard.errors import ProbeError
from streamguard.probe.items import Item
from streamguard.probe.texts import Text
from streamguard.probe.train import Segments, segments

Index = NDArray[np.int64]
_LEAST_OF_A_CATEGORY = 40


@dataclass(frozen=True)
class Pool:
    """Texts, and a row for each of their tokens.

    offsets  int64[num_texts + 1]; text i owns rows offsets[i]:offsets[i + 1].
    labels   int8[num_texts, num_heads]: 1, 0, or -1 = says nothing of this head.
    sources  of each text.
    rows     uint16[num_rows, hidden_size] hidden states, or float32[num_rows, num_heads] scores.
    """

    texts: Sequence[Text]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int8]
    sources: Sequence[str]
    rows: Any

    def of(self, values: NDArray[np.float32], chosen: Index) -> tuple[NDArray[np.float32], Index]:
        """The values, one a row of all texts, that belong to some texts; and the offsets of these."""
        spans = [values[self.offsets[i] : self.offsets[i + 1]] for i in chosen]
        flat = np.concatenate(spans) if spans else np.empty(0, np.float32)
        ends = np.cumsum([len(span) for span in spans])
        return flat.astype(np.float32), np.concatenate([[0], ends]).astype(np.int64)

    def segments(self, chosen: Index) -> Segments:
        """What there is to train on in some texts."""
        return segments(self.texts, self.offsets, self.labels, self.sources, chosen)


def heads_of(
    items: Sequence[Item], name: str, categories: bool, train: Index | None = None
) -> tuple[tuple[str, ...], NDArray[np.int8]]:
    """Names of the heads, and int8[num_items, num_heads] labels.

    The first head is harm of any kind. With `categories` one more follows for each category that
    enough of the items to train on have (`train`; all if None): a head without examples would be
    noise with a threshold. A harmful item without a category says nothing of those.
    """
    harmful = np.array([item.label for item in items], np.int8)
    heads, columns = [name], [harmful]
    if categories:
        kinds = [frozenset((item.category or "").lower().split("|")) - {""} for item in items]
        counts: dict[str, int] = {}
        for i in range(len(items)) if train is None else train.tolist():
            for category in kinds[i] if harmful[i] else ():
                counts[category] = counts.get(category, 0) + 1
        for category, count in sorted(counts.items()):
            if count >= _LEAST_OF_A_CATEGORY:
                heads.append(_head_name(category))
                columns.append(
                    np.array(
                        [
                            0 if not label else -1 if not kind else int(category in kind)
                            for kind, label in zip(kinds, harmful, strict=True)
                        ],
                        np.int8,
                    )
                )
        if len(heads) == 1:
            raise ProbeError(
                f"no category has {_LEAST_OF_A_CATEGORY} harmful items to train on, so there is "
                f"nothing to fit a head for. Leave --categories out, or give items with the key category."
            )
    if len(set(heads)) < len(heads):
        raise ProbeError(
            f"categories become heads of one name: {', '.join(sorted(heads))}. Rename one."
        )
    return tuple(heads), np.stack(columns, axis=1)


def _head_name(category: str) -> str:
    """A category as a name of [a-z0-9_.-]."""
    letters = "".join(c if c.isascii() and c.isalnum() else "-" for c in category.lower())
    return "-".join(filter(None, letters.split("-")))[:64]


def drawn(items: Sequence[Item], chosen: Index, most: int, rng: np.random.Generator) -> Index:
    """At most `most` of the items, evenly over sources and labels; ascending."""
    if len(chosen) <= most:
        return chosen
    groups: dict[tuple[str, int], list[int]] = {}
    for i in rng.permutation(chosen).tolist():
        groups.setdefault((items[i].source, items[i].label), []).append(i)
    taken: list[int] = []
    left = sorted(groups.values(), key=len)
    for at, group in enumerate(left):
        taken += group[: (most - len(taken)) // (len(left) - at)]
    return np.sort(np.array(taken, np.int64))
