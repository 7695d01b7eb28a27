"""Scanning text, against pyahocorasick and a plain search; chunks must not matter."""

from __future__ import annotations

import random

import ahocorasick
import pytest
from guard_cases import (
    ODD,
    characters_of,
    matches,
    policy,
    program,
    random_rules,
    random_text,
    rule,
)
from hypothesis import given
from hypothesis import strategies as st

from streamguard.compiler.program import Program
from streamguard.policy import NORMAL_FORMS, Policy
from streamguard.scanner import Match, Scanner

pytestmark = pytest.mark.usefixtures("layout")

LITERALS = (
    "bomb", "omb", "b", "bob", "o b", "ss", "straße", "i\u0307", "k", "ﬁ", "e\u0301", "中文", "😀b",
    "-b", "- -", "\u0301", " ", "bo mb", "1.0", "Sſ", "kill him", "b o", "b.o-m", "1l", "vіа", "Νο", "m",
)  # fmt: skip
#: One broken sequence of each kind, each a single U+FFFD.
BROKEN = (b"\xff", b"\x80", b"\xc3", b"\xe4\xbd", b"\xf0\x9f\x98", b"\xc0")


def scan(compiled: Program, data: bytes, sizes: list[int] | None = None) -> list[Match]:
    """All matches of `data` fed in chunks of the given sizes, the last one repeated."""
    scanner = Scanner(compiled)
    found: list[Match] = []
    at = 0
    for size in sizes or [len(data) or 1]:
        found += scanner.feed(data[at : at + size])
        at += size
    while at < len(data):
        found += scanner.feed(data[at : at + size])
        at += size
    return [*found, *scanner.finish()]


def reference_scan(one: Policy, data: bytes) -> list[Match]:
    """The same by plain search of the decoded text, places turned back into raw bytes."""
    characters = characters_of(data)
    text, offsets = "".join(c for c, _ in characters), [0, *(end for _, end in characters)]
    found = [m for i, what in enumerate(one.rules) for m in matches(text, what, i)]
    return sorted(Match(index, offsets[start], offsets[end]) for end, index, start in found)


def ahocorasick_scan(literals: list[list[bytes]], data: bytes) -> list[Match]:
    automaton = ahocorasick.Automaton()
    owners: dict[bytes, list[int]] = {}
    for index, patterns in enumerate(literals):
        for pattern in patterns:
            owners.setdefault(pattern, []).append(index)
    for pattern, indices in owners.items():
        automaton.add_word(pattern.decode("latin-1"), (len(pattern), indices))
    automaton.make_automaton()
    starts: dict[tuple[int, int], int] = {}
    for last, (length, indices) in automaton.iter(data.decode("latin-1")):
        for index in indices:
            start = last + 1 - length
            starts[index, last + 1] = min(start, starts.get((index, last + 1), start))
    return sorted(Match(index, start, end) for (index, end), start in starts.items())


def random_data(rng: random.Random, num_parts: int) -> bytes:
    parts = []
    for _ in range(num_parts):
        kind = rng.random()
        if kind < 0.5:
            parts.append(rng.choice(LITERALS).encode())
        elif kind < 0.9:
            parts.append(random_text(rng, ODD, 4).encode())
        else:
            parts.append(rng.choice(BROKEN))
    return b"".join(parts)


texts = st.lists(
    st.one_of(
        st.sampled_from(LITERALS).map(str.encode), st.text(ODD, max_size=4).map(str.encode),
        st.sampled_from(BROKEN), st.binary(max_size=3),
    )
).map(b"".join)  # fmt: skip
ALL_KINDS = policy(
    rule("halt", "bomb", "中文", "ss", "omb"),
    rule("mask", "Bomb", "straße", "s", case=True),
    rule("redirect", "bomb", "- b", "😀b", "b", word=True),
    rule("observe", "k", "İ", "o b", "ﬁ", "b", case=True, word=True),
    rule("halt", "bo m", "1l", forms=NORMAL_FORMS, word=True),
    rule("mask", "o b", "m", forms=("separators", "zero-width")),
)
ALL_KINDS_PROGRAM = program(ALL_KINDS)


