"""What does it cost to filter one more token of a text that streams past, without an engine?

Ours: `TextStream.feed` once a token of 4 to 5 bytes, `finish` at the end. The reference is what is
mostly written by hand: `re.search` of all patterns in one alternation over the last 64 characters,
once a token. It finds phrases and keys that fit into its window; it does not hold back what a match
may begin with, so that it has shown most of a match when it fires, and it forgets what is longer.

CPU time of one thread, answers that hold no match (a stream that is ended costs nothing any more),
at three lengths, since the cost of a token must not grow with the answer. Before anything is timed,
both must find the same answers among some with a phrase or a key planted, and the stream must show
the others unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import pytest

from benchmarks.measure import Contestant, Ratio, Timing, interleave
from benchmarks.report import Bar, Cell, Results
from benchmarks.workload import literals, sentences
from streamguard import Guard, Policy

ROOM = "text_stream"
LENGTHS = (100, 1_000, 10_000)
NUM_PHRASES = 40
NOTHING, PHRASES, PACKS, BOTH = "no rules", "40 phrases", "pii + secrets", "phrases + packs"
KINDS = (NOTHING, PHRASES, PACKS, BOTH)
OURS, REFERENCE = "TextStream.feed", "re.search over the last 64 characters"
NAMES = (OURS, REFERENCE)
_WINDOW = 64
#: Made up, of the shape that the packs look for; each fits into the window.
_PLANTED = (
    "alice@example.com", "AKIA" + "Z7" * 8, "192.0.2.17", "4111 1111 1111 1111", "ghp_" + "aB3" * 12,
)  # fmt: skip
_ANSWERS = 60


def policy(kind: str) -> Policy:
    """The rules of one kind; one that matches nothing if there are to be none."""
    phrases = {
        "id": "phrases",
        "literals": list(literals(NUM_PHRASES)) if kind in (PHRASES, BOTH) else ["\u2603 nothing"],
        "normalize": ["case"],
        "action": "halt",
    }
    content: dict[str, Any] = {"version": 1, "name": "bench", "rules": [phrases]}
    if kind in (PACKS, BOTH):
        content["extends"] = ["pii", "secrets"]
    return Policy.from_dict(content)


def by_hand(chosen: Policy) -> re.Pattern[str]:
    """All acting patterns of a policy as one regex of Python."""
    parts = []
    for rule in chosen.rules:
        if rule.action == "observe":
            continue
        for pattern in (*map(re.escape, rule.literals), *rule.regexes):
            flags = "(?i:" if "case" in rule.normalize else "(?:"
            part = f"{flags}{pattern})"
            parts.append(rf"(?<!\w){part}(?!\w)" if rule.boundary == "word" else part)
    return re.compile("|".join(parts))


@lru_cache(maxsize=1)
def text() -> str:
    """English prose without one of the phrases."""
    spoilt = by_hand(policy(PHRASES))
    return "".join(islice((s for s in sentences() if not spoilt.search(s)), 5_000))


def tokens(written: str) -> list[str]:
    """About what a tokenizer makes of it: words with the space before them, cut after 6 letters."""
    return re.findall(r" ?\w{1,6}|\W", written)


def answers(kind: str) -> Iterator[tuple[list[str], bool]]:
    """Tokens of short answers, and whether something is planted there that the rules look for."""
    all_tokens = tokens(text())
    phrases = literals(NUM_PHRASES)
    for i in range(_ANSWERS):
        answer = "".join(all_tokens[i * 50 : i * 50 + 50])
        planted = ""
        if i % 3 == 1 and kind in (PHRASES, BOTH):
            planted = phrases[i % NUM_PHRASES]
        if i % 3 == 2 and kind in (PACKS, BOTH):
            planted = _PLANTED[i % len(_PLANTED)]
        if planted:
            answer = f"{answer} {planted} {answer}"
        yield tokens(answer), bool(planted)


def agree(kind: str, guard: Guard, pattern: re.Pattern[str]) -> None:
    """Both find the planted answers and no others; the others come out unchanged."""
    for answer, planted in answers(kind):
        stream = guard.text_stream()
        shown = "".join([*map(stream.feed, answer), str(stream.finish())])
        written, tail, found = "".join(answer), "", False
        for token in answer:
            tail = (tail + token)[-_WINDOW:]
            found = found or pattern.search(tail) is not None
        assert found == planted == (shown != written), (kind, written, shown)


@dataclass(frozen=True)
class Prepared:
    """One case: its contestants, and how many answers make a step."""

    contestants: dict[str, Contestant]
    length: int


@lru_cache(maxsize=4)
def _matchers(kind: str) -> tuple[Guard, re.Pattern[str]]:
    guard, pattern = Guard(policy(kind)), by_hand(policy(kind))
    agree(kind, guard, pattern)
    return guard, pattern


def prepare(kind: str, length: int) -> Prepared:
    """Contestants that read one answer of `length` tokens a step."""
    guard, pattern = _matchers(kind)
    all_tokens = tokens(text())
    assert len(all_tokens) >= 2 * length

    def answer(k: int) -> list[str]:
        at = (k * length) % (len(all_tokens) - length)
        return all_tokens[at : at + length]

    def ours(k: int) -> None:
        stream = guard.text_stream()
        for token in answer(k):
            stream.feed(token)
        stream.finish()
        assert stream.verdict is None

    def reference(k: int) -> None:
        tail = ""
        for token in answer(k):
            tail = (tail + token)[-_WINDOW:]
            if pattern.search(tail):
                raise AssertionError(tail)

    return Prepared({OURS: Contestant(ours), REFERENCE: Contestant(reference)}, length)


def measure(kind: str, length: int, num_rounds: int) -> dict[str, Timing]:
    """Time one case; seconds per token."""
    return interleave(
        prepare(kind, length).contestants,
        num_steps=max(1, 2_000 // length),
        units_per_step=length,
        steps_per_reading=1,
        num_rounds=num_rounds,
    )


def cases() -> list[tuple[str, int]]:
    """(kind of rules, tokens of an answer) of every case."""
    return [(kind, length) for kind in KINDS for length in LENGTHS]


def bench(quick: bool, on_case: Callable[[str], None]) -> Results:
    """All cases. on_case is told what was finished."""
    results = Results()
    for kind, length in cases():
        t = measure(kind, length, 2 if quick else 7)
        patterns = {NOTHING: 0, PHRASES: NUM_PHRASES}.get(kind) or policy(kind).num_patterns
        if kind == NOTHING:
            patterns = 0
        of = f"{kind}, {length:,} tokens"
        micros = t[OURS].median * 1e6
        results.cells.append(Cell(ROOM, f"{of}: a token", patterns, 1, micros, "µs"))
        if kind != NOTHING:
            ratio = Ratio.of(t[REFERENCE].rounds, t[OURS].rounds)
            p99 = t[REFERENCE].p99 / t[OURS].p99
            question = f"{of}: × faster than {REFERENCE}"
            results.cells.append(Cell(ROOM, question, patterns, 1, micros, "µs", ratio, p99))
        if (kind, length) == (BOTH, LENGTHS[-1]):
            microseconds = Ratio.of(t[OURS].rounds * 0 + 10e-6, t[OURS].rounds)
            results.bars.append(Bar("text stream: 10 µs a token by ours, " + of, 1, microseconds))
        on_case(of)
    return results


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "length"), cases())
def test_filter_an_answer(benchmark: Any, kind: str, length: int, name: str) -> None:
    benchmark.group = f"text_stream: {kind}, {length} tokens"
    step = prepare(kind, length).contestants[name].step
    benchmark.extra_info["tokens"] = length
    benchmark.pedantic(step, args=(0,), rounds=3, warmup_rounds=1)
