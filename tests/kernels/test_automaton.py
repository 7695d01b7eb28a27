"""The automaton, dense and packed, hit for hit against pyahocorasick."""

from __future__ import annotations

import random
from collections.abc import Sequence

import ahocorasick
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamguard_kernels.automaton import (
    COLD_FIELDS,
    accepting_groups,
    build_trie,
    byte_classes,
    collect_outputs,
    link_trie,
    pack_cold,
    pack_rows,
    sort_patterns,
)

HIT_BIT = 1 << 31


class Automaton:
    """The kernels' tables of a list of byte patterns, pattern i belonging to rule i.

    num_hot  states that get a row, at most; the others get records.
    """

    def __init__(self, patterns: Sequence[bytes], base: int = 0, num_hot: int = 1 << 20) -> None:
        num = len(patterns)
        data = np.frombuffer(bytearray(b"".join(patterns)), np.uint8)
        offsets = np.cumsum([0, *map(len, patterns)]).astype(np.int64)
        self.base = base
        self.class_of, self.num_classes = byte_classes(data)
        order = sort_patterns(data, offsets)
        assert [patterns[p] for p in order] == sorted(patterns)
        self.label, self.children, end_state = build_trie(
            data, offsets, order, self.class_of, 1 << 20
        )
        self.num_states = len(self.label)
        self.num_hot = min(num_hot, self.num_states)
        failure, rows = link_trie(self.label, self.children, self.num_hot, self.num_classes, -1, -1)
        rank = np.arange(num - 1, -1, -1, dtype=np.int32)  # the last pattern is the most severe
        rule = np.arange(num, dtype=np.int32)
        self.groups = accepting_groups(
            end_state, rule, (1 << (np.arange(num) % 8)).astype(np.uint8), failure
        )
        # Places as a packed track has them: one for none, then one for each accept state.
        self.place = np.where(self.groups, np.cumsum(self.groups != 0), 0).astype(np.int32)
        self.first, self.next, self.suffix, self.best = collect_outputs(
            self.place, int(self.place.max()) + 1, end_state, rule, rank, failure
        )
        self.trans = pack_rows(rows, self.groups, self.label, base, -1)
        self.limit = base + len(self.trans)
        self.cold = pack_cold(
            self.label, self.children, failure, self.groups, self.num_hot, self.num_classes, base
        ).reshape(-1, COLD_FIELDS)

    def move(self, state: int, byte: int) -> int:
        """An entry: the next state, and HIT_BIT."""
        wanted = int(self.class_of[byte])
        while state >= self.limit:
            first, link, shape = map(int, self.cold[state - self.limit])
            for child in range(first & ~HIT_BIT, (first & ~HIT_BIT) + (shape >> 16)):
                if int(self.cold[child, 2]) & 0xFF == wanted:
                    assert child > first & ~HIT_BIT or shape >> 8 & 0xFF == wanted
                    return (self.limit + child) | int(self.cold[child, 0]) & HIT_BIT
            state = link
        return int(self.trans[state - self.base + wanted])

    def number(self, state: int) -> int:
        """Which state it is, counted from the root by depth."""
        if state < self.limit:
            return (state - self.base) // self.num_classes
        return self.num_hot + state - self.limit

    def depths(self) -> list[int]:
        """Of every state, from the lists of children."""
        depth = [0] * self.num_states
        for state in range(self.num_states):
            for child in range(self.children[state], self.children[state + 1]):
                depth[child] = depth[state] + 1
        return depth

    def hits(self, text: bytes) -> list[tuple[int, int]]:
        """(end, pattern) of every match, and checks of what the tables say beside."""
        found = []
        entry = self.base
        for end, byte in enumerate(text, start=1):
            entry = self.move(entry, byte)
            hit, entry = bool(entry & HIT_BIT), entry & ~HIT_BIT
            number = self.number(entry)
            state = int(self.place[number])
            here, link = [], state
            while True:
                pattern = int(self.first[link])
                while pattern >= 0:
                    here.append(pattern)
                    pattern = int(self.next[pattern])
                link = int(self.suffix[link])
                if link == 0:
                    break
            assert hit == bool(here)
            assert self.best[state] == max(here, default=-1)
            assert self.groups[number] == np.bitwise_or.reduce([0, *(1 << (p % 8) for p in here)])
            found += [(end, pattern) for pattern in here]
        return sorted(found)