@given(texts)
def test_matches_equal_a_plain_search_with_their_places(data: bytes) -> None:
    assert sorted(scan(ALL_KINDS_PROGRAM, data)) == reference_scan(ALL_KINDS, data)


def test_matches_equal_a_plain_search_for_random_policies(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(80):
        one = policy(*random_rules(rng, LITERALS, rng.randint(1, 5)))
        data = random_data(rng, 30)
        assert sorted(scan(program(one), data)) == reference_scan(one, data), data


@given(texts, st.lists(st.integers(1, 9), min_size=1))
def test_chunks_change_neither_matches_nor_their_order(data: bytes, sizes: list[int]) -> None:
    assert scan(ALL_KINDS_PROGRAM, data, sizes) == scan(ALL_KINDS_PROGRAM, data)


def test_every_chunk_size_gives_the_same_list(seed: int) -> None:
    data = random_data(random.Random(seed), 40)
    whole = scan(ALL_KINDS_PROGRAM, data)
    assert whole
    for size in range(1, len(data) + 2):
        assert scan(ALL_KINDS_PROGRAM, data, [size]) == whole, size


@pytest.mark.parametrize("num_patterns", [1, 30, 3000])
def test_raw_rules_agree_with_pyahocorasick_hit_for_hit(num_patterns: int, seed: int) -> None:
    rng = random.Random(f"{seed} {num_patterns}")
    data = random_data(rng, 3000) + rng.randbytes(500)
    whole = data.decode(errors="ignore")
    patterns = [random_text(rng, ODD, 5) for _ in range(num_patterns)]
    patterns += [whole[at : at + rng.randint(1, 300)] for at in rng.sample(range(3000), 5)]
    shares = [list(dict.fromkeys(patterns[i::3])) for i in range(3)]
    shares[1] += [p for p in shares[0][:3] if p not in shares[1]]  # two rules, one pattern
    rules = [rule("halt", *share) for share in shares if share]
    compiled = program(policy(*rules))
    expected = ahocorasick_scan([[p.encode() for p in r["literals"]] for r in rules], data)
    for size in (len(data), 1, 7, 4096):
        found = scan(compiled, data, [size])
        assert sorted(found) == expected
        assert [m.end for m in found] == sorted(m.end for m in found)


def test_more_matches_than_the_buffer_holds_are_all_reported() -> None:
    compiled = program(policy(*(rule("observe", "a" * n) for n in range(1, 6))))
    found = scan(compiled, b"a" * 20_000)
    assert len(found) == sum(20_000 - n for n in range(5))


def test_start_is_the_earliest_of_a_rule_and_end() -> None:
    compiled = program(policy(rule("halt", "b", "ab", "aab"), rule("mask", "ab", "b")))
    assert scan(compiled, b"xaab") == [Match(0, 1, 4), Match(1, 2, 4)]


def test_places_are_raw_bytes_even_where_characters_fold_or_break() -> None:
    compiled = program(policy(rule("halt", "sst", "kk", case=True), rule("mask", "k", word=True)))
    assert scan(compiled, "ßt".encode()) == [Match(0, 0, 3)]
    assert scan(compiled, "\u212a".encode() + b"k\xf0\x9f") == [Match(0, 0, 4)]
    assert scan(compiled, b"\xf0\x9fk\xe4\xbd") == [Match(1, 2, 3)]


def test_a_word_is_certain_with_the_next_character_or_the_end() -> None:
    scanner = Scanner(program(policy(rule("halt", "bomb", word=True))))
    assert list(scanner.feed(b"bomb")) == []
    assert list(scanner.feed(b" bomb")) == [Match(0, 0, 4)]
    assert list(scanner.feed("é bomb".encode()[:1])) == []
    assert list(scanner.feed("é bomb".encode()[1:])) == []
    assert list(scanner.finish()) == [Match(0, 12, 16)]


def test_a_scanner_follows_the_policy_it_is_given() -> None:
    compiled = program([policy(rule("halt", "a")), policy(rule("halt", "b"), name="other")])
    assert [m.rule for m in Scanner(compiled).feed(b"ab")] == [0]
    assert [m.rule for m in Scanner(compiled, 1).feed(b"ab")] == [1]
