"""Arrays handed to kernels by address."""

from __future__ import annotations

import numpy as np
import pytest
from guard_cases import policy, program, rule
from numba import njit

from streamguard_kernels.lookahead import Ranges, pack_ranges, unpack_ranges
from streamguard_kernels.packing import address, pack
from streamguard_kernels.tables import Tables, pack_tables, unpack_tables


@njit
def tables_again(packed):
    return unpack_tables(packed)


@njit
def ranges_again(packed):
    return unpack_ranges(packed)


def test_kernels_get_the_tables_that_were_packed() -> None:
    compiled = program(policy(rule("mask", "ab", word=True), rule("halt", "b", case=True)))
    packed = pack_tables(compiled.tables)
    tables = tables_again(address(packed))
    assert isinstance(tables, Tables)
    for name, array in compiled.tables._asdict().items():
        assert getattr(tables, name).dtype == array.dtype, name
        assert np.array_equal(getattr(tables, name), array.reshape(-1)), name
    packed = pack_ranges(compiled.mask_ranges)
    ranges = ranges_again(address(packed))
    assert isinstance(ranges, Ranges)
    for name, array in compiled.mask_ranges._asdict().items():
        assert np.array_equal(getattr(ranges, name), array.reshape(-1)), name


@pytest.mark.parametrize("array", [np.zeros(3, np.int32), np.zeros(6, np.int64)[::2]])
def test_an_array_of_another_kind_is_refused(array: np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"array 1 is .*it must be int64 and C-contiguous"):
        pack([np.zeros(1, np.int64), array], "l l")