def ahocorasick_hits(patterns: Sequence[bytes], text: bytes) -> list[tuple[int, int]]:
    automaton = ahocorasick.Automaton()
    for pattern in set(patterns):
        same = [i for i, other in enumerate(patterns) if other == pattern]
        automaton.add_word(pattern.decode("latin-1"), same)
    automaton.make_automaton()
    found = automaton.iter(text.decode("latin-1"))
    return sorted((end + 1, pattern) for end, same in found for pattern in same)


few_bytes = st.lists(st.sampled_from(b"aab\x00\xff"), min_size=1, max_size=9).map(bytes)


@given(
    st.lists(few_bytes, min_size=1, max_size=12),
    st.lists(st.sampled_from(b"aab\x00\xffc")),
    st.integers(1, 12),
)
def test_hits_equal_pyahocorasick_hit_for_hit(
    patterns: list[bytes], text: list[int], num_hot: int
) -> None:
    expected = ahocorasick_hits(patterns, bytes(text))
    assert Automaton(patterns).hits(bytes(text)) == expected
    assert Automaton(patterns, num_hot=num_hot).hits(bytes(text)) == expected


@pytest.mark.parametrize("num_patterns", [1, 10, 1000])
def test_hits_equal_pyahocorasick_on_random_bytes(num_patterns: int, seed: int) -> None:
    rng = random.Random(seed)
    alphabet = bytes(rng.sample(range(256), rng.choice([3, 20, 200])))
    text = bytes(rng.choices(alphabet, k=5000))
    patterns = [bytes(rng.choices(alphabet, k=rng.randint(1, 8))) for _ in range(num_patterns)]
    patterns += [text[at : at + rng.randint(1, 60)] for at in rng.sample(range(4900), 5)]
    expected = ahocorasick_hits(patterns, text)
    assert Automaton(patterns, base=7 * 1000).hits(text) == expected
    assert Automaton(patterns, 7 * 1000, rng.randint(1, 2000)).hits(text) == expected


def test_states_are_numbered_by_depth_and_siblings_follow_each_other() -> None:
    automaton = Automaton([b"abcd", b"b", b"bcd", b"cdab", b"zz", b"zb"])
    depths = automaton.depths()
    assert depths == sorted(depths)
    assert automaton.children[-1] == automaton.num_states
    labels = automaton.label[automaton.children[0] : automaton.children[1]].tolist()
    assert labels == sorted(labels)


def test_bytes_of_no_pattern_share_one_class() -> None:
    class_of, num_classes = byte_classes(np.frombuffer(b"banana\x00", np.uint8))
    assert num_classes == 1 + len(set(b"banana\x00"))
    assert [byte for byte in range(256) if class_of[byte]] == sorted(set(b"banana\x00"))


def test_patterns_are_sorted_as_bytes_are() -> None:
    patterns = [b"a" * n for n in (30, 7, 8, 14, 1, 15)] + [b"a" * 7 + b"\x00", b"a\x00", b"a"]
    patterns += [b"a" * 14 + b"\x00", b"\xff", b"a" * 20 + b"b"]
    data = np.frombuffer(bytearray(b"".join(patterns)), np.uint8)
    order = sort_patterns(data, np.cumsum([0, *map(len, patterns)]).astype(np.int64))
    assert [patterns[p] for p in order] == sorted(patterns)


def test_a_trie_above_its_limit_says_how_large_it_would_be() -> None:
    data = np.frombuffer(b"abcdefgh", np.uint8)
    offsets = np.array([0, 4, 8], np.int64)
    class_of, _ = byte_classes(data)
    order = sort_patterns(data, offsets)
    for limit in (-5, 0, 1, 8):
        label, children, _ = build_trie(data, offsets, order, class_of, limit)
        assert len(label) == 0
        assert children.tolist() == [9]
    assert len(build_trie(data, offsets, order, class_of, 9)[0]) == 9
