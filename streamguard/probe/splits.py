"""Parts of labelled data that share no prompt: to fit, to calibrate, to test, and sources apart.

Rows belong together if they have one prompt id, one prompt or one long response (case and
whitespace aside), directly or through others. Splitting by row would put near copies of what was
fitted into the test, and the figures would be wrong upwards.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamguard.errors import ProbeError
from streamguard.policy_errors import did_you_mean, show
from streamguard.probe.items import HARMFUL, Item, normalised, prompt_digest

#: Shorter responses tie nothing together. "I'm sorry, but I can't assist with that." answers
#: hundreds of prompts: by such phrases, in one public mix a fifth of all rows became one group.
LEAST_SHARED_CHARS = 100
_PARTS = ("train", "calibration", "test", "held_out")


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint int64[n] indices into the items, ascending.

    dropped  rows in no part: of sources that are not held out, but tied to a held-out one.
    """

    train: NDArray[np.int64]
    calibration: NDArray[np.int64]
    test: NDArray[np.int64]
    held_out: NDArray[np.int64]
    dropped: int = 0


def split(
    items: Sequence[Item],
    *,
    hold_out: Sequence[str] = (),
    calibration: float = 0.2,
    test: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Divide items by groups of tied rows, alike in every source and label.

    The sources in `hold_out` go to `held_out` whole. The others are divided in the shares asked
    for, as nearly as groups allow. The result depends on the texts and the seed, not on the order
    of the rows.

    Raises ProbeError for unknown sources, for shares that leave nothing to fit, and when there is
    nothing to fit on.
    """
    _check_shares(calibration, test)
    held = _held_out(items, [hold_out] if isinstance(hold_out, str) else hold_out)
    parts: dict[str, list[int]] = {part: [] for part in _PARTS}
    dropped = 0
    strata: defaultdict[tuple[str, int], list[tuple[str, list[int]]]] = defaultdict(list)
    for name, rows in _groups(items).items():
        if any(items[row].source in held for row in rows):
            kept = [row for row in rows if items[row].source in held]
            parts["held_out"] += kept
            dropped += len(rows) - len(kept)
            continue
        counts = Counter((items[row].source, items[row].label) for row in rows)
        strata[min(counts, key=lambda key: (-counts[key], key))].append((name, rows))
    too_large = (calibration + test) * sum(
        len(rows) for groups in strata.values() for _, rows in groups
    )
    for stratum, groups in strata.items():
        for part, rows in _divide(stratum, groups, calibration, test, too_large, seed):
            parts[part] += rows
    if not parts["train"]:
        raise ProbeError(
            f"nothing to fit on: {len(items):,} items, of which {len(parts['held_out']):,} are held "
            f"out and {dropped:,} tied to them. Hold out fewer sources or give more data."
        )
    train, cal, tested, apart = (np.array(sorted(parts[part]), np.int64) for part in _PARTS)
    return Splits(train, cal, tested, apart, dropped)


def check_leakage(items: Sequence[Item], splits: Splits) -> None:
    """Raise ProbeError if two parts share a row, a prompt id, a prompt or a long response."""
    first: dict[tuple[str, str], str] = {}
    leaks: defaultdict[tuple[str, str, str], dict[str, None]] = defaultdict(dict)
    for part in _PARTS:
        for row in getattr(splits, part).tolist():
            for key in [("row", str(row)), *_ties(items[row])]:
                other = first.setdefault(key, part)
                if other != part:
                    leaks[key[0], other, part][items[row].prompt_id] = None
    if not leaks:
        return
    lines = []
    for (what, one, other), prompt_ids in leaks.items():
        shown = ", ".join(show(prompt_id) for prompt_id in list(prompt_ids)[:5])
        more = ", …" if len(prompt_ids) > 5 else ""
        lines.append(
            f"{one} and {other} share the {what} of {len(prompt_ids):,} prompts "
            f"(prompt ids: {shown}{more})"
        )
    raise ProbeError(
        f"leakage between splits: {'; '.join(lines)}. Figures of such a test would flatter the "
        f"probe. Divide with `split`, which keeps them together, or remove the copies."
    )


def check_balance(
    items: Sequence[Item], indices: Iterable[int] | NDArray[np.int64], what: str, least: int = 20
) -> None:
    """Raise ProbeError unless both classes have `least` items among those indexed.

    what  names the set in the message: "the training split".
    """
    labels = [items[int(index)].label for index in indices]
    harmful = sum(label == HARMFUL for label in labels)
    harmless = len(labels) - harmful
    counts = f"{harmful:,} harmful and {harmless:,} harmless items"
    if labels and not (harmful and harmless):
        there, missing = ("harmful", "harmless") if harmful else ("harmless", "harmful")
        raise ProbeError(
            f"{what}: labels of one class only: all {len(labels):,} items are {there}. A probe "
            f"learns a difference: add {missing} items, at least {least}, of the same kind of prompt."
        )
    if min(harmful, harmless) < least:
        raise ProbeError(
            f"{what}: {counts}; at least {least} of each are needed. Add items of the smaller "
            f"class, hold out fewer sources or give this part a larger share."
        )


def _check_shares(calibration: float, test: float) -> None:
    for name, share in (("calibration", calibration), ("test", test)):
        if not (isinstance(share, int | float) and math.isfinite(share) and 0 <= share < 1):
            raise ProbeError(f"{name} is {show(share)}; it must be a share, 0 <= {name} < 1.")
    if calibration + test >= 1:
        raise ProbeError(
            f"calibration {calibration} and test {test} leave nothing to fit on; their sum must be "
            f"below 1. Lower one."
        )


def _held_out(items: Sequence[Item], hold_out: Sequence[str]) -> frozenset[str]:
    sources = Counter(item.source for item in items)
    for name in hold_out:
        if name not in sources:
            listed = ", ".join(f"{show(key)} ({sources[key]:,} items)" for key in sorted(sources))
            raise ProbeError(
                f"no source {show(name)} to hold out; the data have: {listed or 'none'}."
                f"{did_you_mean(name, sources) or ' Correct the name.'}"
            )
    return frozenset(hold_out)


def _ties(item: Item) -> Iterator[tuple[str, str]]:
    """What an item may share with another so that the two belong together."""
    yield "prompt id", item.prompt_id
    yield "prompt", prompt_digest(item.prompt)
    response = normalised(item.response)
    if len(response) >= LEAST_SHARED_CHARS:
        yield "response", response


def _groups(items: Sequence[Item]) -> dict[str, list[int]]:
    """Rows that are tied, by a name that does not depend on their order (union-find)."""
    parent = list(range(len(items)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[tuple[str, str], int] = {}
    for row, item in enumerate(items):
        for tie in _ties(item):
            parent[root(row)] = root(first.setdefault(tie, row))
    members: defaultdict[int, list[int]] = defaultdict(list)
    for row in range(len(items)):
        members[root(row)].append(row)
    # A prompt is in one group only, so the smallest digest names it.
    return {
        min(prompt_digest(items[row].prompt) for row in rows): rows for rows in members.values()
    }


def _divide(
    stratum: tuple[str, int],
    groups: list[tuple[str, list[int]]],
    calibration: float,
    test: float,
    too_large: float,
    seed: int,
) -> Iterator[tuple[str, list[int]]]:
    """Systematic sampling: groups in a drawn order on a circle that the parts have arcs of.

    Every part gets its share of a stratum to within a group, and a stratum of one row falls into a
    part with the probability of its share. A group that would fill calibration and test alone
    (`too_large` rows) goes to train.
    """
    offset = _draw(seed, f"{stratum[1]} {stratum[0]}")
    total = 0
    walk = []
    for _, name, rows in sorted((_draw(seed, name), name, rows) for name, rows in groups):
        if len(rows) > too_large:
            yield "train", rows
            continue
        walk.append((name, rows, total + len(rows) / 2))
        total += len(rows)
    for _, rows, middle in walk:
        position = (middle / total + offset) % 1
        if position < test:
            yield "test", rows
        elif position < test + calibration:
            yield "calibration", rows
        else:
            yield "train", rows


def _draw(seed: int, name: str) -> float:
    """A number in [0, 1) that only seed and name decide."""
    value = hashlib.blake2b(f"{seed} {name}".encode("utf-8", "surrogatepass"), digest_size=6)
    return int.from_bytes(value.digest(), "big") / 2**48
