"""Labelled texts from files: read, checked line by line, and with the record of where they came from.

Nothing is dropped in silence: a row that cannot be used is an error with its line, or, if lenient,
a count in `Data.skipped`.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from streamguard.errors import ProbeError
from streamguard.policy_errors import MAX_LISTED_PROBLEMS, show
from streamguard.probe.artifact import DataCard
from streamguard.probe.data_files import Broken, file_stem, rows_of
from streamguard.probe.items import HARMFUL, Item, Stage
from streamguard.probe.readers import (
    Bad,
    BadRowError,
    Found,
    Skip,
    WrongFormError,
    form_of,
    items_of,
)
from streamguard.probe.splits import Splits, check_balance, check_leakage, split

__all__ = ["Data", "Item", "Splits", "check_balance", "check_leakage", "read", "split"]

_ROLES = get_args(DataCard.model_fields["role"].annotation)


@dataclass(frozen=True)
class Data:
    """What files held.

    files    one card per file, in the order given: digest, counts, sources, licences.
    skipped  one line per file and reason: rows left out, and how many.
    """

    items: tuple[Item, ...]
    files: tuple[DataCard, ...]
    skipped: tuple[str, ...] = ()


def read(
    paths: Sequence[str | os.PathLike[str]],
    *,
    role: str = "fit",
    lenient: bool = False,
    stage: Stage = "output",
) -> Data:
    """Read labelled texts: .jsonl, .jsonl.gz, .json, .csv, and .parquet if pyarrow is there.

    The native form and the public ones are described in `readers`. Exact duplicates are kept once
    and counted. At stage output a text is a prompt with its response, at stage prompt the prompt
    alone, and the label is of that text.

    role     what the cards say: fit or calibration. For a calibration rows need no label: an
             operator's own traffic has none, and is taken as benign.
    lenient  leave out broken rows and texts with two labels, and count them, instead of raising.

    Raises ProbeError: every broken row with its file and line (the first ten, then a count), texts
    that occur with both labels, a file that cannot be read or whose labels are of something else.
    """
    if stage not in get_args(Stage):
        raise ProbeError(f"stage is {show(stage)}; it must be output or prompt.")
    if role not in _ROLES:
        raise ProbeError(f"role is {show(role)}; it must be {' or '.join(_ROLES)}.")
    files = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if not files:
        raise ProbeError("no data file given; at least one is needed.")
    reading = _Reading(stage, lenient, label=0 if role == "calibration" else None)
    for path in files:
        reading.read(path)
    reading.raise_if_broken()
    return reading.data(files, role)


@dataclass
class _Seen:
    """Where a text was first met; slot is None once it is left out for having two labels."""

    slot: int | None
    place: str
    label: int


class _Reading:
    """The items of all files so far, and what was wrong with the others."""

    def __init__(self, stage: Stage, lenient: bool, label: int | None) -> None:
        self.stage = stage
        self.lenient = lenient
        self.label = label  # of rows in no known form that have none
        self.items: list[Item | None] = []
        self.file_of: list[int] = []
        self.seen: dict[tuple[str, str], _Seen] = {}
        self.problems: list[str] = []
        self.num_problems = 0
        self.skipped: list[str] = []
        self.num_files = 0

    def read(self, path: Path) -> None:
        counts: Counter[str] = Counter()
        first_broken = ""
        num_items = len(self.items)
        num_rows = num_problems = 0
        for place, found in self._found(path):
            num_rows += 1
            if isinstance(found, Skip):
                counts[found.reason] += 1
            elif isinstance(found, Bad):
                num_problems += 1
                first_broken = first_broken or f"{place}: {found.problem}"
                self._problem(f"{path}: {place}: {found.problem}")
            else:
                counts += self._keep(f"{path}: {place}", found)
        if not num_rows:
            raise ProbeError(f"{path}: no rows. Give a file with at least one item.")
        if len(self.items) == num_items and not counts and self.lenient:
            raise ProbeError(
                f"{path}: not one of {num_rows:,} rows can be used; the first is {first_broken}"
            )
        if num_problems:
            counts[f"broken rows (the first is {first_broken})"] = num_problems
        if self.lenient or not num_problems:
            self.skipped += [f"{path}: {count:,} {reason}" for reason, count in counts.items()]
        self.num_files += 1

    def _found(self, path: Path) -> Iterator[tuple[str, Found]]:
        stem = file_stem(path)
        is_first = True
        for row in rows_of(path):
            if isinstance(row, Broken):
                yield row.place, Bad(row.problem)
                continue
            values = row.values
            if self.label is not None and form_of(values) is None:
                values = {"label": self.label, **values}
            try:
                for found in items_of(values, self.stage, stem):
                    yield row.place, found
            except BadRowError as error:
                if is_first and form_of(values) is None and not self.lenient:
                    # Every row would say the same.
                    raise ProbeError(f"{path}: {row.place}: {error}") from None
                yield row.place, Bad(str(error))
            except WrongFormError as error:
                raise ProbeError(f"{path}: {row.place}: {error}") from None
            is_first = False

    def _keep(self, place: str, item: Item) -> Counter[str]:
        """Add an item unless its text was there before; returns what was left out."""
        text = (item.prompt, item.response)
        before = self.seen.get(text)
        if before is None:
            self.seen[text] = _Seen(len(self.items), place, item.label)
            self.items.append(item)
            self.file_of.append(self.num_files)
            return Counter()
        if before.slot is not None and before.label == item.label:
            return Counter({"exact duplicates (each text is kept once)": 1})
        self._problem(
            f"{place}: the same text as {before.place}, there with label {before.label} and here "
            f"with {item.label}; needed: one label. Correct one of them."
        )
        if before.slot is None:
            return Counter({"texts with two labels": 1})
        self.items[before.slot] = None
        before.slot = None
        return Counter({"texts with two labels": 2})

    def _problem(self, problem: str) -> None:
        self.num_problems += 1
        if len(self.problems) < MAX_LISTED_PROBLEMS:
            self.problems.append(problem)

    def raise_if_broken(self) -> None:
        if not self.num_problems or self.lenient:
            return
        more = self.num_problems - len(self.problems)
        lines = [*self.problems, f"… and {more:,} more broken rows."] if more else self.problems
        remedy = "Correct or delete them, or read leniently: broken rows are left out and counted."
        raise ProbeError("\n".join([*lines, remedy]))

    def data(self, files: list[Path], role: str) -> Data:
        kept: list[list[Item]] = [[] for _ in files]
        for number, item in zip(self.file_of, self.items, strict=True):
            if item is not None:
                kept[number].append(item)
        items = tuple(item for item in self.items if item is not None)
        if not items:
            raise ProbeError(
                "no items: " + ("; ".join(self.skipped) or "the files hold none") + ". Give others."
            )
        cards = tuple(_card(*pair, role) for pair in zip(files, kept, strict=True))
        return Data(items, cards, tuple(self.skipped))


def _card(path: Path, items: list[Item], role: str) -> DataCard:
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return DataCard(
        name=path.name,
        sha256=sha256,
        role=role,  # type: ignore[arg-type]
        items=len(items),
        positive=sum(item.label == HARMFUL for item in items),
        sources=dict(sorted(Counter(item.source for item in items).items())),
        licences=dict(sorted(Counter(item.licence for item in items if item.licence).items())),
    )
