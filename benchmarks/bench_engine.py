"""What does the guard cost a real vLLM engine?

Two engines with the small real model (SmolLM2-135M, bfloat16, eager, V1 runner, greedy, ignore_eos,
fixed length), each in a process of its own: one guarded, one with the plugin installed but no policy.
They generate in turns, never at the same time: unguarded, guarded A, unguarded, guarded B, … Each
guarded turn is divided by the mean of the two unguarded turns around it, which cancels drift of the
machine; the same quotient of unguarded turns among themselves is the noise that a ratio has to be
read against, and is printed as a row of its own.

The policies have 10 or 1,000 literals that the model does not write: halt rules (decided after
sampling) or mask rules (logits edited). Before timing counts, both engines must have generated the
same tokens. Throughput and latency are wall time: another busy process shows in them, and in the noise
row. The CPU time of a step (all threads, median) suffers much less. Limits: on a CPU a step takes some
30 to 200 ms, so the guard's share is smaller than it would be beside a fast GPU:
`streamguard_step_seconds` gives its own time in µs a step, to be set against any step time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest

from benchmarks.engine_worker import ENVIRONMENT
from benchmarks.measure import Ratio
from benchmarks.report import Cell, Results
from benchmarks.workload import policy_text
from streamguard.demo_model import demo_model

ROOM = "engine"
BATCHES = (1, 8, 32)
LITERALS = (10, 1_000)
ACTIONS = ("halt", "mask")
NUM_TOKENS = {1: 32, 8: 24, 32: 16}
UNGUARDED = "unguarded"


@dataclass
class Worker:
    """A subprocess with an engine. `ask` sends a command and waits for its reply."""

    process: subprocess.Popen[bytes]
    commands: TextIO
    replies: TextIO
    log: Path

    def send(self, **command: Any) -> None:
        """Start a command."""
        self.commands.write(json.dumps(command) + "\n")
        self.commands.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for the reply. Raises RuntimeError with the end of the worker's log if it died."""
        line = self.replies.readline()
        if not line:
            tail = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the engine's process ended:\n{tail}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def ask(self, **command: Any) -> dict[str, Any]:
        self.send(**command)
        return self.receive()


@contextmanager
def worker(folder: Path, name: str, policies: Path | None) -> Iterator[Worker]:
    """Start a worker; its engine is built by the first command."""
    command_end, send_end = os.pipe()
    receive_end, reply_end = os.pipe()
    environment = {**os.environ, **ENVIRONMENT}
    environment.pop("STREAMGUARD_POLICY", None)
    if policies is not None:
        environment["STREAMGUARD_POLICY"] = str(policies)
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine_worker", str(command_end), str(reply_end)],
            pass_fds=(command_end, reply_end),
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    os.close(command_end)
    os.close(reply_end)
    with os.fdopen(send_end, "w") as commands, os.fdopen(receive_end) as replies:
        try:
            yield Worker(process, commands, replies, log)
        finally:
            process.terminate()
            process.wait()


def write_policies(folder: Path) -> None:
    """Write the policies of `variants`, by name, and a default one."""
    for i, (action, num_literals) in enumerate(variants()):
        text = policy_text(num_literals, action, f"{action}-{num_literals}")
        # The only policy that clients need not ask for is the one named default.
        (folder / f"{i}.yaml").write_text(text)
    (folder / "default.yaml").write_text(policy_text(10, "observe", "default"))


@contextmanager
def engines(
    write: Callable[[Path], None] = write_policies, max_batch: int = max(BATCHES)
) -> Iterator[tuple[Worker, Worker]]:
    """A guarded and an unguarded engine, both loaded. write: puts the policies into a folder."""
    model = str(demo_model())
    with tempfile.TemporaryDirectory(prefix="streamguard-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        policies = folder / "policies"
        policies.mkdir()
        write(policies)
        both = (
            stack.enter_context(worker(folder, "guarded", policies)),
            stack.enter_context(worker(folder, UNGUARDED, None)),
        )
        for each in both:
            each.send(model=model, max_batch=max_batch)
        for each in both:
            each.receive()
        yield both


def variants() -> list[tuple[str, int]]:
    """(action, literals) of every guarded policy."""
    return [(action, n) for n in LITERALS for action in ACTIONS]


@dataclass
class Turns:
    """What one batch size gave: quotients of guarded by unguarded turns, one a round."""

    tokens_per_second: dict[str, list[float]] = field(default_factory=dict)
    mean_latency: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    step_seconds: dict[str, list[float]] = field(default_factory=dict)
    guard_seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, turn: dict[str, Any], around: list[dict[str, Any]]) -> None:
        """Note one turn and the unguarded ones before and after it."""

        def quotient(read: Callable[[dict[str, Any]], float]) -> float:
            return read(turn) / float(np.mean([read(other) for other in around]))

        def note(values: dict[str, list[float]], value: float) -> None:
            values.setdefault(name, []).append(value)

        note(self.tokens_per_second, 1 / quotient(lambda t: float(t["seconds"])))
        note(self.mean_latency, quotient(lambda t: float(np.mean(t["step_seconds"]))))
        note(self.cpu, quotient(lambda t: float(np.median(t["step_cpu_seconds"]))))
        note(self.step_seconds, float(np.median(turn["step_seconds"])))
        num_steps = len(turn["step_seconds"]) + 1
        note(self.guard_seconds, sum(turn["guard_seconds"].values()) / num_steps)


