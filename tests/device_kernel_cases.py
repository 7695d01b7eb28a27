"""The device kernels against `RowGuard`, interpreted. `test_device_kernels` runs this file in a
process of its own, in which nothing has imported triton yet."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import triton_interpreter

triton_interpreter.enable()

from streamguard.compiler.program import Program, compile_program  # noqa: E402
from streamguard.compiler.rules import MASK, OBSERVE  # noqa: E402
from streamguard.compiler.vocabulary import Vocabulary  # noqa: E402
from streamguard.policy import Policy, PolicySet  # noqa: E402
from streamguard.row_guard import RowGuard  # noqa: E402
from streamguard.verdict import VerdictCodes  # noqa: E402
from streamguard_kernels import device, device_mask, device_tables  # noqa: E402

NUM_SLOTS = 5
MAX_LEN = 64
NUM_STEPS = int(os.environ.get("STREAMGUARD_TEST_STEPS", 50))
EOS, STOP_ID, MARKER = 0, 1, 2
SPECIALS = [b"<eos>", b"<r0>", b"<r1>", b"<r2>", b"<r3>", b"<r4>", b"<pad>", b"<x>bo"]
PIECES = [
    *(bytes([byte]) for byte in b"abomST \n.,!"),
    *(bytes([byte]) for byte in "é".encode() + "ß".encode() + "€😀".encode() + b"\x80\xff\xc0"),
    b"bo", b"mb", b"bomb", b" bomb", b"Bom", b"b.", b"om", b"OMB", b"ba", b"ab", b"aba", b"bab",
    "é".encode(), "É".encode(), "straße".encode(), b"STRASS", b"se", b"E", "İ".encode(),
    b"\xa9 bo", b"\xc3", b"b\xc3", b"\x9f\x98", b"\x98\x80 b", b"\xe2\x82", b"\xacmb", b"\x82\xac",
    b"\xed\xa0", b"\xf0\x9f\x98\x80", b"o\xf0\x9f", b"\x80\x80\x80", b"",
    "о".encode(), "ｂ".encode(), b"0m", b"8", "\u200b".encode(), "b\u00ad".encode(), b". ", b"o.m", b" - b",
    "\u0301".encode(), "b\u0301".encode(), "ⓑ".encode(), b"b ", b"b_b",
    b" secret", b"sec", b"ret", b" a b c", b"  ", "ﬃ".encode(), b"ffi", b"o m",
]  # fmt: skip
VOCABULARY = Vocabulary(
    tuple(SPECIALS + PIECES),
    np.array([1] * len(SPECIALS) + [0] * len(PIECES), np.uint8),
    (EOS,),
    (STOP_ID, MARKER, 3),  # one rule of a policy has an id of its own, the others a code
)
NUM_TOKENS = len(VOCABULARY)


def rule(name: str, action: str, literals: list[str], **options: object) -> dict[str, object]:
    message = {"message": "ab."} if action == "redirect" else {}
    return {
        "id": name, "category": "custom", "literals": literals, "action": action, "normalize": [],
        **message, **options,
    }  # fmt: skip


POLICIES = {
    "default": [
        rule("halt", "halt", ["bomb", "é€"], normalize=["case"]),
        rule("word", "redirect", ["bab", "o m"], boundary="word"),
        rule("mask", "mask", ["secret", "ab a", "b.", "bomb "]),
        rule("mask-word", "mask", ["aba", "straße"], normalize=["case"], boundary="word"),
        rule("see", "observe", ["a", "om", "bomb"]),
        rule("see-word", "observe", ["bo", "a b"], boundary="word"),
    ],
    "raw-mask": [rule("only", "mask", ["bomb", "😀b", "a"])],
    "folded-mask": [
        rule("fold", "mask", ["strasse", "ffi", "é"], normalize=["case"]),
        rule("word", "mask", ["bo", "b é"], boundary="word"),
    ],
    "spaced": [
        rule("one", "mask", ["ab", "abab", "o m", "b.", "mb b", "bom"], normalize=["separators"]),
        rule("two", "mask", [" secret", "ret a", "bab", "€a"]),
        rule("see-one", "observe", ["ab a", "b"]),
    ],
    "evasive": [
        rule("spaced", "mask", ["bomb", "o m"], normalize=["case", "zero-width", "separators"]),
        rule("alike", "halt", ["bornb", "abba"], normalize=["case", "confusables", "leet"]),
        rule("words", "redirect", ["bo mb", "a"], normalize=["separators"], boundary="word"),
        rule("wide", "mask", ["ab", "ﬃ"], normalize=["width", "marks"], boundary="word"),
    ],
    "regexes": [
        rule("halt-regex", "halt", [], regexes=[r"\bbo+mb\b", "é+€"]),
        rule("mask-regex", "mask", [], regexes=["[ab]{3}", r"\bs\w+t\B", "^o", r"S[^b]"]),
        rule("see-regex", "observe", ["ab"], regexes=["a.b"]),
    ],
    "see": [
        # More rules than fit one int64: those that complete together lie far apart.
        *(rule(f"r{i}", "observe", ["b" if i in (0, 62, 63, 69) else f"z{i}"]) for i in range(70)),
        rule("late", "halt", ["bb"]),
    ],
}


def make_program() -> Program:
    policies = [
        Policy.from_dict({"version": 1, "name": name, "rules": rules})
        for name, rules in POLICIES.items()
    ]
    return compile_program(PolicySet.from_policies(policies), VOCABULARY)


def encode(text: str) -> list[int]:
    return [VOCABULARY.token_bytes.index(c.encode(), len(SPECIALS)) for c in text]


def decode(tokens: list[int]) -> str:
    return b"".join(VOCABULARY.token_bytes[token] for token in tokens).decode()


@pytest.fixture(scope="module")
def program() -> Program:
    return make_program()


@pytest.fixture
def packed_program(monkeypatch: pytest.MonkeyPatch) -> Program:
    """The same, but only few states have a row of their own."""
    monkeypatch.setattr("streamguard.compiler.automaton.DENSE_BYTES", 0)
    monkeypatch.setattr("streamguard.compiler.automaton.HOT_BYTES", 1000)
    return make_program()


@pytest.fixture(scope="module")
def codes(program: Program) -> VerdictCodes:
    return VerdictCodes.from_table(program.table, encode, decode)


def to_device(
    program: Program, codes: VerdictCodes, **changes: object
) -> device_tables.DeviceTables:
    arguments = {**codes.for_device(program.table), "device": "cpu", **changes}
    return device_tables.to_device(program.tables, program.mask_ranges, **arguments)


LIKELY = [
    i
    for i in range(len(SPECIALS), NUM_TOKENS)
    if set("bomé€".encode()) & set(VOCABULARY.token_bytes[i])
]
UNFINISHED = [i for i in LIKELY if VOCABULARY.token_bytes[i][-1:] in (b"\xc3", b"\x82", b"\x9f")]


@dataclass
class Request:
    """One text of the fake engine."""

    policy: str | None
    tokens: list[int]
    prompt_len: int
    limit: int
    options: dict[str, object] = field(default_factory=dict)


class Engine:
    """Both guards over the same slots; `step` does what a runner's step does."""

    def __init__(self, program: Program, codes: VerdictCodes, rng: random.Random) -> None:
        self.program, self.codes, self.rng = program, codes, rng
        self.host = RowGuard(program, codes, NUM_SLOTS)
        self.tables = to_device(program, codes)
        self.slots = device_tables.new_slots(
            NUM_SLOTS, program.max_tracks, len(program.rules), "cpu"
        )
        self.tokens = torch.zeros((NUM_SLOTS, MAX_LEN), dtype=torch.int32)
        self.total = torch.zeros(NUM_SLOTS, dtype=torch.int32)
        self.requests: dict[int, Request] = {}
        self.counts = np.zeros(len(program.rules), np.int64)
        self.seen = {
            "masked": 0,
            "verdicts": 0,
            "unfinished": 0,
            "observed": 0,
            "resumed": 0,
            "said": 0,
        }

    def new_request(self, slot: int, policy: str | None = None) -> None:
        """Begin a random text, under a random policy or the one named."""
        rng = self.rng
        prompt = [self.token() for _ in range(rng.randrange(7))]
        ends = rng.sample([EOS, STOP_ID, PIECES.index(b".") + len(SPECIALS)], rng.randrange(4))
        request = Request(
            policy
            or rng.choice(
                [None, *self.program.policies, "default", "default", "evasive", "evasive"]
            ),
            prompt,
            len(prompt),
            min(MAX_LEN, len(prompt) + rng.choice([3, 9, 30])),
            {
                "hide_special_tokens": rng.random() < 0.6,
                "end_token_ids": ends,
                "show_end_token": rng.random() < 0.3,
            },
        )
        self.requests[slot] = request
        self.admit(slot)

    def token(self) -> int:
        rng = self.rng
        if rng.random() < 0.06:
            return rng.randrange(4, len(SPECIALS))
        if rng.random() < 0.1:
            return rng.choice(UNFINISHED)
        if rng.random() < 0.5:
            return rng.choice(LIKELY)
        return rng.randrange(len(SPECIALS), NUM_TOKENS)

    def admit(self, slot: int) -> None:
        """Put a request into a slot of both, at the end of its prompt; also after a preemption."""
        request, s = self.requests[slot], self.slots
        count = len(request.tokens)
        self.tokens[slot, :count] = torch.tensor(request.tokens, dtype=torch.int32)
        self.total[slot] = count
        s.seen[slot] = request.prompt_len
        s.verdict_rule[slot], s.verdict_step[slot] = -1, 0
        s.pending_rule[slot] = device_tables.UNKNOWN_RULE.value
        s.limit[slot] = request.limit
        s.end_tokens[slot] = -1
        if request.policy is None:
            self.host.release(slot)
            s.policy[slot] = -1
            return
        self.host.admit(
            slot,
            request.tokens[: request.prompt_len],
            policy=request.policy,
            max_tokens=request.limit - request.prompt_len,
            **request.options,
        )
        session = self.host.session
        s.policy[slot] = int(session._slots.policy[slot])
        s.plain[slot] = int(session._slots.plain[slot])
        s.hidden[slot] = int(session._slots.hidden[slot])
        states, s.pending[slot] = session.snapshot(slot)
        s.state[slot] = torch.from_numpy(states)
        ends = session._slots.end_tokens[slot]
        s.end_tokens[slot, : len(ends)] = torch.from_numpy(ends.astype(np.int32))
        s.end_bits[slot] = int(session._slots.end_bits[slot])

    def step(self) -> None:
        rng = self.rng
        for slot in range(NUM_SLOTS):
            request = self.requests.get(slot)
            if request is None or rng.random() < 0.04 or len(request.tokens) >= request.limit:
                self.new_request(slot)
            elif rng.random() < 0.08:
                self.seen["resumed"] += len(request.tokens) > request.prompt_len
                self.admit(slot)
        rows = rng.sample(range(NUM_SLOTS), rng.randrange(1, NUM_SLOTS + 1))
        if rng.random() < 0.3:
            rows.insert(rng.randrange(len(rows)), -1)
        kind = rng.choice([torch.int32, torch.int64])
        idx = torch.tensor(rows, dtype=kind)
        guarded = [(r, s) for r, s in enumerate(rows) if s >= 0 and self.requests[s].policy]

        device.advance_slots(self.tables, self.slots, idx, self.tokens, self.total)
        for _, slot in guarded:
            request = self.requests[slot]
            new = request.tokens[request.prompt_len + self.host.committed(slot) :]
            self.host.commit([slot] * len(new), new)
            self.check_slot(slot)

        logits = np.zeros((len(rows), NUM_TOKENS + 3), np.float32)
        edited = torch.zeros(logits.shape)
        if guarded and rng.random() < 0.4:  # the interpreter takes longest for this one
            device_mask.mask_rows(self.tables, self.slots, edited, idx, self.total, block=128)
            self.host.mask(logits, *map(list, zip(*guarded, strict=True)))
            self.check_mask(rows, logits, edited.numpy())

        impossible = np.zeros(len(rows), bool)
        for row, slot in guarded:
            if self.host.session.needs_mask(slot) and rng.random() < 0.03:
                impossible[row] = True
                edited[row] = rng.choice([-np.inf, np.nan])
        chosen = np.array(
            [self.sample(slot, edited[r].numpy()) for r, slot in enumerate(rows)], np.int64
        )
        sampled = torch.from_numpy(chosen.copy())
        discarded = np.array([rng.random() < 0.15 for _ in rows])
        pos = torch.tensor(
            [int(self.total[s]) - 1 - int(d) for s, d in zip(rows, discarded, strict=True)]
        )
        look = impossible.any() or rng.random() < 0.5
        device.decide_rows(
            self.tables, self.slots, sampled, idx, pos, self.total, edited if look else None
        )
        self.check_decisions(guarded, chosen, sampled.numpy(), discarded, impossible)
        for row, slot in enumerate(rows):
            request = self.requests.get(slot)
            if request is None or discarded[row]:
                continue
            request.tokens.append(int(sampled[row]))
            self.tokens[slot, len(request.tokens) - 1] = sampled[row]
            self.total[slot] += 1
            if len(request.tokens) >= request.limit:
                del self.requests[slot]

    def sample(self, slot: int, logits: np.ndarray) -> int:
        """A token that the row's logits allow, rather one that completes a match."""
        if self.rng.random() < 0.03:
            return self.rng.randrange(6)
        possible = np.flatnonzero(np.isfinite(logits[:NUM_TOKENS]))
        token = self.token()
        if slot >= 0 and self.rng.random() < 0.3:
            token = int(self.rng.choice([*self.host.session.forbidden(slot), token]))
        if len(possible) and not np.isfinite(logits[token]):
            return int(self.rng.choice(possible))
        return token

    def check_slot(self, slot: int) -> None:
        request, session, s = self.requests[slot], self.host.session, self.slots
        p = self.program.policies.index(request.policy)
        width = int(np.diff(self.program.tables.policy_tracks)[p])
        where = f"slot {slot}, {request}"
        states, pending = session.snapshot(slot)
        assert s.state[slot, :width].tolist() == states[:width].tolist(), where
        assert int(s.pending[slot]) == pending, where
        assert int(s.seen[slot]) == len(request.tokens), where
        progress = self.host._progress[slot]
        assert int(s.verdict_rule[slot]) == (-1 if progress.rule is None else progress.rule), where
        if progress.rule is not None:
            self.seen["said"] += 1
            assert int(s.verdict_step[slot]) == progress.step, where
        self.seen["unfinished"] += pending != 0

    def check_mask(self, rows: list[int], wanted: np.ndarray, got: np.ndarray) -> None:
        self.seen["masked"] += int(np.isinf(wanted).sum())
        for row, slot in enumerate(rows):
            differs = np.flatnonzero(wanted[row] != got[row])
            assert not len(differs), (
                f"slot {slot}, {self.requests.get(slot)}: tokens {differs.tolist()} "
                f"{[VOCABULARY.token_bytes[i] for i in differs]} host {wanted[row, differs]}"
            )

    def check_decisions(
        self,
        guarded: list[tuple[int, int]],
        chosen: np.ndarray,
        sampled: np.ndarray,
        discarded: np.ndarray,
        impossible: np.ndarray,
    ) -> None:
        expected = chosen.copy()
        rows = [row for row, _ in guarded]
        slots = [slot for _, slot in guarded]
        running = [self.host.running_verdict(slot) is not None for slot in slots]
        mine = chosen[rows]
        fired = self.host.decide(slots, mine, impossible[rows])
        expected[rows] = mine
        assert sampled.tolist() == expected.tolist(), (
            f"chosen {chosen.tolist()}, slots {slots}, {[self.requests[s] for s in slots]}"
        )
        rules = {(f.row, f.rule) for f in fired}
        # `decide` names observe rules only beside a verdict; they count in any case.
        for at, (row, slot) in enumerate(guarded):
            if running[at]:
                continue
            token = EOS if int(chosen[row]) in self.codes.spare else int(chosen[row])
            self.host.session.peek([slot], [token], self.host._last(np.array([slot])))
            rules |= {(at, r) for _, r in self.host.session.events()}
        for at, r in rules:
            if not discarded[rows[at]]:
                self.counts[r] += 1
                self.seen["observed"] += self.program.rules[r].group == OBSERVE
        self.seen["verdicts"] += len({f.row for f in fired})
        assert self.slots.counts.tolist() == self.counts.tolist()
        for slot in slots:
            remembered = self.host._progress[slot].remembered
            assert int(self.slots.pending_rule[slot]) == remembered


