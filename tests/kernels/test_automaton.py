"""The dense automaton, hit for hit against pyahocorasick."""

from __future__ import annotations

import random
from collections.abc import Sequence

import ahocorasick
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamguard_kernels.automaton import (
    build_trie,
    byte_classes,
    collect_outputs,
    fold_failure_links,
    pack_transitions,
)

HIT_BIT = 1 << 31


class Dense:
    """The kernels' tables of a list of byte patterns, pattern i belonging to rule i."""

    def __init__(self, patterns: Sequence[bytes], base: int = 0) -> None:
        num = len(patterns)
        data = np.frombuffer(bytearray(b"".join(patterns)), np.uint8)
        offsets = np.cumsum([0, *map(len, patterns)]).astype(np.int64)
        self.base = base
        self.class_of, self.num_classes = byte_classes(data)
        goto, end_state = build_trie(data, offsets, self.class_of, self.num_classes, 1 << 20)
        self.depth = self._depths(goto)
        failure = fold_failure_links(goto)
        rank = np.arange(num - 1, -1, -1, dtype=np.int32)  # the last pattern is the most severe
        self.first, self.next, self.suffix, self.best, groups = collect_outputs(
            len(goto), end_state, np.arange(num, dtype=np.int32), rank,
            (1 << (np.arange(num) % 8)).astype(np.uint8), failure,
        )  # fmt: skip
        self.groups = groups
        self.trans = pack_transitions(goto, groups, base, np.zeros(0, np.int32))

    @staticmethod
    def _depths(goto: np.ndarray) -> list[int]:
        depth = [0] * len(goto)
        for state, row in enumerate(goto):
            for child in row[row > 0]:
                depth[child] = depth[state] + 1
        return depth

    def hits(self, text: bytes) -> list[tuple[int, int]]:
        """(end, pattern) of every match, and checks of what the tables say beside."""
        found = []
        entry = self.base
        for end, byte in enumerate(text, start=1):
            at = entry - self.base + int(self.class_of[byte])
            entry = int(self.trans[at])
            hit, entry = bool(entry & HIT_BIT), entry & ~HIT_BIT
            state = (entry - self.base) // self.num_classes
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
            assert self.groups[state] == np.bitwise_or.reduce([0, *(1 << (p % 8) for p in here)])
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


few_bytes = st.lists(st.sampled_from(b"aab\x00\xff"), min_size=1, max_size=6).map(bytes)


@given(st.lists(few_bytes, min_size=1, max_size=12), st.lists(st.sampled_from(b"aab\x00\xffc")))
def test_hits_equal_pyahocorasick_hit_for_hit(patterns: list[bytes], text: list[int]) -> None:
    assert Dense(patterns).hits(bytes(text)) == ahocorasick_hits(patterns, bytes(text))


@pytest.mark.parametrize("num_patterns", [1, 10, 1000])
def test_hits_equal_pyahocorasick_on_random_bytes(num_patterns: int, seed: int) -> None:
    rng = random.Random(seed)
    alphabet = bytes(rng.sample(range(256), rng.choice([3, 20, 200])))
    text = bytes(rng.choices(alphabet, k=5000))
    patterns = [bytes(rng.choices(alphabet, k=rng.randint(1, 8))) for _ in range(num_patterns)]
    patterns += [text[at : at + rng.randint(1, 60)] for at in rng.sample(range(4900), 5)]
    dense = Dense(patterns, base=7 * 1000)
    assert dense.hits(text) == ahocorasick_hits(patterns, text)


def test_states_are_numbered_by_depth() -> None:
    depth = Dense([b"abcd", b"b", b"bcd", b"cdab", b"zz"]).depth
    assert depth == sorted(depth)


def test_bytes_of_no_pattern_share_one_class() -> None:
    class_of, num_classes = byte_classes(np.frombuffer(b"banana\x00", np.uint8))
    assert num_classes == 1 + len(set(b"banana\x00"))
    assert [byte for byte in range(256) if class_of[byte]] == sorted(set(b"banana\x00"))


def test_a_trie_above_its_limit_stops_at_once() -> None:
    data = np.frombuffer(b"abcdefgh", np.uint8)
    offsets = np.array([0, 4, 8], np.int64)
    class_of, num_classes = byte_classes(data)
    for limit in (-5, 0, 1, 8):
        assert len(build_trie(data, offsets, class_of, num_classes, limit)[0]) == 0
    assert len(build_trie(data, offsets, class_of, num_classes, 9)[0]) == 9