def measure(
    guarded: Worker, unguarded: Worker, batch: int, num_rounds: int,
    on_turn: Callable[[], None] = lambda: None, names: Sequence[str] = (),
) -> Turns:  # fmt: skip
    """Let the engines generate in turns; round 0 warms up, is compared and dropped.

    names  of the guarded engine's policies; those of `variants` if none are given.
    """
    turns = Turns()
    names = list(names) or [f"{action}-{n}" for action, n in variants()]
    expected = None
    for number in range(num_rounds + 1):
        shift = number % len(names)
        order = names[shift:] + names[:shift]
        done: list[tuple[str | None, dict[str, Any]]] = []
        for name in [None, *[part for each in order for part in (each, None)]]:
            engine = unguarded if name is None else guarded
            reply = engine.ask(batch=batch, num_tokens=NUM_TOKENS[batch], policy=name)
            if expected is None:
                expected = reply["tokens"]
            if reply["tokens"] != expected or reply["reasons"] != ["length"]:
                raise AssertionError(
                    f"{name or UNGUARDED}, batch {batch}: other tokens than the unguarded engine, "
                    f"or another end: {reply['reasons']}"
                )
            done.append((name, reply))
            on_turn()
        if number == 0:
            continue
        for i, (name, reply) in enumerate(done):
            if name is not None:
                turns.add(name, reply, [done[i - 1][1], done[i + 1][1]])
            elif 2 <= i <= len(done) - 3:
                turns.add(UNGUARDED, reply, [done[i - 2][1], done[i + 2][1]])
    return turns


def turns_per_round() -> int:
    """Turns of both engines in a round."""
    return 2 * len(variants()) + 1


def rounds(quick: bool) -> int:
    """How many rounds count."""
    return 1 if quick else 5


def bench(quick: bool, on_turn: Callable[[str], None]) -> Results:
    """All batch sizes. on_turn is told what goes on, once a turn."""
    results = Results()
    with engines() as (guarded, unguarded):
        for batch in BATCHES:
            turns = measure(
                guarded, unguarded, batch, rounds(quick), partial(on_turn, f"batch {batch}")
            )
            results.add(_results(turns, batch))
    return results


def _results(turns: Turns, batch: int) -> Results:
    results = Results()
    one = np.ones(1)
    rows = [("unguarded / unguarded (noise)", 0, UNGUARDED)] + [
        (f"guarded ({action}) / unguarded", n, f"{action}-{n}") for action, n in variants()
    ]
    for kind, values in (
        ("tokens/s", turns.tokens_per_second),
        ("inter-token latency", turns.mean_latency),
        ("CPU time a step", turns.cpu),
    ):
        for label, n, name in rows:
            ratio = Ratio.of(np.array(values[name]), one)
            results.cells.append(Cell(ROOM, f"{kind}: {label}", n, batch, ratio.median, "×", ratio))
    step = float(np.median(turns.step_seconds[UNGUARDED])) * 1e3
    results.cells.append(Cell(ROOM, "unguarded step", 0, batch, step, "ms"))
    for action, n in variants():
        name = f"{action}-{n}"
        own = np.array(turns.guard_seconds[name])
        share = own / np.array(turns.step_seconds[name])
        results.cells.append(
            Cell(ROOM, f"guard's own time a step ({action})", n, batch, np.median(own) * 1e6, "µs")
        )
        results.cells.append(
            Cell(ROOM, f"its share of a step ({action})", n, batch, np.median(share) * 100, "%")
        )
    return results


@pytest.fixture(scope="module")
def both_engines() -> Iterator[tuple[Worker, Worker]]:
    with engines() as both:
        yield both


@pytest.mark.benchmark(max_time=1)  # wall time: the engine has threads of its own
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", [UNGUARDED, *(f"{action}-{n}" for action, n in variants())])
def test_generate(
    benchmark: Any, both_engines: tuple[Worker, Worker], batch: int, name: str
) -> None:
    benchmark.group = f"engine: batch {batch}"
    guarded, unguarded = both_engines
    engine, policy = (unguarded, None) if name == UNGUARDED else (guarded, name)
    command = {"batch": batch, "num_tokens": NUM_TOKENS[batch], "policy": policy}
    benchmark.pedantic(engine.ask, kwargs=command, rounds=3, warmup_rounds=1)
