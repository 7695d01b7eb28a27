"""Do larger vocabularies cost more? 49k, 128k and 262k entries, `advance` and `apply_mask` at batch 256.

The larger vocabularies are made from SmolLM2's, the way a larger BPE comes about: neighbouring tokens
of a word become one token (`larger_vocabulary`), and the text is tokenized greedily by the longest
entry. Most of the new entries never occur in the text, as most of a real vocabulary of that size does
not. Peers as in the rooms `advance` and `lookahead`, over the same tokens, with the same checks; vLLM's
bad_words is left out, because its cost does not depend on the vocabulary. Logits are
float32[256, vocabulary].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
import xgrammar
from numpy.typing import NDArray

from benchmarks.bench_lookahead import bitmask_of, brute_force
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
from benchmarks.report import Cell, Results
from benchmarks.workload import ORDINARY, Workload, policy, sentences, shared, stretches
from streamguard import Guard
from streamguard.compiler.vocabulary import Vocabulary

ROOM = "vocabularies"
SIZES = (49_152, 128_256, 262_144)
LITERALS = (1_000, 10_000)
BATCH, STEPS = 256, 400
MASK_STEPS, SNAPSHOTS = 32, 4
_LEAD, _APART = 40, 7
ADVANCE, MASK, XGRAMMAR = "Session.advance", "Session.apply_mask", "xgrammar"
_NUM_SENTENCES = 4_000
_MOST_BYTES = 24


def larger_vocabulary(base: Vocabulary, size: int, tokens: NDArray[np.int64]) -> Vocabulary:
    """The vocabulary with joined tokens behind its own, `size` entries in all.

    First the neighbours within a word of a text, the most frequent first; then each of the word
    beginnings that BPE merged first with each of such continuations, in an order that takes from the
    heads of both. Raises ValueError if these do not suffice.
    """
    entries = list(base.token_bytes)
    known = set(entries)

    def goes_on(piece: bytes) -> bool:
        return piece.isalpha() and piece.islower()

    pairs = Counter(pairwise(tokens.tolist()))
    joined = [
        entries[a] + entries[b]
        for (a, b), _ in sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
        if goes_on(entries[b]) and entries[a].strip().isalpha()
    ]
    ordinary = [piece for piece, special in zip(entries, base.special, strict=True) if not special]
    begins = [p for p in ordinary if p[:1] == b" " and len(p) > 2 and goes_on(p[1:])][:4_000]
    more = [p for p in ordinary if len(p) > 1 and goes_on(p)][:4_000]
    for together in range(len(begins) + len(more)):
        if len(joined) > 2 * size:
            break
        low = max(0, together - len(more) + 1)
        joined += [
            begins[i] + more[together - i] for i in range(low, min(together + 1, len(begins)))
        ]
    for piece in joined:
        if len(entries) >= size:
            break
        if piece not in known and len(piece) <= _MOST_BYTES:
            known.add(piece)
            entries.append(piece)
    if len(entries) < size:
        raise ValueError(f"only {len(entries):,} of {size:,} entries could be made")
    special = np.zeros(size, np.uint8)
    special[: len(base)] = base.special
    return Vocabulary(tuple(entries), special, base.eos_token_ids, base.spare)


def greedy_tokens(vocabulary: Vocabulary, text: bytes) -> NDArray[np.int64]:
    """int64[num_tokens]: at each place the longest entry that is no special token."""
    ids: dict[bytes, int] = {}
    for i, piece in enumerate(vocabulary.token_bytes):
        if piece and not vocabulary.special[i]:
            ids.setdefault(piece, i)
    longest = max(map(len, ids))
    found, at = [], 0
    while at < len(text):
        size = min(longest, len(text) - at)
        while (token := ids.get(text[at : at + size])) is None:
            size -= 1
        found.append(token)
        at += size
    return np.array(found, np.int64)


@lru_cache(maxsize=3)
def sized(size: int) -> tuple[Vocabulary, NDArray[np.int64]]:
    """A vocabulary of that size and the tokens of the text in it."""
    work = shared()
    base = work.vocabulary
    text = "".join(islice(sentences(), _NUM_SENTENCES)).encode()
    chosen = base if size == len(base) else larger_vocabulary(base, size, work.tokens)
    return chosen, greedy_tokens(chosen, text)


@dataclass(frozen=True)
class Case:
    """The contestants of one question over one vocabulary, proven to agree."""

    contestants: dict[str, Contestant]
    num_steps: int
    units_per_step: int

    def run(self, name: str) -> None:
        """All steps once."""
        for k in range(self.num_steps):
            self.contestants[name].step(k)


@lru_cache(maxsize=1)
def prepare_advance(size: int, num_literals: int) -> Case:
    """Follow a token: ours and the matchers."""
    vocabulary, tokens = sized(size)
    stream = stretches(tokens, BATCH, STEPS)
    rows_of_bytes, rows_of_text = Workload(None, vocabulary).token_pieces(stream)
    hs = Hyperscan(compiled_hyperscan(num_literals, ORDINARY, False)[0], BATCH)
    ac = PyAhocorasick(compiled_pyahocorasick(num_literals, ORDINARY, False)[0], BATCH)
    session = fresh_session(Guard(policy(num_literals, "halt"), vocabulary), BATCH)
    hits = session_hits(session, stream)
    assert_same(HYPERSCAN, hits, hs.hits(rows_of_bytes))
    assert_same(PYAHOCORASICK, hits, ac.hits(rows_of_text))
    slots, rows = np.arange(BATCH), list(stream)
    contestants = {
        ADVANCE: Contestant(lambda k: session.advance(slots, rows[k])),
        HYPERSCAN: Contestant(lambda k: hs.feed(rows_of_bytes[k])),
        PYAHOCORASICK: Contestant(lambda k: ac.feed(rows_of_text[k])),
    }
    return Case(contestants, STEPS, BATCH)


@lru_cache(maxsize=1)
def prepare_mask(size: int, num_literals: int) -> Case:
    """Forbid the tokens that complete a match: ours and xgrammar's bitmask of the same tokens."""
    vocabulary, tokens = sized(size)
    guard = Guard(policy(num_literals, "mask"), vocabulary)
    stream = stretches(tokens, BATCH, _LEAD + _APART * SNAPSHOTS)
    slots, last = np.arange(BATCH), np.zeros(BATCH, bool)
    logits = np.zeros((BATCH, size), np.float32)
    tensor = torch.from_numpy(logits)
    sessions, bitmasks = [], []
    for snapshot in range(SNAPSHOTS):
        session = fresh_session(guard, BATCH)
        for row in stream[: _LEAD + _APART * snapshot]:
            session.advance(slots, row)
        logits[:] = 0
        session.apply_mask(logits, slots, slots, last)
        forbidden = np.isneginf(logits)
        for row in (0, BATCH // 3, BATCH - 1):
            if not np.array_equal(np.flatnonzero(forbidden[row]), brute_force(session, row)):
                raise AssertionError(f"row {row}: masked tokens differ from brute force")
        bitmask = bitmask_of(forbidden)
        logits[:] = 0
        xgrammar.apply_token_bitmask_inplace(tensor, bitmask)
        if not np.array_equal(np.isneginf(logits), forbidden):
            raise AssertionError("xgrammar masked other tokens")
        sessions.append(session)
        bitmasks.append(bitmask)
    contestants = {
        MASK: Contestant(lambda k: sessions[k % SNAPSHOTS].apply_mask(logits, slots, slots, last)),
        XGRAMMAR: Contestant(
            lambda k: xgrammar.apply_token_bitmask_inplace(tensor, bitmasks[k % SNAPSHOTS])
        ),
    }
    return Case(contestants, MASK_STEPS, 1)


#: Ours -> how it is prepared, the peers, a second in the unit of its costs.
_QUESTIONS: dict[str, tuple[Callable[[int, int], Case], tuple[str, ...], float, str]] = {
    ADVANCE: (prepare_advance, (HYPERSCAN, PYAHOCORASICK), 1e9, "ns"),
    MASK: (prepare_mask, (XGRAMMAR,), 1e6, "µs"),
}


def measure(ours: str, size: int, num_literals: int, num_rounds: int) -> dict[str, Timing]:
    """Time one case; seconds per token, or per apply of the whole batch."""
    prepared = _QUESTIONS[ours][0](size, num_literals)
    return interleave(
        prepared.contestants,
        num_steps=prepared.num_steps,
        units_per_step=prepared.units_per_step,
        steps_per_reading=16,
        num_rounds=num_rounds,
    )


def cases() -> list[tuple[str, int, int]]:
    """(ours, entries, literals) of every case."""
    return [(ours, size, n) for size in SIZES for ours in _QUESTIONS for n in LITERALS]


def bench(quick: bool, on_case: Callable[[str], None]) -> Results:
    """All cases. on_case is told what was finished."""
    results = Results()
    for ours, size, num_literals in cases():
        t = measure(ours, size, num_literals, 3 if quick else 9)
        _, peers, per_second, unit = _QUESTIONS[ours]
        value = t[ours].median * per_second
        for peer in peers:
            ratio = Ratio.of(t[peer].rounds, t[ours].rounds)
            p99 = t[peer].p99 / t[ours].p99
            question = f"{ours}, {size:,} entries: × faster than {peer}"
            results.cells.append(Cell(ROOM, question, num_literals, BATCH, value, unit, ratio, p99))
        per = "a token" if ours == ADVANCE else "a batch"
        question = f"{ours}, {size:,} entries, {per}"
        results.cells.append(Cell(ROOM, question, num_literals, BATCH, value, unit))
        on_case(f"{ours}, {size:,} entries, {num_literals:,} literals")
    results.facts["vocabularies, bytes a token of the text"] = ", ".join(
        f"{size:,} entries {_bytes_per_token(size):.2f}" for size in SIZES
    )
    return results


def _bytes_per_token(size: int) -> float:
    vocabulary, tokens = sized(size)
    return float(np.diff(vocabulary.offsets)[tokens].mean())


@pytest.mark.parametrize(("ours", "size", "num_literals"), cases())
def test_larger_vocabularies(benchmark: Any, ours: str, size: int, num_literals: int) -> None:
    benchmark.group = f"vocabularies: {ours}, {size} entries, {num_literals} literals"
    prepared = _QUESTIONS[ours][0](size, num_literals)
    benchmark.pedantic(partial(prepared.run, ours), rounds=5, warmup_rounds=1)
