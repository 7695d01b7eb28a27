"""Hand arrays to a kernel as one address.

numba takes about 0.1 µs to look at each array of a call, and more in every function that a tuple of
arrays passes through. With some thirty tables that made up nine tenths of a step:
`advance` at batch 256 took 285 µs, and 30 µs this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from numba.np.numpy_support import from_dtype

_KINDS = {
    "b": np.uint8, "u": np.uint32, "i": np.int32, "l": np.int64, "f": np.float32, "d": np.float64,
}  # fmt: skip


def pack(arrays: Sequence[np.ndarray], kinds: str) -> np.ndarray:
    """Addresses and sizes of C-contiguous arrays: int64[num_arrays, 2].

    Kernels take the address of what this returns (`address`).
    kinds  a letter an array: b uint8, u uint32, i int32, l int64, f float32, d float64.
    The caller keeps the arrays and the result alive. Raises TypeError for an array of another kind,
    since a kernel would read it as it is told.
    """
    packed = np.zeros((len(arrays), 2), np.int64)
    for i, (array, kind) in enumerate(zip(arrays, kinds.split(), strict=True)):
        if array.dtype != _KINDS[kind] or not array.flags.c_contiguous:
            raise TypeError(
                f"array {i} is {array.dtype}, contiguous: {array.flags.c_contiguous}; it must be "
                f"{np.dtype(_KINDS[kind])} and C-contiguous."
            )
        packed[i] = array.__array_interface__["data"][0], array.size
    return packed


def address(packed: np.ndarray) -> int:
    """Where packed arrays lie: what kernels take in their place."""
    return int(packed.ctypes.data)


def unpacker(tuple_class: type, kinds: str) -> Callable[[np.ndarray], Any]:
    """A function for kernels that makes what was packed a `tuple_class` of *flat* arrays again.

    Flat, because two-dimensional indexing costs a multiplication and a check at every access.
    """
    array_types = tuple(
        types.Array(from_dtype(np.dtype(_KINDS[kind])), 1, "C") for kind in kinds.split()
    )
    tuple_type = types.NamedTuple(array_types, tuple_class)

    @intrinsic
    def unpack(typing_context, packed):
        def generate(context, builder, signature, arguments):
            word = context.get_value_type(types.int64)
            source = builder.inttoptr(arguments[0], word.as_pointer())

            def number(i, j):
                return builder.load(cgutils.gep_inbounds(builder, source, 2 * i + j))

            arrays = []
            for i, array_type in enumerate(array_types):
                array = make_array(array_type)(context, builder)
                data_type = context.get_data_type(array_type.dtype).as_pointer()
                itemsize = context.get_constant(types.intp, array_type.dtype.bitwidth // 8)
                populate_array(
                    array,
                    data=builder.inttoptr(number(i, 0), data_type),
                    shape=[number(i, 1)],
                    strides=[itemsize],
                    itemsize=itemsize,
                    meminfo=None,
                )
                arrays.append(array._getvalue())
            return context.make_tuple(builder, signature.return_type, arrays)

        return tuple_type(packed), generate

    return unpack
