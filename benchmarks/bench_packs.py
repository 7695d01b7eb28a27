"""What do the rule packs cost when a token is followed, against the same regexes in hyperscan?

A policy that extends `pii` and `secrets` at batch 256, 32 and 1, against one hyperscan database in
streaming mode of the same regexes and literals. The text is English prose with numbers, dates and
addresses in it, and examples of keys and personal data planted (all made up).

What is compared before timing: of every text and rule, the tokens at which the engine reports the rule.
Both report a match that needs the character behind it (`\\b` at the end) with the token that brings
that character, so nothing has to be shifted. hyperscan is given the regexes as they stand and reads
bytes (no UTF8 and UCP flags: those make it slower, know no \\b, and change nothing in ASCII text); it
reports every end of a match, as we do. Rules that compute a checksum (`validate`) are left out on both
sides, since hyperscan has none.

Each round reads on in a text that goes on, with other digits each time: what walks the engine remembers
it has met in other text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

import numpy as np
import pytest

from benchmarks.measure import Contestant, Ratio, Timing, interleave, seconds
from benchmarks.peers import (
    HYPERSCAN,
    Hyperscan,
    assert_same,
    fresh_session,
    hyperscan_database,
    session_hits,
)
from benchmarks.replay import captured, substituted
from benchmarks.report import Bar, Cell, Results
from benchmarks.workload import sentences, shared, stretches
from streamguard import Guard, Policy
from streamguard.session import Session

ROOM = "packs"
PACKS = ("pii", "secrets")
STEPS = {1: 8_000, 32: 1_600, 256: 400}
#: Rounds with the one that warms up; then the text begins again.
LAPS = 16
KERNEL, SESSION = "its kernel alone", "Session.advance"
NAMES = (KERNEL, SESSION, HYPERSCAN)
_REQUIRED = 12
#: Put together here, so that no scanner of repositories takes them for real.
_FILLING = "Ab3Cd5Ef7Gh9Jk2Lm4Np6"
_PLANTED = (
    "jane.doe@mail.example.org", "+1 415 555 0123 99", "(212) 555-0123", "212-555-0123",
    "DE89 3702 0044 0532 0130 00", "4111 1111 1111 1111", "5500000000000004", "8.34.208.77",
    "2001:db8:1:2:3:4:5:6", "123-45-6789", "AB 12 34 56 C", "12345678Z", "123.456.789-09",
    "-----BEGIN RSA PRIVATE KEY-----", "AGE-SECRET-KEY-" + "1QQPQ", "AK" + "IAQ2W3E4R5Q2W3E4R5",
    "gh" + "p_" + _FILLING * 2, "gl" + "pat-" + _FILLING, "AI" + "za" + _FILLING * 2,
    "sk" + "_live_" + _FILLING, "sk" + "-proj-" + _FILLING * 3, "hf" + "_" + _FILLING * 2,
    "npm" + "_" + _FILLING * 2, "postgres://app:hunter" + "22@db.example.org/app",
    'password = "correct-horse' + '-battery"', "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjMifQ." + _FILLING,
)  # fmt: skip
#: What ordinary text holds and no rule takes.
_PASSING = (
    "on 14 October 1066", "version 3.12.4", "at 12:30:45", "10,501,000 people", "2024-01-15",
    "user@host", "port 5432", "127.0.0.1", "ISBN 978-3-16-148410-0", "pages 100-200", "AB12 CD34",
    "order 12345678901", "sk-learn", "the API_KEY", "redis://cache:6379/0", "299 792 458 m/s",
)  # fmt: skip


def text(num_sentences: int) -> str:
    """Prose; every 6th sentence ends with something that mostly passes, every 30th mostly with a match.

    Digits are drawn anew in every other one.
    """
    rng = random.Random(6)
    parts = []
    for sentence in islice(sentences(), num_sentences):
        draw = rng.randrange(30)
        if draw < 6:
            ending = rng.choice(_PLANTED if draw == 0 else _PASSING)
            if rng.random() < 0.5:
                ending = re.sub(r"\d", lambda _: str(rng.randrange(10)), ending)
            sentence = f"{sentence[:-2]}, {ending}. "
        parts.append(sentence)
    return "".join(parts)


def policy() -> Policy:
    """The packs without rules that compute a checksum."""
    extended = Policy.from_dict({"version": 1, "name": "bench", "extends": list(PACKS)})
    kept = tuple(rule for rule in extended.rules if not getattr(rule, "validate", None))
    return replace(extended, rules=kept)


def expressions(of: Policy) -> tuple[list[str], list[int]]:
    """All regexes, literals as such, and the index of the rule of each."""
    found = [
        (expression, i)
        for i, rule in enumerate(of.rules)
        for expression in (*map(re.escape, rule.literals), *rule.regexes)
    ]
    return [expression for expression, _ in found], [i for _, i in found]


@dataclass(frozen=True)
class Case:
    """The contestants over one token stream, proven to agree."""

    contestants: dict[str, Contestant]
    facts: str
    num_steps: int
    keep: tuple[Session, ...]

    def run(self, name: str) -> None:
        """One pass over the stream."""
        for k in range(self.num_steps):
            self.contestants[name].step(k)


@lru_cache(maxsize=1)
def _compiled() -> tuple[Guard, Any, list[int], str]:
    chosen = policy()
    regexes, rules = expressions(chosen)
    guards: list[Guard] = []
    databases: list[Any] = []
    ours = seconds(lambda: guards.append(Guard(chosen, shared().vocabulary)))
    theirs = seconds(lambda: databases.append(hyperscan_database(regexes, 0, literal=False)))
    program = guards[0].program
    facts = (
        f"{len(chosen.rules)} rules, {len(regexes)} expressions, {program.max_tracks} tracks, "
        f"{program.size_bytes / 1e6:.1f} MB; compile {ours:.2f} s ({HYPERSCAN} {theirs:.2f} s)"
    )
    return guards[0], databases[0], rules, facts


@lru_cache(maxsize=3)
def prepare(batch: int) -> Case:
    """Build the contestants, and check that both see the same rules at the same tokens."""
    work = shared()
    num_steps = STEPS[batch] * LAPS
    tokens = work.tokenizer.encode(text(batch * num_steps // 15), add_special_tokens=False)
    stream = stretches(np.array(tokens, np.int64), batch, num_steps)
    rows_of_bytes, _ = work.token_pieces(stream)
    guard, database, rules, facts = _compiled()
    hs = Hyperscan(database, batch, rules.__getitem__)
    session, inner = fresh_session(guard, batch), fresh_session(guard, batch)
    hits = session_hits(session, stream)
    assert_same(HYPERSCAN, hits, hs.hits(rows_of_bytes))

    slots, rows = np.arange(batch), list(stream)
    kernel, arguments = captured("walk_kernel", lambda: inner.advance(slots, rows[0]))
    calls = [substituted(arguments, rows[0], row) for row in rows]
    # Each of its own: a contestant's rounds follow one another.
    at = {name: cycle(range(num_steps)) for name in NAMES}
    contestants = {
        KERNEL: Contestant(lambda _: kernel(*calls[next(at[KERNEL])])),
        SESSION: Contestant(lambda _: session.advance(slots, rows[next(at[SESSION])])),
        HYPERSCAN: Contestant(lambda _: hs.feed(rows_of_bytes[next(at[HYPERSCAN])])),
    }
    num_rules = len({rule for _, _, rule in hits})
    facts += f"; {len(hits):,} hits of {num_rules} rules in {batch * num_steps:,} tokens"
    return Case(contestants, facts, STEPS[batch], (inner,))


def measure(batch: int, num_rounds: int) -> tuple[Case, dict[str, Timing]]:
    """Time one case; seconds per token."""
    prepared = prepare(batch)
    timings = interleave(
        prepared.contestants,
        num_steps=prepared.num_steps,
        units_per_step=batch,
        num_rounds=num_rounds,
    )
    return prepared, timings


def bench(quick: bool, on_case: Callable[[str], None]) -> Results:
    """All batch sizes. on_case is told what was finished."""
    results = Results()
    num_patterns = len(expressions(policy())[0])
    for batch in STEPS:
        prepared, t = measure(batch, 5 if quick else 15)
        for ours in (SESSION, KERNEL):
            ratio = Ratio.of(t[HYPERSCAN].rounds, t[ours].rounds)
            p99 = t[HYPERSCAN].p99 / t[ours].p99
            value = t[ours].median * 1e9
            question = f"{ours}, {' + '.join(PACKS)}: × faster than {HYPERSCAN}"
            results.cells.append(Cell(ROOM, question, num_patterns, batch, value, "ns", ratio, p99))
            if ours == SESSION and batch == max(STEPS):
                name = f"{SESSION} with {' + '.join(PACKS)} against {HYPERSCAN}, batch {batch}"
                results.bars.append(Bar(name, _REQUIRED, ratio))
        question = f"{SESSION}, {' + '.join(PACKS)}, a token"
        results.cells.append(
            Cell(ROOM, question, num_patterns, batch, t[SESSION].median * 1e9, "ns")
        )
        results.facts[ROOM] = prepared.facts
        on_case(f"batch {batch}")
    return results


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", STEPS)
def test_advance_with_rule_packs(benchmark: Any, batch: int, name: str) -> None:
    benchmark.group = f"packs: {' + '.join(PACKS)}, batch {batch}"
    benchmark.extra_info["tokens"] = STEPS[batch] * batch
    benchmark.pedantic(prepare(batch).run, args=(name,), rounds=5, warmup_rounds=1)
