"""How kernels are compiled: without the interpreter's lock, and cached on disk.

numba throws a cached function away when the file that holds it changed. Our kernels inline functions
of other files: after an upgrade that replaced only some of them, a cached kernel would read tables by
an old layout. So all kernels are thrown away when any file of this package changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit


def _stamp() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


STAMP = _stamp()


def _with(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def compiling(function: Callable[..., Any]) -> Any:
        kernel = njit(cache=True, nogil=True, **options)(function)
        # Of the cache's version, not of its source stamp: that is read behind the types of a kernel's
        # arguments, and what another release's are made of may not be there any more. No public way
        # in numba 0.65; tests/kernels/test_compiled.py notices when it moves.
        kernel._cache._cache_file._version += f" {STAMP}"
        return kernel

    return compiling


compiled = _with()
#: For functions that only borrow arrays: nothing in them may allocate one (numba refuses then), and
#: no references are counted.
borrowing = _with(_nrt=False)
