"""What does it cost to forbid, in a batch of logits, the tokens that would complete a match?

Ours, from the inside out: the compiled kernel with the arguments that the session gives it;
`Session.apply_mask` with arrays; `RowGuard.mask` with lists, which is all that the engine's host path
does. Peers: xgrammar's `apply_token_bitmask_inplace` on CPU with a bitmask of the very same tokens
(made beforehand: its matchers' time is not counted), and vLLM's `bad_words` with the same literals.
bad_words forbids less (exact token sequences in two spellings), so it is compared in time only.

Logits are float32[batch, 49,152]. CPU time of one thread; every contestant edits the same buffer over
and over, and eight snapshots of a text's states take turns. Before anything is timed, the tokens
masked in sampled rows are compared with brute force: `Session.peek` over the whole vocabulary. Limits:
the cost follows the number of masked tokens (printed): a list with forty single words, most of them
one token, is the case that we win least, since writing those logits is all the work and xgrammar has
to do it too; at batch 1 the call itself decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import xgrammar
from numpy.typing import NDArray

from benchmarks.measure import Contestant, Ratio, Timing, interleave, seconds
from benchmarks.replay import captured, substituted
from benchmarks.report import Bar, Cell, Results
from benchmarks.workload import ORDINARY, SINGLE_WORDS, literals, row_guard, shared
from streamguard.demo_model import demo_model
from streamguard.session import Session

ROOM = "lookahead"
LITERALS = {ORDINARY: (10, 1_000, 10_000, 100_000), SINGLE_WORDS: (1_000,)}
BATCHES = (1, 32, 256)
SNAPSHOTS = 8
STEPS = {1: 400, 32: 200, 256: 64}
#: Tokens committed before the first snapshot, and between two.
_LEAD, _APART = 40, 7
#: bad_words takes milliseconds a row, so it does a part of the steps; None = not at all.
_BAD_WORDS_SHARE = {10: 0.25, 1_000: 1 / 64, 10_000: None, 100_000: None}
#: How many times as fast as xgrammar at batch 256, by literals.
_REQUIRED = {1_000: 15, 10_000: 5, 100_000: 2}
_PORTION = 60
KERNEL, SESSION, ENGINE = "its kernel alone", "Session.apply_mask", "RowGuard.mask"
NO_RULES = "Session.apply_mask, no mask rules"
XGRAMMAR, BAD_WORDS = "xgrammar", "vLLM bad_words"
NAMES = (KERNEL, SESSION, ENGINE, NO_RULES, XGRAMMAR, BAD_WORDS)


@dataclass(frozen=True)
class Case:
    """The contestants over the same snapshots, proven to mask the same tokens."""

    contestants: dict[str, Contestant]
    build_seconds: float
    masked_per_row: float
    num_steps: int

    def run(self, name: str) -> None:
        """All steps once."""
        contestant = self.contestants[name]
        for k in range(max(1, int(self.num_steps * contestant.share))):
            contestant.step(k)


def brute_force(session: Session, slot: int) -> NDArray[np.int64]:
    """int64[k]: every token that completes a match in the slot, by trying each one."""
    every = np.arange(len(session.program.vocabulary))
    return np.flatnonzero(session.peek(np.full(len(every), slot), every))


@lru_cache(maxsize=2)
def prepare(num_literals: int, batch: int, kind: str) -> Case:
    """Build every contestant and check what it masks."""
    work = shared()
    num_tokens = len(work.vocabulary)
    guard, build_seconds = work.timed_guard(num_literals, "mask", kind=kind)
    build_seconds += seconds(lambda: guard.program.mask_ranges)
    stream = work.stream(batch, _LEAD + _APART * SNAPSHOTS)
    slots: Any = np.arange(batch)
    last: Any = np.zeros(batch, bool)
    slot_list = slots.tolist()
    logits = np.zeros((batch, num_tokens), np.float32)
    tensor = torch.from_numpy(logits)

    calls: list[Callable[[], object]] = []
    sessions, row_guards, bitmasks, pasts = [], [], [], []
    masked = 0
    for snapshot in range(SNAPSHOTS):
        done = _LEAD + _APART * snapshot
        rows = row_guard(guard, batch)
        for tokens in stream[:done]:
            rows.commit(slot_list, tokens.tolist())
        session = rows.session
        allowed = np.zeros((batch, num_tokens), np.float32)
        # First, because it makes the session's arrays larger: the captured call holds addresses.
        expected = {row: brute_force(session, row) for row in {0, batch // 3, batch - 1}}
        kernel, arguments = captured(
            "apply_ranges", partial(session.apply_mask, allowed, slots, slots, last)
        )
        forbidden = np.isneginf(allowed)
        masked += int(forbidden.sum())
        for row, tokens in expected.items():
            if not np.array_equal(np.flatnonzero(forbidden[row]), tokens):
                raise AssertionError(f"row {row}: masked tokens differ from brute force")
        bitmask = bitmask_of(forbidden)
        again = torch.zeros((batch, num_tokens))
        xgrammar.apply_token_bitmask_inplace(again, bitmask)
        if not np.array_equal(np.isneginf(again.numpy()), forbidden):
            raise AssertionError("xgrammar masked other tokens")
        calls.append(partial(kernel, *substituted(arguments, allowed, logits)))
        sessions.append(session)
        row_guards.append(rows)
        bitmasks.append(bitmask)
        pasts.append(stream[:done].T.tolist())

    free = work.guard(10, "halt").session(batch)
    for slot in range(batch):
        free.reset(slot)
    if masked == 0 and num_literals >= 1_000 and batch > 1:
        raise AssertionError("no token is masked in any row: nothing is measured")
    contestants = {
        KERNEL: Contestant(lambda k: calls[k % SNAPSHOTS]()),
        SESSION: Contestant(
            lambda k: sessions[k % SNAPSHOTS].apply_mask(logits, slots, slots, last)
        ),
        ENGINE: Contestant(lambda k: row_guards[k % SNAPSHOTS].mask(logits, slot_list, slot_list)),
        NO_RULES: Contestant(lambda k: free.apply_mask(logits, slots, slots, last)),
        XGRAMMAR: Contestant(
            lambda k: xgrammar.apply_token_bitmask_inplace(tensor, bitmasks[k % SNAPSHOTS])
        ),
    }
    share = _BAD_WORDS_SHARE[num_literals]
    if share is not None:
        apply_bad_words, words = _bad_words(num_literals, kind)
        by_row = dict.fromkeys(range(batch), words)
        contestants[BAD_WORDS] = Contestant(
            lambda k: apply_bad_words(tensor, by_row, pasts[k % SNAPSHOTS]), share
        )
    masked_per_row = masked / (SNAPSHOTS * batch)
    return Case(contestants, build_seconds, masked_per_row, STEPS[batch])


def bitmask_of(forbidden: NDArray[np.bool_]) -> torch.Tensor:
    """What xgrammar takes for bool[batch, num_tokens]."""
    batch, num_tokens = forbidden.shape
    bitmask = xgrammar.allocate_token_bitmask(batch, num_tokens)
    bits = np.ones((batch, bitmask.shape[1] * 32), np.uint8)
    bits[:, :num_tokens] = ~forbidden
    bitmask.copy_(torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32)))
    return bitmask


def _bad_words(num_literals: int, kind: str) -> tuple[Callable[..., None], list[list[int]]]:
    """vLLM's function, and the token sequences that vLLM makes of the literals.

    Each literal gives two sequences, with and without a space before it. vLLM 0.32 refuses more than
    128 sequences a request, so they are made in portions.
    """
    from streamguard.vllm_plugin.register import register

    register()  # with its cure for llvmlite vLLM can be imported after numba
    from vllm import SamplingParams
    from vllm.tokenizers import get_tokenizer
    from vllm.v1.sample.ops.bad_words import apply_bad_words

    tokenizer = get_tokenizer(str(demo_model()))
    chosen = list(literals(num_literals, kind))
    portions = [
        SamplingParams(bad_words=chosen[at : at + _PORTION])
        for at in range(0, num_literals, _PORTION)
    ]
    for params in portions:
        params.update_from_tokenizer(tokenizer)
    sequences = [ids for params in portions for ids in params.bad_words_token_ids or []]
    return apply_bad_words, sequences


def measure(
    num_literals: int, batch: int, kind: str, num_rounds: int
) -> tuple[Case, dict[str, Timing]]:
    """Time one case; seconds per apply of the whole batch."""
    prepared = prepare(num_literals, batch, kind)
    timings = interleave(
        prepared.contestants,
        num_steps=prepared.num_steps,
        units_per_step=1,
        steps_per_reading=max(16, 64 // batch),
        num_rounds=num_rounds,
    )
    return prepared, timings


def cases() -> list[tuple[int, int, str]]:
    """(literals, batch, kind of list) of every case."""
    every = [(n, b, kind) for kind in LITERALS for n in LITERALS[kind] for b in BATCHES]
    return [case for case in every if case[0] < 100_000 or case[1] == max(BATCHES)]


def bench(quick: bool, on_case: Callable[[str], None]) -> Results:
    """All cases. on_case is told what was finished."""
    results = Results()
    built: dict[tuple[int, str], str] = {}
    for num_literals, batch, kind in cases():
        prepared, t = measure(num_literals, batch, kind, 3 if quick else 9)
        of = "" if kind == ORDINARY else f" with {kind}"
        built[num_literals, kind] = (
            f"{num_literals:,} literals{of}: {prepared.build_seconds:.3f} s, "
            f"{prepared.masked_per_row:.1f} tokens masked a row"
        )

        def compare(
            ours: str, peer: str, peer_does: str, t: dict[str, Timing] = t,
            num_literals: int = num_literals, batch: int = batch, of: str = of,
        ) -> Ratio:  # fmt: skip
            question = f"{ours}{of}: × faster than {peer_does}"
            ratio = Ratio.of(t[peer].rounds, t[ours].rounds)
            p99 = t[peer].p99 / t[ours].p99
            value = t[ours].median * 1e6
            results.cells.append(Cell(ROOM, question, num_literals, batch, value, "µs", ratio, p99))
            return ratio

        ratio = compare(SESSION, XGRAMMAR, "xgrammar's apply")
        where = f"batch {batch}, {num_literals:,} literals"
        asked = batch == max(BATCHES) and kind == ORDINARY
        if asked and num_literals in _REQUIRED:
            required = _REQUIRED[num_literals]
            results.bars.append(Bar(f"{SESSION} against xgrammar, {where}", required, ratio))
        if BAD_WORDS in t:
            ratio = compare(SESSION, BAD_WORDS, "vLLM's bad_words")
            if asked and num_literals == 1_000:
                results.bars.append(Bar(f"{SESSION} against bad_words, {where}", 5_000, ratio))
        if kind == ORDINARY:
            compare(KERNEL, XGRAMMAR, "xgrammar's apply")
            compare(ENGINE, XGRAMMAR, "xgrammar's apply")
        absolute = [(f"{SESSION}{of}, a batch", num_literals, t[SESSION])]
        if num_literals == LITERALS[ORDINARY][0]:
            absolute.append((f"{NO_RULES}, a batch", 0, t[NO_RULES]))
        for question, n, timing in absolute:
            results.cells.append(Cell(ROOM, question, n, batch, timing.median * 1e6, "µs"))
        on_case(f"{num_literals:,} literals, batch {batch}, {kind}")
    results.facts["compiling with look-ahead, CPU seconds"] = "; ".join(built.values())
    return results


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_literals", "batch", "kind"), cases())
def test_mask_a_batch_of_logits(
    benchmark: Any, num_literals: int, batch: int, kind: str, name: str
) -> None:
    benchmark.group = f"lookahead: {num_literals} literals ({kind}), batch {batch}"
    prepared = prepare(num_literals, batch, kind)
    if name not in prepared.contestants:
        pytest.skip("takes seconds a step")
    share = prepared.contestants[name].share
    benchmark.extra_info["applies"] = max(1, int(prepared.num_steps * share))
    benchmark.pedantic(prepared.run, args=(name,), rounds=3, warmup_rounds=1)
