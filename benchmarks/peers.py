"""The matchers that we are measured against, over the same tokens, and what all of them found.

hyperscan runs in streaming mode, one stream a text; pyahocorasick with its resumable iterator. Each is
called once per token, because neither takes a batch: part of their cost is that Python call, as it
would be in a logits processor.

Every expression of a hyperscan database has an id of its own. With the ids of rules, which many
literals share, it compiles 25 times slower (5,000 literals: 3.7 s against 0.14 s) and scans no faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import ahocorasick
import hyperscan
import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import seconds
from benchmarks.workload import literals, rule_of
from streamguard import Guard
from streamguard.session import Session

HYPERSCAN, PYAHOCORASICK = "hyperscan", "pyahocorasick"

Hit = tuple[int, int, int]  # step, row, rule


def hyperscan_database(expressions: Sequence[str], flags: int, *, literal: bool) -> Any:
    """A database in streaming mode; ids are the places in `expressions`."""
    database = hyperscan.Database(mode=hyperscan.HS_MODE_STREAM)
    database.compile(
        expressions=[expression.encode() for expression in expressions],
        ids=list(range(len(expressions))),
        flags=[flags] * len(expressions),
        literal=literal,
    )
    return database


@lru_cache(maxsize=2)
def compiled_hyperscan(num_literals: int, kind: str, case: bool) -> tuple[Any, float]:
    """A database of the literals; the CPU seconds that it took."""
    chosen, made = literals(num_literals, kind), []
    flags = hyperscan.HS_FLAG_CASELESS if case else 0
    spent = seconds(lambda: made.append(hyperscan_database(chosen, flags, literal=True)))
    return made[0], spent


@lru_cache(maxsize=2)
def compiled_pyahocorasick(num_literals: int, kind: str, case: bool) -> tuple[Any, float]:
    """An automaton of the literals; the CPU seconds that it took."""
    automaton = ahocorasick.Automaton()

    def build() -> None:
        for i, literal in enumerate(literals(num_literals, kind)):
            key = literal.lower() if case else literal
            automaton.add_word(key, (*automaton.get(key, ()), rule_of(i)))
        automaton.make_automaton()

    return automaton, seconds(build)


class Hyperscan:
    """One stream per text.

    python-hyperscan holds no reference to callback and contexts, and crashes if they are gone: they
    are kept here, and so is the database.

    found    (row, id of the expression) of all matches so far.
    rule_of  the rule of an expression.
    """

    def __init__(self, database: Any, batch: int, rule_of: Callable[[int], int] = rule_of) -> None:
        self.found: list[tuple[int, int]] = []
        self._rule_of = rule_of
        self._database = database
        self._callback = self._on_match
        self._contexts = list(range(batch))
        self.streams = [
            database.stream(match_event_handler=self._callback, context=row)
            for row in self._contexts
        ]
        for stream in self.streams:
            stream.__enter__()

    def _on_match(self, expression: int, _start: int, _end: int, _flags: int, row: object) -> None:
        self.found.append((row, expression))  # type: ignore[arg-type]

    def feed(self, token_bytes: list[bytes]) -> None:
        """One token a text."""
        for stream, piece in zip(self.streams, token_bytes, strict=True):
            stream.scan(piece)

    def hits(self, rows: list[list[bytes]]) -> set[Hit]:
        """Feed all steps; everything that was found."""
        hits = set()
        for k, row in enumerate(rows):
            self.found.clear()
            self.feed(row)
            hits |= {(k, at, self._rule_of(expression)) for at, expression in self.found}
        self.found.clear()
        return hits


class PyAhocorasick:
    """One resumable iterator per text, over bytes written as latin-1 characters."""

    def __init__(self, automaton: Any, batch: int) -> None:
        self.found: list[tuple[int, int]] = []
        self.iterators = [automaton.iter("") for _ in range(batch)]

    def feed(self, token_texts: list[str]) -> None:
        """One token a text."""
        for row, (iterator, piece) in enumerate(zip(self.iterators, token_texts, strict=True)):
            iterator.set(piece, False)
            for _, rules in iterator:
                for rule in rules:
                    self.found.append((row, rule))

    def hits(self, rows: list[list[str]]) -> set[Hit]:
        """Feed all steps; everything that was found."""
        hits = set()
        for k, row in enumerate(rows):
            self.found.clear()
            self.feed(row)
            hits |= {(k, at, rule) for at, rule in self.found}
        self.found.clear()
        return hits


def fresh_session(guard: Guard, batch: int) -> Session:
    """A session with a new text in each of `batch` slots."""
    session = guard.session(batch)
    for row in range(batch):
        session.reset(row)
    return session


def session_hits(session: Session, stream: NDArray[np.int64]) -> set[Hit]:
    """Feed all steps, int64[num_steps, batch], to slots 0..batch; everything that was found."""
    hits, slots = set(), np.arange(stream.shape[1])
    for k, tokens in enumerate(stream):
        if session.advance(slots, tokens).any():
            hits |= {(k, row, rule) for row, rule in session.events()}
    return hits


def assert_same(name: str, ours: set[Any], theirs: set[Any]) -> None:
    """Raise AssertionError with some of the differences."""
    if ours != theirs:
        some = sorted(ours ^ theirs)[:5]
        raise AssertionError(f"{name}: {len(theirs)} hits, streamguard {len(ours)}; e.g. {some}")
    if not ours:
        raise AssertionError(f"{name}: no hits at all, nothing would be compared")
