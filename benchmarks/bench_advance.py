"""What does it cost to follow one more token of each text in a batch?

Ours, from the inside out: the compiled kernel with the arguments that the session gives it;
`Session.advance` with arrays (checks, result array); `RowGuard.commit` with lists, which is all that
the engine's host path does per committed token. Peers: hyperscan in streaming mode, one stream a
text, and pyahocorasick's resumable iterator, each called once per token, because neither takes a
batch: part of their cost is that Python call, as it would be in a logits processor.

CPU time of one thread. Before anything is timed, all engines must report the same rules on the same
tokens of the same text. Limits: ASCII text and literals; tokens of one kind of vocabulary; warm
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
from benchmarks.workload import literals, row_guard, rule_of, shared
from streamguard import Guard
from streamguard.session import Session

ROOM = "advance"
LITERALS = (10, 1_000, 10_000)
STEPS = {1: 4_000, 32: 800, 256: 160}
KERNEL, SESSION, ENGINE = "kernel", "Session.advance", "RowGuard.commit"
NO_RULES = "Session.advance, no rules"
HYPERSCAN, PYAHOCORASICK = "hyperscan", "pyahocorasick"
NAMES = (KERNEL, SESSION, ENGINE, NO_RULES, HYPERSCAN, PYAHOCORASICK)

Hit = tuple[int, int, int]  # step, row, rule


class Hyperscan:
    """One stream per text; the callback and the streams must be kept (python-hyperscan crashes)."""

    def __init__(self, num_literals: int, batch: int, case: bool) -> None:
        self.found: list[tuple[int, int]] = []
        self._database = hyperscan.Database(mode=hyperscan.HS_MODE_STREAM)
        flag = hyperscan.HS_FLAG_CASELESS if case else 0
        self._database.compile(
            expressions=[literal.encode() for literal in literals(num_literals)],
            ids=[rule_of(i) for i in range(num_literals)],
            flags=[flag] * num_literals,
            literal=True,
        )
        self._callback = self._on_match
        self.streams = [
            self._database.stream(match_event_handler=self._callback, context=row)
            for row in range(batch)
        ]
        for stream in self.streams:
            stream.__enter__()

    def _on_match(self, rule: int, _start: int, _end: int, _flags: int, row: int) -> None:
        self.found.append((row, rule))

    def feed(self, token_bytes: list[bytes]) -> None:
        """One token a text."""
        for stream, piece in zip(self.streams, token_bytes, strict=True):
            stream.scan(piece)


class PyAhocorasick:
    """One resumable iterator per text, over bytes written as latin-1 characters."""

    def __init__(self, num_literals: int, batch: int, case: bool) -> None:
        self.found: list[tuple[int, int]] = []
        automaton = ahocorasick.Automaton()
        for i, literal in enumerate(literals(num_literals)):
            key = literal.lower() if case else literal
            automaton.add_word(key, (*automaton.get(key, ()), rule_of(i)))
        automaton.make_automaton()
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
def prepare(num_literals: int, batch: int, case: bool) -> Case:
    """Build every contestant, warm it up, and check that all see the same hits."""
    work = shared()
    num_steps = STEPS[batch]
    stream = work.stream(batch, num_steps)
    rows_of_bytes = [[work.vocabulary.token_bytes[t] for t in row] for row in stream.tolist()]
    # pyahocorasick cannot ignore case: it gets the tokens in lower case, prepared beforehand.
    rows_of_text = [
        [(piece.lower() if case else piece).decode("latin-1") for piece in row]
        for row in rows_of_bytes
    ]

    built: dict[str, Any] = {}
    compile_seconds = {
        HYPERSCAN: seconds(lambda: built.update(hs=Hyperscan(num_literals, batch, case))),
        PYAHOCORASICK: seconds(lambda: built.update(ac=PyAhocorasick(num_literals, batch, case))),
    }
    guard = work.guard(num_literals, "halt", case=case)
    compile_seconds["streamguard"] = guard.program.compile_seconds
    hs, ac = built["hs"], built["ac"]

    slots = np.arange(batch)
    session = _session(guard, batch)
    hits = _session_hits(session, slots, stream)
    _agree(HYPERSCAN, hits, _peer_hits(hs, hs.feed, rows_of_bytes))
    _agree(PYAHOCORASICK, hits, _peer_hits(ac, ac.feed, rows_of_text))
    _agree("expected some", {()} if hits else set(), {()})

    inner = _session(guard, batch)
    kernel, arguments = captured("advance_kernel", lambda: inner.advance(slots, stream[0]))
    first = next(a for a in arguments if isinstance(a, np.ndarray) and np.shares_memory(a, stream))
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
    return Case(contestants, compile_seconds, len(hits), num_steps, batch)


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


def measure(num_literals: int, batch: int, case: bool, num_rounds: int) -> tuple[Case, dict[str, Timing]]:
    """Time one case; seconds per token."""
    prepared = prepare(num_literals, batch, case)
    timings = interleave(
        prepared.contestants,
        num_steps=prepared.num_steps,
        units_per_step=batch,
        num_rounds=num_rounds,
    )
    return prepared, timings


def cases() -> list[tuple[int, int, bool]]:
    """(literals, batch, case) of every case."""
    return [(n, b, case) for case in (False, True) for n in LITERALS for b in STEPS]


def bench(quick: bool, on_case: Callable[[str], None]) -> Results:
    """All cases. on_case is told what was finished."""
    results = Results()
    compiled: dict[int, dict[str, float]] = {}
    for num_literals, batch, case in cases():
        prepared, t = measure(num_literals, batch, case, 5 if quick else 15)
        form = "case" if case else "raw"
        compiled.setdefault(num_literals, prepared.compile_seconds)

        def ratio(
            ours: str, peer: str, question: str, t: dict[str, Timing] = t,
            num_literals: int = num_literals, batch: int = batch,
        ) -> None:  # fmt: skip
            results.cells.append(
                Cell(
                    ROOM, question, num_literals, batch, t[ours].median * 1e9, "ns",
                    Ratio.of(t[peer].rounds, t[ours].rounds), t[peer].p99 / t[ours].p99,
                )
            )  # fmt: skip

        for peer in (HYPERSCAN, PYAHOCORASICK):
            ratio(SESSION, peer, f"Session.advance, {form}: × faster than {peer}")
            if batch == 256 and num_literals == 1_000 and not case:
                results.bars.append(
                    Bar(
                        f"Session.advance against {peer}, batch 256, 1,000 literals",
                        10,
                        Ratio.of(t[peer].rounds, t[SESSION].rounds),
                    )
                )
        if not case:
            ratio(KERNEL, HYPERSCAN, "its kernel alone, raw: × faster than hyperscan")
            ratio(ENGINE, HYPERSCAN, "RowGuard.commit, raw: × faster than hyperscan")
            absolute = [("Session.advance, raw, a token", num_literals, t[SESSION])]
            if num_literals == LITERALS[0]:
                absolute.append((f"{NO_RULES}, a token", 0, t[NO_RULES]))
            for question, n, timing in absolute:
                results.cells.append(Cell(ROOM, question, n, batch, timing.median * 1e9, "ns"))
        on_case(f"{num_literals:,} literals, batch {batch}, {form}")
    results.facts["compile seconds (CPU)"] = "; ".join(
        f"{n:,} literals: " + ", ".join(f"{name} {s:.3f}" for name, s in of.items())
        for n, of in compiled.items()
    )
    return results


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", STEPS)
@pytest.mark.parametrize("num_literals", LITERALS)
@pytest.mark.parametrize("case", [False, True], ids=["raw", "case"])
def test_advance_one_token_per_text(
    benchmark: Any, case: bool, num_literals: int, batch: int, name: str
) -> None:
    form = "case" if case else "raw"
    benchmark.group = f"advance: {form}, {num_literals} literals, batch {batch}"
    prepared = prepare(num_literals, batch, case)
    benchmark.extra_info["tokens"] = prepared.num_steps * batch
    benchmark.pedantic(prepared.run, args=(name,), rounds=5, warmup_rounds=1)
