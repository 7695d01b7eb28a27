"""How far is the compiled kernel from a loop in C?

`c_loop.c` walks the same arrays with the same shortcuts and is compiled here and now by the system's
compiler (cc -O3 -march=native). The kernel and the loop are called alone, each with the arguments that
it takes, so that each pays its own call: numba's dispatcher against ctypes. Their results, events and
final states are asserted equal over the whole stream before timing.

Without a compiler, or where the tables have a layout that c_loop.c does not know, the room is left
out and the record says so.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.measure import Contestant, Ratio, Timing, interleave
from benchmarks.peers import fresh_session
from benchmarks.replay import captured, substituted
from benchmarks.report import Bar, Cell, Results
from benchmarks.workload import shared
from streamguard.session import Session

ROOM = "C loop"
SOURCE = Path(__file__).parent / "c_loop.c"
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
LITERALS = (1_000, 10_000)
STEPS = {32: 1_600, 256: 400}
KERNEL, C_LOOP = "kernel", "C loop"
_REQUIRED = 1.15
# The fields of `struct loop`, in its order.
_TABLES = {
    "trans": "uint32", "class_of": "uint8", "token_walk": "int64", "token_sync": "int64",
    "calm": "uint32", "calm_shape": "int64", "calm_rows": "int64",
    "token_offsets": "int32", "token_data": "uint8", "first_pattern": "int32",
    "next_pattern": "int32", "suffix_link": "int32", "best_rule": "int32", "pattern_rule": "int32",
    "rule_rank": "int32",
}  # fmt: skip
_SLOTS = {
    "policy": "int64", "plain": "uint8", "pending": "int64", "state": "int64", "synced": "int64",
    "events": "int64", "num_events": "int64",
}  # fmt: skip
_NUMBERS = ("root", "num_classes", "num_slots", "num_tokens", "capacity")


class LoopUnavailableError(RuntimeError):
    """There is no compiler, or the tables are not those that c_loop.c reads."""


class _Loop(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in (*_TABLES, *_SLOTS)] + [
        (name, ctypes.c_int64) for name in _NUMBERS
    ]


@lru_cache(maxsize=1)
def library() -> Any:
    """The compiled loop. Raises LoopUnavailableError."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise LoopUnavailableError("no C compiler (cc, gcc, clang) is installed")
    with tempfile.TemporaryDirectory(prefix="streamguard-bench-") as folder:
        made = Path(folder) / "c_loop.so"
        run = subprocess.run(
            [compiler, *FLAGS, "-o", str(made), str(SOURCE)], capture_output=True, text=True
        )
        if run.returncode:
            raise LoopUnavailableError(f"{compiler} cannot compile c_loop.c: {run.stderr[:500]}")
        loaded = ctypes.CDLL(str(made))
    loaded.advance.restype = ctypes.c_int64
    return loaded


class CLoop:
    """The loop over the tables and slots of a session, which it then owns."""

    def __init__(self, session: Session) -> None:
        """Raises LoopUnavailableError."""
        self._function = library().advance
        tables, slots = session._tables, session._slots
        dense = not tables.track_num_cold.any()
        if len(tables.track_base) != 1 or tables.mapping_form[0] >= 0 or not dense:
            raise LoopUnavailableError("c_loop.c walks one dense track without normal forms")
        self.slots = slots
        self._loop = _Loop()
        for owner, dtypes in ((tables, _TABLES), (slots, _SLOTS)):
            for name, dtype in dtypes.items():
                array = getattr(owner, name, None)
                if array is None or array.dtype != dtype or not array.flags.c_contiguous:
                    raise LoopUnavailableError(
                        f"the tables have no {name} of {dtype}; c_loop.c needs an update"
                    )
                setattr(self._loop, name, array.ctypes.data)
        self._loop.root = int(tables.track_base[0])
        self._loop.num_classes = int(tables.track_classes[0])
        self._loop.num_slots = len(slots.policy)
        self._loop.num_tokens = len(tables.token_special)
        self._loop.capacity = len(slots.events)
        self._keep = session

    def call(
        self, slots: NDArray[np.int64], tokens: NDArray[np.int64], best: NDArray[np.int64]
    ) -> Callable[[], int]:
        """A call of the loop with these arrays; the caller keeps them. It returns `len(slots)`."""
        arguments = (
            ctypes.byref(self._loop),
            ctypes.c_int64(len(slots)),
            *(ctypes.c_void_p(array.ctypes.data) for array in (slots, tokens, best)),
        )
        function = self._function
        return lambda: function(*arguments)

    def events(self) -> NDArray[np.int64]:
        """int64[num_events, 2] of the last call."""
        return self.slots.events[: self.slots.num_events[0]].copy()


