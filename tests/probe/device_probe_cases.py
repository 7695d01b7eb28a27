"""The device's probe rules against the host's, interpreted. `test_device_probe` runs this file in a
process of its own, in which nothing has imported triton yet."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest
import torch
import triton_interpreter

if "STREAMGUARD_TEST_DEVICE" not in os.environ:
    triton_interpreter.enable()

from guard_cases import vocabulary
from score_schedule import LIMIT, Schedule, Step, policies
from torch.utils._python_dispatch import TorchDispatchMode

from streamguard.compiler.program import Program, compile_program
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.probe.columns import ProbeTable
from streamguard.row_guard import RowGuard
from streamguard.verdict import FAILED, VerdictCodes
from streamguard_kernels import device, device_probe, device_tables

DEVICE = os.environ.get("STREAMGUARD_TEST_DEVICE", "cpu")
NUM_SLOTS = 5
NUM_STEPS = int(os.environ.get("STREAMGUARD_TEST_STEPS", 150))
TOKENS = [b"b", b"o", b"bo", b"x", b"no"]
SPECIALS = (b"<s>", b"</s>", *(f"<reserved {i}>".encode() for i in range(8)))
PASSES = ("asked",)
X = 3


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    made = vocabulary(TOKENS, SPECIALS)
    spare = tuple(range(len(TOKENS) + 2, len(made)))
    words = Vocabulary(made.token_bytes, made.special, made.eos_token_ids, spare)
    return compile_program(policies(tmp_path_factory.mktemp("probes")), words)


class Engine:
    """Both guards over the same slots and scores."""

    def __init__(self, program: Program, rng: random.Random, faults: float = 0.06) -> None:
        self.program, self.rng = program, rng
        self.codes = VerdictCodes.from_table(program.table, lambda _: [4], lambda _: "no")
        self.columns = ProbeTable.from_table(program.table)
        self.schedule = Schedule(self.columns, NUM_SLOTS, rng, faults)
        self.host = RowGuard(program, self.codes, NUM_SLOTS)
        self.tables = device_tables.to_device(
            program.tables, None, **self.codes.for_device(program.table), device=DEVICE
        )
        self.slots = device_tables.new_slots(
            NUM_SLOTS, program.max_tracks, len(program.rules), DEVICE
        )
        blocks = [name not in PASSES for name in program.policies]
        self.probes = device_probe.probes_to_device(self.columns, self.columns.rank, blocks, DEVICE)
        width, size = self.columns.rule.shape[1], int(self.columns.size.max())
        self.scored = device_probe.new_probe_slots(NUM_SLOTS, width, size, DEVICE)
        self.tokens = torch.zeros((NUM_SLOTS, LIMIT + 1), dtype=torch.int32, device=DEVICE)
        self.total = torch.zeros(NUM_SLOTS, dtype=torch.int32, device=DEVICE)
        self.counter, self.last = (torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in "ab")
        self.texts: list[list[int]] = [[] for _ in range(NUM_SLOTS)]
        self.counts = np.zeros(len(program.rules), np.int64)
        self.seen = dict.fromkeys(("fired", "failed", "passed", "running", "discarded"), 0)

    def enter(self, resets: list[tuple[int, int, int, int]]) -> None:
        s = self.slots
        for slot, policy, prompt_len, count_from in resets:
            if count_from < prompt_len:  # else it resumes with the tokens that it has
                self.texts[slot] = [self.token() for _ in range(prompt_len)]
            text = self.texts[slot]
            self.host.admit(
                slot, text[:prompt_len], policy=self.program.policies[policy],
                max_tokens=LIMIT - prompt_len, end_token_ids=(len(TOKENS) + 1,),
                count_from=count_from,
            )  # fmt: skip
            session = self.host.session
            s.policy[slot], s.seen[slot] = policy, prompt_len
            s.plain[slot], s.hidden[slot] = 1, 1
            s.state[slot] = torch.from_numpy(session.snapshot(slot)[0])
            s.pending[slot] = session.snapshot(slot)[1]
            s.verdict_rule[slot], s.verdict_step[slot] = -1, 0
            s.pending_rule[slot] = device_tables.UNKNOWN_RULE.value
            s.limit[slot] = LIMIT
            s.end_tokens[slot] = -1
            s.end_tokens[slot, 0] = len(TOKENS) + 1
            s.end_bits[slot] = session.end_bits(slot)
            self.tokens[slot, : len(text)] = torch.tensor(text, dtype=torch.int32)
            self.total[slot] = len(text)
        if resets:
            index, policy, length, _ = (
                torch.tensor(c, device=DEVICE) for c in zip(*resets, strict=True)
            )
            reads = [self.columns.reads_prompt(int(p)) for p in policy]
            expected = torch.where(torch.tensor(reads, device=DEVICE), 0, length)
            device_probe.enter_slots(self.scored, index, length, expected)

    def token(self) -> int:
        return self.rng.choices(range(len(TOKENS)), (2, 2, 1, 12, 3))[0]

    def read(self, step: Step, *, written: bool = True) -> None:
        """The scores reach the device, in a buffer that is larger and holds rubbish behind them."""
        num = len(step.scores)
        scores = torch.full((num + 3, self.columns.num_columns + 1), torch.nan, device=DEVICE)
        scores[:num, :-1] = torch.from_numpy(step.scores)
        spans = zip(step.starts, np.diff(step.row_offsets), strict=True)
        positions = np.concatenate([np.arange(a, a + n) for a, n in spans])
        self.counter += int(written)
        device_probe.read_scores(
            self.probes, self.scored, self.slots, scores, put(step.row_offsets), put(positions),
            put(step.slots), self.total, self.counter, self.last,
        )  # fmt: skip

    def step(self) -> None:
        step = self.schedule.step()
        self.enter(step.resets)
        slots, idx = step.slots.tolist(), put(step.slots)
        device.advance_slots(self.tables, self.slots, idx, self.tokens, self.total)
        self.read(step)
        for slot in slots:
            request = self.schedule.requests[slot]
            assert request is not None
            new = self.texts[slot][request.prompt_len + self.host.committed(slot) :]
            self.host.commit([slot] * len(new), new)
        failed = self.host.feed_scores(step.slots, step.starts, step.row_offsets, step.scores)
        context = [self.schedule.requests[slot] for slot in slots]
        assert self.scored.failed[step.slots].tolist() == failed.astype(int).tolist(), context
        for row, slot in enumerate(slots):
            request = self.schedule.requests[slot]
            assert request is not None
            if not failed[row] and self.columns.uses(request.policy):
                expected = max(
                    request.computed,
                    request.prompt_len * (self.columns.stage[request.policy].max() == 0),
                )
                assert int(self.scored.expected[slot]) == expected
            if failed[row] and self.host.running_verdict(slot) is None:
                blocks = self.program.policies[request.policy] not in PASSES
                self.seen["failed" if blocks else "passed"] += 1
                if blocks:
                    self.host.resume_verdict(slot, FAILED, 0)
            running = self.host.running_verdict(slot)
            self.seen["running"] += running is not None and running >= 0
        chosen = np.array([self.token() for _ in slots])
        sampled = put(chosen)
        device.decide_rows(
            self.tables, self.slots, sampled, idx, put(step.starts + np.diff(step.row_offsets) - 1),
            self.total, probes=self.probes, scored=self.scored,
        )  # fmt: skip
        fired = self.host.decide(slots, chosen)
        assert sampled.tolist() == chosen.tolist(), context
        for entry in fired:
            self.counts[entry.rule] += bool(step.valid[entry.row])
            self.seen["fired"] += self.program.rules[entry.rule].rule.probe is not None
        assert self.slots.counts.tolist() == self.counts.tolist(), context
        for row, slot in enumerate(slots):
            progress = self.host._progress[slot]
            if progress.rule != FAILED:
                assert int(self.slots.pending_rule[slot]) == progress.remembered
            if not step.valid[row]:
                self.seen["discarded"] += 1
                continue
            self.texts[slot].append(int(chosen[row]))
            self.tokens[slot, len(self.texts[slot]) - 1] = int(chosen[row])
            self.total[slot] = len(self.texts[slot])
            request = self.schedule.requests[slot]
            assert request is not None
            if chosen[row] in self.codes.stop_token_ids(request.policy):
                request.known = LIMIT  # over: another one takes the slot

    def policy(self, slot: int) -> int:
        request = self.schedule.requests[slot]
        assert request is not None
        return request.policy


def put(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.int64)).to(DEVICE)


def test_device_decides_as_the_host_does_on_random_schedules(program: Program, seed: int) -> None:
    engine = Engine(program, random.Random(seed))
    for _ in range(NUM_STEPS):
        engine.step()
    print(f"{NUM_STEPS} steps:", engine.seen, engine.counts.tolist())
    assert engine.seen["fired"] > 10
    assert engine.seen["failed"] + engine.seen["passed"] > 0
    assert min(engine.seen["discarded"], engine.schedule.restarted) > 0
    assert (engine.counts > 0).sum() > len(engine.counts) / 3


def test_statistics_agree_bit_for_bit_on_scores_of_any_size(program: Program, seed: int) -> None:
    # Where halves and eighths come out exact in any order, these do not.
    engine = Engine(program, random.Random(seed), faults=0)
    host = engine.host.probe
    assert host is not None
    compared = 0
    for _ in range(NUM_STEPS // 3):
        step = engine.schedule.step()
        for slot in range(NUM_SLOTS):
            request = engine.schedule.requests[slot]
            assert request is not None
            if (request.scores * 8 == np.round(request.scores * 8)).all():
                noise = np.random.default_rng(engine.rng.getrandbits(32)).normal(
                    size=request.scores.shape
                )
                request.scores *= np.exp(noise).astype(np.float32)
        pieces = []
        for slot, start, size in zip(
            step.slots, step.starts, np.diff(step.row_offsets), strict=True
        ):
            request = engine.schedule.requests[slot]
            assert request is not None
            pieces.append(request.scores[start : start + size])
        step.scores = np.concatenate(pieces)
        for slot, request in enumerate(engine.schedule.requests):
            assert request is not None
            engine.texts[slot] += [0] * (request.known - len(engine.texts[slot]))
        engine.enter(step.resets)
        engine.read(step)
        engine.host.feed_scores(step.slots, step.starts, step.row_offsets, step.scores)
        for slot in step.slots.tolist():
            policy = engine.policy(slot)
            width = int((engine.columns.rule[policy] >= 0).sum())
            plain = np.isin(engine.columns.kind[policy, :width], (2, 3))
            mine = host._s.value[slot, :width][plain]
            other = engine.scored.value[slot, :width].cpu().numpy()[plain]
            assert mine.tobytes() == other.tobytes()
            assert host._s.above[slot].tolist() == engine.scored.above[slot].tolist()
            compared += len(mine)
    assert compared > NUM_STEPS // 4


def test_scores_that_were_not_written_again_fail_every_row_that_needs_them(
    program: Program, seed: int
) -> None:
    engine = Engine(program, random.Random(seed), faults=0)
    for _ in range(10):
        engine.step()
    assert int(engine.last) == int(engine.counter) == 10
    step = engine.schedule.step()
    engine.enter(step.resets)
    engine.read(step, written=False)
    idx, sampled = put(step.slots), put(np.full(len(step.slots), X))
    failed = engine.scored.failed[idx].tolist()
    reads = [engine.columns.uses(engine.policy(slot)) for slot in step.slots.tolist()]
    assert failed == [int(each) for each in reads]
    device.decide_rows(
        engine.tables, engine.slots, sampled, idx, idx * 0 + LIMIT, engine.total,
        probes=engine.probes, scored=engine.scored,
    )  # fmt: skip
    for slot, token, fails in zip(step.slots.tolist(), sampled.tolist(), reads, strict=True):
        blocks = engine.program.policies[engine.policy(slot)] not in PASSES
        if engine.slots.verdict_rule[slot] < 0 and fails and blocks:
            assert token == engine.codes.stop_id


class Recorder(TorchDispatchMode):
    """Notes every operation that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Launches:
    """Stands in for a kernel: what is left of a launch is what the launching code does itself."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *_, **__: None


def test_a_step_neither_waits_for_the_device_nor_allocates(
    program: Program, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    engine = Engine(program, random.Random(seed))
    launches = Launches()
    monkeypatch.setattr(device_probe, "_read_kernel", launches)
    monkeypatch.setattr(device, "_decide_kernel", launches)
    idx, numbers = put(np.arange(3)), put(np.arange(9))
    scores = torch.zeros((9, engine.columns.num_columns), device=DEVICE)
    with Recorder() as ran:
        device_probe.read_scores(
            engine.probes, engine.scored, engine.slots, scores, numbers, numbers, idx,
            engine.total, engine.counter, engine.last,
        )  # fmt: skip
        device.decide_rows(
            engine.tables, engine.slots, idx, idx, idx, engine.total,
            probes=engine.probes, scored=engine.scored,
        )  # fmt: skip
    assert launches.grids == [(3,), (3,)]
    # An .item(), .cpu(), .tolist() or nonzero would be here, and so would any new tensor.
    assert ran.seen == ["aten.copy_.default"]
    with Recorder() as ran:
        device_probe.enter_slots(engine.scored, idx, idx, idx)
    waiting = ("_local_scalar_dense", "nonzero", "item")
    assert not [name for name in ran.seen if any(word in name for word in waiting)]


def test_the_recorder_notices_what_would_wait() -> None:
    with Recorder() as ran:
        torch.ones(1).item()
        torch.ones(1).nonzero()
    assert {"aten._local_scalar_dense.default", "aten.nonzero.default"} <= set(ran.seen)
