"""Hold depths against a plain look at every prefix of every pattern."""

from __future__ import annotations

import random

import numpy as np
import pytest
from guard_cases import policy, program, rule

from streamguard_kernels.hold import hold_depths
from streamguard_kernels.packing import address
from streamguard_kernels.reference import longest_live_suffix
from streamguard_kernels.tables import move, pack_tables, state_number

pytestmark = pytest.mark.usefixtures("layout")


@pytest.mark.parametrize("action", ["halt", "mask"])
def test_depth_of_every_state_is_that_of_the_longest_prefix_at_the_end(
    action: str, seed: int
) -> None:
    rng = random.Random(f"{seed} {action}")
    for _ in range(60):
        words = list({"".join(rng.choices("abc", k=rng.randint(1, 6))) for _ in range(8)})
        counted, withheld = words[::2], words[1::2]
        compiled = program(policy(rule("observe", *counted), rule(action, *withheld or ["a"])))
        t, packed = compiled.tables, pack_tables(compiled.tables)
        tables = address(packed)
        for text in {word[:n] for word in words for n in range(len(word) + 1)}:
            state = int(t.track_start[0])
            for byte in text.encode():
                state = int(move(tables, 0, state, int(t.class_of[0, byte]))) & 0x7FFFFFFF
            found = compiled.hold_depths[state_number(tables, 0, state)]
            assert found == longest_live_suffix(text, withheld or ["a"]), (text, withheld)


def test_the_leading_mark_is_no_part_of_the_depth(layout: str) -> None:
    compiled = program(policy(rule("halt", "ab", word=True)))
    # root, FE, FE ab FF; FE a; FE ab; and the quiet copy of FE ab, which packed tracks do not list
    quiet = [0] if layout == "dense" else []
    assert sorted(compiled.hold_depths.tolist()) == [*quiet, 0, 0, 0, 1, 2]


def test_a_track_where_nothing_counts_holds_nothing() -> None:
    tables = program(policy(rule("halt", "abc"))).tables
    packed = pack_tables(tables)  # addresses: `tables` must live on
    depths = np.ones(4, np.int32)
    hold_depths(address(packed), 0, np.zeros(1, np.uint8), depths)
    assert depths.tolist() == [0, 0, 0, 0]