@dataclass(frozen=True)
class Case:
    """Both over one token stream, proven to agree."""

    contestants: dict[str, Contestant]
    num_steps: int
    keep: tuple[Any, ...]

    def run(self, name: str) -> None:
        """One pass over the stream."""
        for k in range(self.num_steps):
            self.contestants[name].step(k)


@lru_cache(maxsize=2)
def prepare(num_literals: int, batch: int) -> Case:
    """Build both and compare results, events and states. Raises LoopUnavailableError."""
    work = shared()
    num_steps = STEPS[batch]
    stream = work.stream(batch, num_steps)
    guard = work.guard(num_literals, "halt")
    inner, other = fresh_session(guard, batch), fresh_session(guard, batch)
    loop = CLoop(other)
    slots, rows = np.arange(batch), list(stream)
    kernel, arguments = captured("walk_kernel", lambda: inner.advance(slots, rows[0]))
    calls = [substituted(arguments, rows[0], row) for row in rows]
    ours, theirs = inner._slots.best[:batch], np.empty(batch, np.int64)
    c_calls = [loop.call(slots, row, theirs) for row in rows]

    for slot in range(batch):  # `captured` has fed it one step
        inner.reset(slot)
    num_hits = 0
    for k in range(num_steps):
        kernel(*calls[k])
        if c_calls[k]() != batch:
            raise AssertionError(f"step {k}: the C loop did not do all rows")
        mine = inner._slots.events[: inner._slots.num_events[0]]
        if not (ours == theirs).all() or not np.array_equal(mine, loop.events()):
            raise AssertionError(f"step {k}: the C loop found something else")
        num_hits += len(mine)
    states = [[session.snapshot(k)[0].tolist() for k in range(batch)] for session in (inner, other)]
    if states[0] != states[1] or not num_hits:
        raise AssertionError("the C loop is in other states, or there was no hit")
    contestants = {
        KERNEL: Contestant(lambda k: kernel(*calls[k])),
        C_LOOP: Contestant(lambda k: c_calls[k]()),
    }
    return Case(contestants, num_steps, (inner, loop, theirs))


def measure(num_literals: int, batch: int, num_rounds: int) -> dict[str, Timing]:
    """Time one case; seconds per token."""
    prepared = prepare(num_literals, batch)
    return interleave(
        prepared.contestants,
        num_steps=prepared.num_steps,
        units_per_step=batch,
        num_rounds=num_rounds,
    )


def cases() -> list[tuple[int, int]]:
    """(literals, batch) of every case."""
    return [(n, batch) for n in LITERALS for batch in STEPS]


def bench(quick: bool, on_case: Callable[[str], None]) -> Results:
    """All cases. on_case is told what was finished."""
    results = Results()
    for num_literals, batch in cases():
        try:
            t = measure(num_literals, batch, 15 if quick else 51)
        except LoopUnavailableError as error:
            results.facts[f"{ROOM}, {num_literals:,} literals"] = f"left out: {error}"
            on_case("left out")
            continue
        ratio = Ratio.of(t[C_LOOP].rounds, t[KERNEL].rounds)
        p99 = t[C_LOOP].p99 / t[KERNEL].p99
        value = t[KERNEL].median * 1e9
        question = "the kernel alone: C loop / kernel"
        results.cells.append(Cell(ROOM, question, num_literals, batch, value, "ns", ratio, p99))
        name = f"C loop / kernel, batch {batch}, {num_literals:,} literals"
        results.bars.append(Bar(name, 1 / _REQUIRED, ratio))
        for who in (KERNEL, C_LOOP):
            question = f"{who}, a token"
            value = t[who].median * 1e9
            results.cells.append(Cell(ROOM, question, num_literals, batch, value, "ns"))
        on_case(f"{num_literals:,} literals, batch {batch}")
    return results


@pytest.mark.parametrize("name", [KERNEL, C_LOOP])
@pytest.mark.parametrize(("num_literals", "batch"), cases())
def test_kernel_and_c_loop(benchmark: Any, num_literals: int, batch: int, name: str) -> None:
    benchmark.group = f"C loop: {num_literals} literals, batch {batch}"
    try:
        prepared = prepare(num_literals, batch)
    except LoopUnavailableError as error:
        pytest.skip(str(error))
    benchmark.extra_info["tokens"] = STEPS[batch] * batch
    benchmark.pedantic(prepared.run, args=(name,), rounds=5, warmup_rounds=1)
