"""Hand arrays to a kernel as one array of addresses, and compile without reference counts.

numba takes about 0.5 µs to look at each array of a call, and counts references to it in every
function that a tuple passes through. With some thirty tables that made up nine tenths of a step:
`advance` at batch 256 took 285 µs, and 30 µs this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from numba.np.numpy_support import from_dtype

#: For functions that only borrow arrays: nothing in them may allocate one (numba refuses then).
borrowing = njit(cache=True, nogil=True, _nrt=False)

_KINDS = {
    "b": (np.uint8, 1), "u": (np.uint32, 1), "i": (np.int32, 1), "l": (np.int64, 1),
    "b2": (np.uint8, 2), "i2": (np.int32, 2), "l2": (np.int64, 2),
}  # fmt: skip


def pack(arrays: Sequence[np.ndarray], kinds: str) -> np.ndarray:
    """Addresses and shapes of C-contiguous arrays: int64[num_arrays, 3].

    kinds  a word an array: b uint8, u uint32, i int32, l int64; 2 after it = two dimensions.
    The caller keeps the arrays alive. Raises TypeError for an array of another kind, since a kernel
    would read it as it is told.
    """
    packed = np.zeros((len(arrays), 3), np.int64)
    for i, (array, kind) in enumerate(zip(arrays, kinds.split(), strict=True)):
        dtype, num_dimensions = _KINDS[kind]
        if array.dtype != dtype or array.ndim != num_dimensions or not array.flags.c_contiguous:
            raise TypeError(
                f"array {i} is {array.dtype} of {array.ndim} dimensions; it must be "
                f"{np.dtype(dtype)}, {num_dimensions}, and C-contiguous."
            )
        packed[i, 0] = array.ctypes.data
        packed[i, 1 : 1 + array.ndim] = array.shape
    return packed


def unpacker(tuple_class: type, kinds: str) -> Callable[[np.ndarray], Any]:
    """A function for kernels that makes what was packed a `tuple_class` of arrays again."""
    array_types = tuple(
        types.Array(from_dtype(np.dtype(dtype)), num_dimensions, "C")
        for dtype, num_dimensions in (_KINDS[kind] for kind in kinds.split())
    )
    tuple_type = types.NamedTuple(array_types, tuple_class)

    @intrinsic
    def unpack(typing_context, packed):
        def generate(context, builder, signature, arguments):
            source = make_array(signature.args[0])(context, builder, arguments[0])

            def number(i, j):
                return builder.load(cgutils.gep_inbounds(builder, source.data, 3 * i + j))

            arrays = []
            for i, array_type in enumerate(array_types):
                array = make_array(array_type)(context, builder)
                data_type = context.get_data_type(array_type.dtype).as_pointer()
                shape = [number(i, 1 + j) for j in range(array_type.ndim)]
                size = context.get_constant(types.intp, array_type.dtype.bitwidth // 8)
                strides = [size]
                for extent in reversed(shape[1:]):
                    strides.insert(0, builder.mul(strides[0], extent))
                populate_array(
                    array,
                    data=builder.inttoptr(number(i, 0), data_type),
                    shape=shape,
                    strides=strides,
                    itemsize=size,
                    meminfo=None,
                )
                arrays.append(array._getvalue())
            return context.make_tuple(builder, signature.return_type, arrays)

        return tuple_type(packed), generate

    return unpack
