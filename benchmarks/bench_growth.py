"""How do time, memory and compile time grow with the list and with the batch?

10 to 1,000,000 literals at batch 256, and batches of 1 to 1,024 texts at 1,000 and at 100,000 literals:
`Session.advance` against hyperscan streaming and pyahocorasick (`benchmarks.peers`), over the same
tokens, hits asserted equal first. The literals come from literals files, as a user with a million
lines would have them; reading them is timed apart from compiling.

MB are what the engines say of their tables: `Program.size_bytes` (with the bytes of 49,152 tokens, some
2 MB; without look-ahead, which only mask rules need), hyperscan's `Database.size` (without the state of
its streams), pyahocorasick's `get_stats` (without the Python objects that it returns). CPU seconds of
one thread; we and pyahocorasick compile in turns, since the first one to do so also gets its memory from
the system. A list that does not compile is left out, and the record says why. --quick ends at 100,000
literals, since hyperscan takes a minute for a million.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.measure import Contestant, Ratio, Timing, interleave, seconds
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
from benchmarks.report import Bar, Point, Results
from benchmarks.workload import ORDINARY, policy_file, shared
from streamguard import Guard, Policy
from streamguard.errors import PolicyError

ROOM = "growth"
LITERALS = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
BATCHES = (1, 4, 16, 64, 256, 1024)
BATCH, EVERY_BATCH = 256, (1_000, 100_000)
STREAMGUARD = "streamguard"
#: Panels of the plot and tables of the record; what their x is.
OVER_LITERALS = f"ns a token at batch {BATCH}, over literals"
OVER_BATCH = {n: f"ns a token with {n:,} literals, over batch" for n in EVERY_BATCH}
SIZE = "MB of tables, over literals"
COMPILE = "CPU seconds to compile, over literals"
PANELS = (OVER_LITERALS, *OVER_BATCH.values(), SIZE, COMPILE)
READING = "streamguard, reading the policy"
_TOKENS, _MOST_STEPS = 51_200, 4_000
_COMPILED = 3  # times, but hyperscan once
#: What is promised of the longest list: how many times as fast as pyahocorasick, MB, and again in
#: compiling.
_FASTER, _MOST_MB, _COMPILED_FASTER = 5, 200, 2.5


class Engines:
    """All engines over one list.

    seconds   CPU seconds that each took to compile, time after time. left_out: why ours could not, else "".
    """

    def __init__(self, num_literals: int) -> None:
        self.seconds: dict[str, NDArray[np.float64]] = {}
        self.size_bytes: dict[str, int] = {}  # of the tables
        self.left_out = ""
        self.guard: Guard | None
        policies: list[Policy] = []
        with tempfile.TemporaryDirectory(prefix="streamguard-bench-") as folder:
            path = policy_file(num_literals, "halt", Path(folder))
            reading = seconds(lambda: policies.append(Policy.load(path)))
        ours, theirs = [], []
        for _ in range(_COMPILED):
            ours.append(self._compile(policies[0]))
            compiled_pyahocorasick.cache_clear()
            self.automaton, spent = compiled_pyahocorasick(num_literals, ORDINARY, False)
            theirs.append(spent)
        if self.guard is not None:
            self.seconds |= {READING: np.array([reading]), STREAMGUARD: np.array(ours)}
            self.size_bytes[STREAMGUARD] = self.guard.program.size_bytes
        self.database, spent = compiled_hyperscan(num_literals, ORDINARY, False)
        self.seconds |= {HYPERSCAN: np.array([spent]), PYAHOCORASICK: np.array(theirs)}
        self.size_bytes[HYPERSCAN] = self.database.size()
        self.size_bytes[PYAHOCORASICK] = self.automaton.get_stats()["total_size"]

    def _compile(self, policy: Policy) -> float:
        """Make `guard` anew; CPU seconds."""
        self.guard = None  # its memory first
        guards: list[Guard] = []
        try:
            spent = seconds(lambda: guards.append(Guard(policy, shared().vocabulary)))
        except PolicyError as error:
            self.left_out = str(error).partition(": ")[2]  # without the name of a file long gone
            return 0.0
        self.guard = guards[0]
        return spent


@lru_cache(maxsize=1)
def engines(num_literals: int) -> Engines:
    """Compiled anew for each list; the one before is forgotten, since a million take gigabytes."""
    return Engines(num_literals)


def steps(batch: int) -> int:
    """Steps of a round: the same number of tokens at every batch, but fewer at the small ones."""
    return min(_MOST_STEPS, _TOKENS // batch)


def prepare(num_literals: int, batch: int) -> dict[str, Contestant]:
    """The contestants over one token stream, proven to agree."""
    work, built = shared(), engines(num_literals)
    stream = work.stream(batch, steps(batch))
    rows_of_bytes, rows_of_text = work.token_pieces(stream)
    hs, ac = Hyperscan(built.database, batch), PyAhocorasick(built.automaton, batch)
    hits = hs.hits(rows_of_bytes)
    assert_same("pyahocorasick against hyperscan", hits, ac.hits(rows_of_text))
    contestants = {
        HYPERSCAN: Contestant(lambda k: hs.feed(rows_of_bytes[k])),
        PYAHOCORASICK: Contestant(lambda k: ac.feed(rows_of_text[k])),
    }
    if built.guard is None:
        return contestants
    session, slots, rows = fresh_session(built.guard, batch), np.arange(batch), list(stream)
    assert_same(HYPERSCAN, session_hits(session, stream), hits)
    return {STREAMGUARD: Contestant(lambda k: session.advance(slots, rows[k])), **contestants}


def measure(num_literals: int, batch: int, num_rounds: int) -> dict[str, Timing]:
    """Time one case; seconds per token."""
    return interleave(
        prepare(num_literals, batch),
        num_steps=steps(batch),
        units_per_step=batch,
        num_rounds=num_rounds,
    )


def cases(quick: bool = False) -> list[tuple[int, int]]:
    """(literals, batch) of every case, list by list."""
    return [
        (n, batch)
        for n in LITERALS
        for batch in BATCHES
        if (batch == BATCH or n in EVERY_BATCH) and not (quick and n > max(EVERY_BATCH))
    ]


def bench(quick: bool, on_case: Callable[[str], None]) -> Results:
    """All cases. on_case is told what was finished."""
    results = Results()
    shared().guard(10, "halt")  # loads the compiler's own machine code
    for num_literals, batch in cases(quick):
        t = measure(num_literals, batch, 3 if quick else 9)
        panels = [OVER_BATCH[num_literals]] if num_literals in EVERY_BATCH else []
        places = [(panel, batch) for panel in panels]
        if batch == BATCH:
            places.append((OVER_LITERALS, num_literals))
            _add_sizes(results, num_literals)
            if num_literals == max(LITERALS):
                _add_bars(results, engines(num_literals), t)
        for panel, x in places:
            for name, timing in t.items():
                y, low, high = (
                    1e9 * float(v)
                    for v in (timing.median, timing.rounds.min(), timing.rounds.max())
                )
                results.points.append(Point(panel, name, x, y, low, high))
        on_case(f"{num_literals:,} literals, batch {batch}")
    results.points.sort(key=lambda point: PANELS.index(point.panel))
    for cached in (engines, compiled_hyperscan, compiled_pyahocorasick):
        cached.cache_clear()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results.facts["growth, most memory of this process up to here"] = f"{peak:,.0f} MiB"
    return results


def _add_sizes(results: Results, num_literals: int) -> None:
    built = engines(num_literals)
    for name, size_bytes in built.size_bytes.items():
        results.points.append(Point(SIZE, name, num_literals, size_bytes / 1e6))
    for name, rounds in built.seconds.items():
        y, low, high = (float(of(rounds)) for of in (np.median, np.min, np.max))
        results.points.append(Point(COMPILE, name, num_literals, y, low, high))
    if built.left_out:
        results.facts[f"growth, {num_literals:,} literals"] = (
            f"{STREAMGUARD} is left out: {built.left_out}"
        )


def _add_bars(results: Results, built: Engines, timings: dict[str, Timing]) -> None:
    """What is promised of the longest list."""
    if STREAMGUARD not in timings:
        return
    against = f"against pyahocorasick, {max(LITERALS):,} literals"
    advance = Ratio.of(timings[PYAHOCORASICK].rounds, timings[STREAMGUARD].rounds)
    compiled = Ratio.of(built.seconds[PYAHOCORASICK], built.seconds[STREAMGUARD])
    size = _MOST_MB * 1e6 / built.size_bytes[STREAMGUARD]
    results.bars += [
        Bar(f"Session.advance {against}, batch {BATCH}", _FASTER, advance),
        Bar(f"compiling {against}", _COMPILED_FASTER, compiled),
        Bar(
            f"{_MOST_MB} MB by our tables of {max(LITERALS):,} literals", 1, Ratio(size, size, size)
        ),
    ]


@pytest.mark.parametrize("name", [STREAMGUARD, HYPERSCAN, PYAHOCORASICK])
@pytest.mark.parametrize(("num_literals", "batch"), cases())
def test_growth(benchmark: Any, num_literals: int, batch: int, name: str) -> None:
    benchmark.group = f"growth: {num_literals} literals, batch {batch}"
    contestants = prepare(num_literals, batch)
    if name not in contestants:
        pytest.skip(engines(num_literals).left_out)

    def run() -> None:
        for k in range(steps(batch)):
            contestants[name].step(k)

    benchmark.extra_info["tokens"] = steps(batch) * batch
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
