"""The workload of `bench_device`: a vocabulary, texts and slots that need no tokenizer files.

The vocabulary is byte-level as a model's is: all bytes, words of the text with and without a space
before them, their pieces, numbers, white space, and made-up words up to the size wanted. Texts are
encoded greedily, longest token first. Both are the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import workload
from streamguard.compiler.program import Program, compile_program
from streamguard.compiler.rules import MASK as MASK_RULES
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.policy import PolicySet
from streamguard.row_guard import RowGuard
from streamguard.verdict import VerdictCodes

ADVANCE, MASK, DECIDE, STEP = "advance_slots", "mask_rows", "decide_rows", "whole step"
#: Tokens of each text that are committed before the step that is timed.
LEAD = 12
#: Rows whose mask is compared with the host's.
_COMPARED = 64
NUM_RESERVED = 16
EOS = 0
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_LONGEST = 24


def vocabulary(num_tokens: int) -> Vocabulary:
    """EOS, NUM_RESERVED spare ids, all bytes, then pieces until there are `num_tokens`."""
    if num_tokens < 512:
        raise ValueError(f"num_tokens is {num_tokens}; specials and bytes alone need 512.")
    specials = [b"<eos>", *(b"<reserved_%d>" % i for i in range(NUM_RESERVED))]
    found = dict.fromkeys(bytes([byte]) for byte in range(256))
    for piece in _pieces():
        if len(specials) + len(found) >= num_tokens:
            break
        found.setdefault(piece.encode())
    special = np.zeros(num_tokens, np.uint8)
    special[: len(specials)] = 1
    spare = tuple(range(1, len(specials)))
    return Vocabulary((*specials, *found), special, (EOS,), spare)


def _pieces() -> Iterator[str]:
    """Pieces of text, the useful ones first; without end."""
    words = dict.fromkeys(
        word
        for sentence in islice(workload.sentences(), 3_000)
        for word in sentence.replace(",", " ").replace(".", " ").split()
    )
    for word in words:
        yield from (f" {word}", word, word.capitalize(), f" {word.capitalize()}")
    yield from (", ", ". ", "\n\n", "ing", "ed", *(" " * n for n in range(2, 33)))
    for a, b in product(_LETTERS, repeat=2):
        yield from (a + b, f" {a}{b}")
    for word in words:
        yield from (word[:n] for n in range(3, len(word)))
        yield from (word[-n:] for n in range(3, len(word)))
    yield from (f"{n}" for n in range(1000))
    rng = random.Random(workload.SEED)
    while True:
        word = "".join(
            rng.choice(workload.SYLLABLES) for _ in range(rng.choice((1, 2, 2, 3, 3, 4)))
        )
        yield from (word, f" {word}")
        if rng.random() < 0.25:
            yield f" {word.capitalize()}"


@dataclass(frozen=True)
class Texts:
    """Encodes and decodes by greedy longest match over one vocabulary."""

    vocabulary: Vocabulary

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        ordinary = np.flatnonzero(self.vocabulary.special == 0).tolist()
        return {self.vocabulary.token_bytes[token]: token for token in ordinary}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; every byte is a token, so there always are some."""
        data, at, tokens = text.encode(), 0, []
        while at < len(data):
            length = next(
                n
                for n in range(min(_LONGEST, len(data) - at), 0, -1)
                if data[at : at + n] in self._ids
            )
            tokens.append(self._ids[data[at : at + length]])
            at += length
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids."""
        return b"".join(self.vocabulary.token_bytes[token] for token in tokens).decode()

    def columns(self, num_texts: int, num_tokens: int) -> NDArray[np.int32]:
        """int32[num_texts, num_tokens]: stretches of one long text."""
        text = "".join(islice(workload.sentences(), 5_000))
        tokens = np.array(self.encode(text), np.int32)
        return np.resize(tokens, (num_texts, num_tokens))


@dataclass(frozen=True)
class Sizes:
    """What one run measures. steps: in one graph, each on slots of its own."""

    vocabulary: int
    literals: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int
    repeats: int


@lru_cache(maxsize=1)
def texts(num_tokens: int) -> Texts:
    """The vocabulary, and what encodes with it."""
    return Texts(vocabulary(num_tokens))


class Case:
    """Slots for `sizes.steps` batches on the device, and the same slots on the host."""

    def __init__(self, sizes: Sizes, action: str, num_literals: int, batch: int, device: str):
        import torch

        from streamguard_kernels import device_tables

        self.sizes, self.action, self.batch, self.device = sizes, action, batch, device
        self.texts = texts(sizes.vocabulary)
        self.program, self.codes = compiled(sizes.vocabulary, action, num_literals)
        num_slots = batch * sizes.steps
        self.tokens = self.texts.columns(num_slots, LEAD + 2)
        self.host = RowGuard(self.program, self.codes, num_slots)
        slots = list(range(num_slots))
        for slot in slots:
            self.host.admit(slot, (), policy="bench", max_tokens=1 << 30, end_token_ids=(EOS,))
        for column in self.tokens.T[:LEAD]:
            self.host.commit(slots, column.tolist())
        self.tables = on_device(self.program, self.codes, device)
        self.slots = device_tables.new_slots(
            num_slots, self.program.max_tracks, len(self.program.rules), device
        )
        self.slots.policy.fill_(0)
        self.slots.end_tokens[:, 0] = EOS
        self._before = {
            "state": self._states(),
            "seen": torch.full((num_slots,), LEAD, dtype=torch.int32, device=device),
            "pending": torch.zeros(num_slots, dtype=torch.int32, device=device),
        }
        self._behind = self._before
        self.num_verdicts = 0
        self.all_token_ids = torch.from_numpy(self.tokens).to(device)
        self.total = torch.full((num_slots,), LEAD + 1, dtype=torch.int32, device=device)
        every = torch.arange(num_slots, dtype=torch.int32, device=device)
        self.idx = list(every.view(sizes.steps, batch))
        self.pos = torch.full((batch,), LEAD, dtype=torch.int64, device=device)
        chosen = self.tokens[:, LEAD + 1].astype(np.int64).reshape(sizes.steps, batch)
        self.chosen = torch.from_numpy(chosen).to(device)
        self.sampled = list(self.chosen.clone())
        self.logits = torch.zeros((batch, sizes.vocabulary), device=device)

    def _states(self) -> Any:
        import torch

        states = [self.host.session.snapshot(slot) for slot in range(self.host.session.num_slots)]
        if any(pending for _, pending in states):
            raise AssertionError("the text of the workload is ASCII, yet a character is unfinished")
        return torch.from_numpy(np.stack([state for state, _ in states])).to(self.device)

    def reset(self, *, advanced: bool = False) -> None:
        """Bring the device's slots to where the timed step begins, or to behind its token."""
        for name, value in (self._behind if advanced else self._before).items():
            getattr(self.slots, name).copy_(value)
        for k, sampled in enumerate(self.sampled):
            sampled.copy_(self.chosen[k])

    def advance(self, k: int) -> None:
        """`advance_slots` for the slots of step k, one new token each."""
        from streamguard_kernels import device

        device.advance_slots(self.tables, self.slots, self.idx[k], self.all_token_ids, self.total)

    def mask(self, k: int) -> None:
        """`mask_rows` for the slots of step k."""
        from streamguard_kernels import device_mask

        device_mask.mask_rows(self.tables, self.slots, self.logits, self.idx[k], self.total)

    def decide(self, k: int) -> None:
        """`decide_rows` for the slots of step k."""
        from streamguard_kernels import device

        logits = self.logits if self.action == "mask" else None
        device.decide_rows(
            self.tables, self.slots, self.sampled[k], self.idx[k], self.pos, self.total, logits
        )

    def step(self, k: int) -> None:
        """All that the guard does in an engine's step."""
        self.advance(k)
        if self.action == "mask":
            self.mask(k)
        self.decide(k)

    def compare(self) -> float:
        """Run every step and compare with the host; return tokens masked a row.

        Raises AssertionError where they differ. All slots stand behind the step's token afterwards.
        """
        import torch

        self.reset()
        slots = list(range(self.host.session.num_slots))
        self.host.commit(slots, self.tokens[:, LEAD].tolist())
        masked = 0
        decided = self.chosen.cpu().numpy().copy()
        for k in range(self.sizes.steps):
            mine = slots[k * self.batch : (k + 1) * self.batch]
            self.logits.zero_()
            self.advance(k)
            if self.action == "mask":
                self.mask(k)
                masked += self._compare_masks(mine)
                self.logits.zero_()
            for row in range(0, min(self.batch, 16), 2):  # text alone would seldom give a verdict
                completing = self.host.session.forbidden(mine[row])
                if len(completing):
                    decided[k, row] = completing[row % len(completing)]
            self.sampled[k].copy_(torch.from_numpy(decided[k]))
            tried = decided[k].copy()
            self.decide(k)
            self.host.decide(mine, decided[k])
            self.num_verdicts += int((tried != decided[k]).sum())
            if self.sampled[k].cpu().tolist() != decided[k].tolist():
                raise AssertionError(f"step {k}: decisions differ from the host's")
        if self.slots.state.cpu().tolist() != self._states().cpu().tolist():
            raise AssertionError("states differ from the host's")
        self._behind = {name: getattr(self.slots, name).clone() for name in self._before}
        return masked / min(self.batch, _COMPARED) / self.sizes.steps

    def _compare_masks(self, slots: list[int]) -> int:
        rows = list(range(min(self.batch, _COMPARED)))
        expected = self.masks(slots[: len(rows)])
        if not np.array_equal(self.logits[: len(rows)].cpu().numpy(), expected):
            raise AssertionError("masked tokens differ from the host's")
        return int(np.isneginf(expected).sum())

    def masks(self, slots: list[int]) -> NDArray[np.float32]:
        """float32[len(slots), num_tokens]: zeros, -inf where the host masks."""
        logits = np.zeros((len(slots), self.sizes.vocabulary), np.float32)
        self.host.mask(logits, list(range(len(slots))), slots)
        return logits

    @cached_property
    def operations(self) -> dict[str, Callable[[int], None]]:
        """What is timed, peers included."""
        ours: dict[str, Callable[[int], None]] = {ADVANCE: self.advance}
        if self.action == "mask":
            ours[MASK] = self.mask
        ours |= {DECIDE: self.decide, STEP: self.step}
        return ours


@lru_cache(maxsize=2)
def compiled(num_tokens: int, action: str, num_literals: int) -> tuple[Program, VerdictCodes]:
    """The bench policy over the vocabulary, and its verdicts."""
    known = texts(num_tokens)
    policies = PolicySet.from_policies([workload.policy(num_literals, action)])
    program = compile_program(policies, known.vocabulary)
    return program, VerdictCodes.from_table(program.table, known.encode, known.decode)


def on_device(program: Program, codes: VerdictCodes, device: str) -> Any:
    """The program's `DeviceTables`, as the engine makes them."""
    from streamguard_kernels import device_tables

    if codes.stop_id is None or codes.marker_id is None:
        raise AssertionError("the bench vocabulary has spare ids")
    return device_tables.to_device(
        program.tables,
        program.mask_ranges if program.uses(MASK_RULES) else None,
        **codes.for_device(program.table),
        device=device,
    )
