"""What does it cost to follow one more token of each text in a batch?

Ours, from the inside out: the compiled kernel with the arguments that the session gives it;
`Session.advance` with arrays (checks, result array); `RowGuard.commit` with lists, which is all that
the engine's host path does per committed token. Peers: hyperscan streaming and pyahocorasick, as in
`benchmarks.peers`.

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

import numpy as np
import pytest

from benchmarks.measure import Contestant, Ratio, Timing, interleave
from benchmarks.peers import (
    HYPERSCAN,
    PYAHOCORASICK,
    Hyperscan,
    PyAhocorasick,
    assert_same,
    compiled_hyperscan,
    compiled_pyahocorasick,
    fresh_session,
    session_hits,
)
from benchmarks.replay import captured, substituted
from benchmarks.report import Bar, Cell, Results
from benchmarks.workload import NEAR_MISSES, ORDINARY, row_guard, shared
from streamguard.session import Session

ROOM = "advance"
RAW, CASE = "raw", "case"
LITERALS = {RAW: (10, 1_000, 10_000, 100_000), CASE: (10, 1_000, 10_000), NEAR_MISSES: (1_000,)}
STEPS = {1: 8_000, 32: 1_600, 256: 400}
#: Longer lists are measured at the largest batch only.
_EVERY_BATCH = 10_000
KERNEL, SESSION, ENGINE = "its kernel alone", "Session.advance", "RowGuard.commit"
NO_RULES = "Session.advance, no rules"
NAMES = (KERNEL, SESSION, ENGINE, NO_RULES, HYPERSCAN, PYAHOCORASICK)
#: What `Session.advance` promises for raw literals: (literals, batch, peer) -> times as fast.
BARS = {
    (1_000, 256, HYPERSCAN): 15,
    (10_000, 256, HYPERSCAN): 15,
    (100_000, 256, HYPERSCAN): 10,
    (1_000, 32, HYPERSCAN): 5,
    (1_000, 1, HYPERSCAN): 1,
    (1_000, 256, PYAHOCORASICK): 10,
}


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


@lru_cache(maxsize=4)
def prepare(num_literals: int, batch: int, form: str) -> Case:
    """Build every contestant, warm it up, and check that all see the same hits."""
    work = shared()
    case = form == CASE
    kind = NEAR_MISSES if form == NEAR_MISSES else ORDINARY
    num_steps = STEPS[batch]
    stream = work.stream(batch, num_steps)
    rows_of_bytes, rows_of_text = work.token_pieces(stream, lower=case)
    database, hyperscan_seconds = compiled_hyperscan(num_literals, kind, case)
    automaton, pyahocorasick_seconds = compiled_pyahocorasick(num_literals, kind, case)
    hs, ac = Hyperscan(database, batch), PyAhocorasick(automaton, batch)
    guard, our_seconds = work.timed_guard(num_literals, "halt", case=case, kind=kind)
    compile_seconds = {
        "streamguard": our_seconds,
        HYPERSCAN: hyperscan_seconds,
        PYAHOCORASICK: pyahocorasick_seconds,
    }

    slots = np.arange(batch)
    session = fresh_session(guard, batch)
    hits = session_hits(session, stream)
    assert_same(HYPERSCAN, hits, hs.hits(rows_of_bytes))
    assert_same(PYAHOCORASICK, hits, ac.hits(rows_of_text))

    inner = fresh_session(guard, batch)
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
    return [
        (n, b, form)
        for form in LITERALS
        for n in LITERALS[form]
        for b in STEPS
        if n <= _EVERY_BATCH or b == max(STEPS)
    ]


def bench(quick: bool, on_case: Callable[[str], None]) -> Results:
    """All cases. on_case is told what was finished."""
    results = Results()
    shared().guard(10, "halt")  # loads the compiler's own machine code
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
            required = BARS.get((num_literals, batch, peer)) if form == RAW else None
            if required:
                name = f"{SESSION} against {peer}, batch {batch}, {num_literals:,} literals"
                results.bars.append(Bar(name, required, ratio))
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
