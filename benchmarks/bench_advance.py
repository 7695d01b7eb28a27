"""What does it cost to follow one more token of each text in a batch?

Ours, from the inside out: the compiled kernel with the arguments that the session gives it;
`Session.advance` with arrays (checks, result array); `RowGuard.commit` with lists, which is all that
the engine's host path does per committed token. Peers: hyperscan in streaming mode, one stream a
text, and pyahocorasick's resumable iterator, each called once per token, because neither takes a
batch: part of their cost is that Python call, as it would be in a logits processor.

CPU time of one thread. Before anything is timed, all engines must report the same rules on the same
tokens of the same text. `case` ignores case on both sides. `near misses` is a list made to hurt us: its
literals begin with the words of the text, so the automaton leaves its hot states. Limits: ASCII text
and literals; tokens of one kind of vocabulary; warm
caches (a real step evicts tables in between, ours as well as the peers'). At batch 1 the call itself
decides, and there we lose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ahocorasick
import hyperscan
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.measure import Contestant, Ratio, Timing, interleave, seconds
from benchmarks.replay import captured, substituted
from benchmarks.report import Bar, Cell, Results
from benchmarks.workload import NEAR_MISSES, ORDINARY, literals, row_guard, rule_of, shared
from streamguard import Guard
from streamguard.session import Session

ROOM = "advance"
RAW, CASE = "raw", "case"
LITERALS = {RAW: (10, 1_000, 10_000), CASE: (10, 1_000, 10_000), NEAR_MISSES: (1_000,)}
STEPS = {1: 8_000, 32: 1_600, 256: 400}
KERNEL, SESSION, ENGINE = "its kernel alone", "Session.advance", "RowGuard.commit"
NO_RULES = "Session.advance, no rules"
HYPERSCAN, PYAHOCORASICK = "hyperscan", "pyahocorasick"
_WHERE = "batch 256, 1,000 literals"
NAMES = (KERNEL, SESSION, ENGINE, NO_RULES, HYPERSCAN, PYAHOCORASICK)

Hit = tuple[int, int, int]  # step, row, rule


@lru_cache(maxsize=2)
def compiled_hyperscan(num_literals: int, kind: str, case: bool) -> tuple[Any, float]:
    """A database of the literals, in streaming mode; the CPU seconds that it took."""
    chosen = literals(num_literals, kind)
    database = hyperscan.Database(mode=hyperscan.HS_MODE_STREAM)
    flag = hyperscan.HS_FLAG_CASELESS if case else 0
    spent = seconds(
        lambda: database.compile(
            expressions=[literal.encode() for literal in chosen],
            ids=[rule_of(i) for i in range(num_literals)],
            flags=[flag] * num_literals,
            literal=True,
        )
    )
    return database, spent


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
    """One stream per text; the callback and the streams must be kept (python-hyperscan crashes)."""

    def __init__(self, database: Any, batch: int) -> None:
        self.found: list[tuple[int, int]] = []
        self._database = database
        self._callback = self._on_match
        self.streams = [
            database.stream(match_event_handler=self._callback, context=row) for row in range(batch)
        ]
        for stream in self.streams:
            stream.__enter__()

    def _on_match(self, rule: int, _start: int, _end: int, _flags: int, row: object) -> None:
        self.found.append((row, rule))  # type: ignore[arg-type]

    def feed(self, token_bytes: list[bytes]) -> None:
        """One token a text."""
        for stream, piece in zip(self.streams, token_bytes, strict=True):
            stream.scan(piece)


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


@dataclass(frozen=True)
class Case:
    """The contestants over one token stream, proven to agree."""

    contestants: dict[str, Contestant]
    compile_seconds: dict[str, float]
    num_hits: int
    num_steps: int
    batch: int
    keep: tuple[Session, ...]

    def run(self, name: str) -> None:
        """One pass over the stream."""
        step = self.contestants[name].step
        for k in range(self.num_steps):
            step(k)


def _session(guard: Guard, batch: int) -> Session:
    session = guard.session(batch)
    for row in range(batch):
        session.reset(row)
    return session


@lru_cache(maxsize=4)
def prepare(num_literals: int, batch: int, form: str) -> Case:
    """Build every contestant, warm it up, and check that all see the same hits."""
    work = shared()
    case = form == CASE
    kind = NEAR_MISSES if form == NEAR_MISSES else ORDINARY
    num_steps = STEPS[batch]
    stream = work.stream(batch, num_steps)
    rows_of_bytes = [[work.vocabulary.token_bytes[t] for t in row] for row in stream.tolist()]
    # pyahocorasick cannot ignore case: it gets the tokens in lower case, prepared beforehand.
    rows_of_text = [
        [(piece.lower() if case else piece).decode("latin-1") for piece in row]
        for row in rows_of_bytes
    ]

    database, hyperscan_seconds = compiled_hyperscan(num_literals, kind, case)
    automaton, pyahocorasick_seconds = compiled_pyahocorasick(num_literals, kind, case)
    hs, ac = Hyperscan(database, batch), PyAhocorasick(automaton, batch)
    guard = work.guard(num_literals, "halt", case=case, kind=kind)
    compile_seconds = {
        "streamguard": guard.program.compile_seconds,
        HYPERSCAN: hyperscan_seconds,
        PYAHOCORASICK: pyahocorasick_seconds,
    }

    slots = np.arange(batch)
    session = _session(guard, batch)
    hits = _session_hits(session, slots, stream)
    _agree(HYPERSCAN, hits, _peer_hits(hs, hs.feed, rows_of_bytes))
    _agree(PYAHOCORASICK, hits, _peer_hits(ac, ac.feed, rows_of_text))
    _agree("expected some", {()} if hits else set(), {()})

    inner = _session(guard, batch)
    first = stream[0]
    kernel, arguments = captured("walk_kernel", lambda: inner.advance(slots, first))
    calls = [substituted(arguments, first, tokens) for tokens in stream]
    rows_guard = row_guard(guard, batch)
    slot_list, token_lists = slots.tolist(), stream.tolist()
    free = guard.session(batch)
    rows = list(stream)
    contestants = {
        KERNEL: Contestant(lambda k: kernel(*calls[k])),
        SESSION: Contestant(lambda k: session.advance(slots, rows[k])),
        ENGINE: Contestant(lambda k: rows_guard.commit(slot_list, token_lists[k])),
        NO_RULES: Contestant(lambda k: free.advance(slots, rows[k])),
        HYPERSCAN: Contestant(lambda k: hs.feed(rows_of_bytes[k])),
        PYAHOCORASICK: Contestant(lambda k: ac.feed(rows_of_text[k])),
    }
    # The kernel's arguments hold addresses of arrays that only `inner` keeps alive.
    return Case(contestants, compile_seconds, len(hits), num_steps, batch, (inner,))


def _session_hits(
    session: Session, slots: NDArray[np.int64], stream: NDArray[np.int64]
) -> set[Hit]:
    hits = set()
    for k, tokens in enumerate(stream):
        if session.advance(slots, tokens).any():
            hits |= {(k, row, rule) for row, rule in session.events()}
    return hits


def _peer_hits(peer: Any, feed: Callable[[Any], None], rows: list[list[Any]]) -> set[Hit]:
    hits = set()
    for k, row in enumerate(rows):
        peer.found.clear()
        feed(row)
        hits |= {(k, at, rule) for at, rule in peer.found}
    peer.found.clear()
    return hits


def _agree(name: str, ours: set[Any], theirs: set[Any]) -> None:
    if ours != theirs:
        some = sorted(ours ^ theirs)[:5]
        raise AssertionError(f"{name}: {len(theirs)} hits, streamguard {len(ours)}; e.g. {some}")


def measure(
    num_literals: int, batch: int, form: str, num_rounds: int
) -> tuple[Case, dict[str, Timing]]:
    """Time one case; seconds per token."""
    prepared = prepare(num_literals, batch, form)
    timings = interleave(
        prepared.contestants,
        num_steps=prepared.num_steps,
        units_per_step=batch,
        num_rounds=num_rounds,
    )
    return prepared, timings


def cases() -> list[tuple[int, int, str]]:
    """(literals, batch, form) of every case."""
    return [(n, b, form) for form in LITERALS for n in LITERALS[form] for b in STEPS]


def bench(quick: bool, on_case: Callable[[str], None]) -> Results:
    """All cases. on_case is told what was finished."""
    results = Results()
    compiled: dict[int, dict[str, float]] = {}
    for num_literals, batch, form in cases():
        prepared, t = measure(num_literals, batch, form, 5 if quick else 15)
        if form == RAW:
            compiled.setdefault(num_literals, prepared.compile_seconds)

        def compare(
            ours: str, peer: str, t: dict[str, Timing] = t, num_literals: int = num_literals,
            batch: int = batch, form: str = form,
        ) -> Ratio:  # fmt: skip
            question = f"{ours}, {form}: × faster than {peer}"
            ratio = Ratio.of(t[peer].rounds, t[ours].rounds)
            p99 = t[peer].p99 / t[ours].p99
            value = t[ours].median * 1e9
            results.cells.append(Cell(ROOM, question, num_literals, batch, value, "ns", ratio, p99))
            return ratio

        for peer in (HYPERSCAN, PYAHOCORASICK):
            ratio = compare(SESSION, peer)
            if (num_literals, batch, form) == (1_000, 256, RAW):
                results.bars.append(Bar(f"{SESSION} against {peer}, {_WHERE}", 10, ratio))
        if form == RAW:
            for peer in (HYPERSCAN, PYAHOCORASICK):
                compare(KERNEL, peer)
            compare(ENGINE, HYPERSCAN)
            absolute = [(f"{SESSION}, {form}, a token", num_literals, t[SESSION])]
            if num_literals == LITERALS[RAW][0]:
                absolute.append((f"{NO_RULES}, a token", 0, t[NO_RULES]))
            for question, n, timing in absolute:
                results.cells.append(Cell(ROOM, question, n, batch, timing.median * 1e9, "ns"))
        on_case(f"{num_literals:,} literals, batch {batch}, {form}")
    results.facts["compile, CPU seconds"] = "; ".join(
        f"{n:,} literals: " + ", ".join(f"{name} {s:.3f}" for name, s in of.items())
        for n, of in compiled.items()
    )
    return results


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_literals", "batch", "form"), cases())
def test_advance_one_token_per_text(
    benchmark: Any, num_literals: int, batch: int, form: str, name: str
) -> None:
    benchmark.group = f"advance: {form}, {num_literals} literals, batch {batch}"
    prepared = prepare(num_literals, batch, form)
    benchmark.extra_info["tokens"] = prepared.num_steps * batch
    benchmark.pedantic(prepared.run, args=(name,), rounds=5, warmup_rounds=1)