def test_device_agrees_with_host_on_random_schedules(
    program: Program, codes: VerdictCodes, seed: int
) -> None:
    engine = Engine(program, codes, random.Random(seed))
    for _ in range(NUM_STEPS):
        engine.step()
    print(f"{NUM_STEPS} steps:", engine.seen)
    assert min(engine.seen.values()) > 0, engine.seen


def test_packed_tables_agree_with_the_host_too(
    packed_program: Program, codes: VerdictCodes, seed: int
) -> None:
    assert packed_program.tables.track_num_cold.any()
    engine = Engine(packed_program, codes, random.Random(seed))
    for _ in range(NUM_STEPS // 3):
        engine.step()
    print(f"{NUM_STEPS // 3} steps, packed:", engine.seen)


def test_mask_equals_a_walk_of_every_token(
    program: Program, codes: VerdictCodes, seed: int
) -> None:
    # The host's mask comes from ranges; here the oracle is `peek`, one token after another.
    engine = Engine(program, codes, random.Random(seed))
    groups = np.array([r.group for r in program.rules])
    every = np.arange(NUM_TOKENS)
    for _ in range(2):
        for slot in range(NUM_SLOTS):
            engine.new_request(slot)
        logits = torch.zeros((NUM_SLOTS, NUM_TOKENS))
        idx = torch.arange(NUM_SLOTS)
        device_mask.mask_rows(engine.tables, engine.slots, logits, idx, engine.total, block=64)
        for slot in range(NUM_SLOTS):
            expected = np.zeros(NUM_TOKENS, bool)
            if engine.requests[slot].policy is not None:
                last = np.repeat(engine.host._last(np.array([slot])), NUM_TOKENS)
                best = engine.host.session.peek([slot] * NUM_TOKENS, every, last) - 1
                expected = (best >= 0) & (groups[best] == MASK)
            assert np.isinf(logits[slot].numpy()).tolist() == expected.tolist()


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "see"])
def test_mask_equals_that_of_the_session_whichever_way_a_row_goes(
    policy: str, program: Program, codes: VerdictCodes, seed: int
) -> None:
    rng = random.Random(f"{seed} {policy}")
    ways = {"raw-mask": "ranges", "spaced": "ranges", "regexes": "all tokens"}
    engine = Engine(program, codes, rng)
    masked: dict[str, int] = {}
    for _ in range(2):
        for slot in range(NUM_SLOTS):
            engine.new_request(slot, policy)
            if slot < 3:  # an ordinary text
                prompt = rng.choices(
                    [i for i in LIKELY if VOCABULARY.token_bytes[i].isascii()], k=5
                )
                ends = {"end_token_ids": [EOS], "show_end_token": slot == 0}
                engine.requests[slot] = Request(policy, prompt, len(prompt), MAX_LEN, ends)
                engine.admit(slot)
        logits = torch.zeros((NUM_SLOTS, NUM_TOKENS))
        slots = torch.arange(NUM_SLOTS)
        device_mask.mask_rows(
            engine.tables, engine.slots, logits, slots, engine.total, block=128,
            range_block=2 if policy in ways else 16,
        )  # fmt: skip
        expected = np.zeros((NUM_SLOTS, NUM_TOKENS), np.float32)
        engine.host.mask(expected, slots.tolist(), slots.tolist())
        for slot in range(NUM_SLOTS):
            way = way_of(engine, slot)
            masked[way] = masked.get(way, 0) + int(np.isinf(expected[slot]).sum())
        engine.check_mask(slots.tolist(), expected, logits.numpy())
    print(policy, masked)
    assert masked.get(ways.get(policy, "tokens of ranges")), masked


def way_of(engine: Engine, slot: int) -> str:
    """Which tokens of a row the device looks at; see `device_mask`."""
    s, last = engine.slots, bool(engine.host._last(np.array([slot]))[0])
    way = int(engine.tables.masking[s.policy[slot]])
    if way == device_tables.SUFFICE.value and not s.plain[slot]:
        way = device_tables.CANDIDATES.value
    if not s.hidden[slot] or s.pending[slot]:
        way = device_tables.EVERY.value
    if way == device_tables.CANDIDATES.value and last:
        way = device_tables.EVERY.value
    return {0: "all tokens", 1: "ranges", 2: "tokens of ranges"}[way]


def test_tables_that_the_kernels_cannot_read_are_refused(
    program: Program, codes: VerdictCodes
) -> None:
    groups = [r.group for r in program.rules]
    with pytest.raises(ValueError, match="ranks must put stop rules"):
        to_device(program, codes, rule_group=groups[::-1])
    with pytest.raises(ValueError, match="consecutive"):
        to_device(program, codes, rule_policy=list(range(len(groups)))[::-1])
    with pytest.raises(ValueError, match="is empty"):
        to_device(program, codes, scripts=[()] * len(groups))
