"""Run Triton kernels on the CPU: Triton's interpreter, and vLLM convinced that it may be used.

`enable` has to come before the first import of triton or vllm in a process. For whole process trees
there is `mrv2_site/sitecustomize.py`: PYTHONPATH=tests/mrv2_site with STREAMGUARD_TEST_MRV2=1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

SITE = Path(__file__).parent / "mrv2_site"


def enable() -> None:
    """Interpret every kernel that is defined from now on. Raises RuntimeError if it is too late.

    vLLM on a CPU uses Triton only if there is a backend "cpu" (`vllm/triton_utils/importing.py`);
    the entry made here claims to be active and is never asked for anything else.
    """
    if "triton" in sys.modules:
        raise RuntimeError("triton is imported already, with its compiler; start a fresh process.")
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        is_active = staticmethod(lambda: True)

    backends.setdefault("cpu", Backend(compiler=BaseBackend, driver=Driver))
    _patch_once_a_launch()
    _patch_masks()


def _patch_masks() -> None:
    """Let a mask be of integers, as compiled kernels may: vLLM's grammar bitmask has such a one."""
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_masked_store

    def store(self: Any, ptrs: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return original(self, ptrs, value, mask, cache_policy)

    interpreter.InterpreterBuilder.create_masked_store = store


def _patch_once_a_launch() -> None:
    """Make calls between device functions cheap: 0.3 ms each without this, of which most is waste.

    Triton's interpreter (3.9) replaces the builtins of `triton.language` anew at every such call,
    although the launch has done so. The replacement is skipped for modules that it covers already.
    """
    from triton.runtime import interpreter

    original = getattr(interpreter, "_patch_lang", None)
    if original is None or not hasattr(interpreter, "_LangPatchScope"):
        return  # another version: slower, as correct
    covered: set[int] = set()

    def patch(fn: Any) -> Any:
        key = id(fn.__globals__)
        if key in covered:
            return interpreter._LangPatchScope()
        scope = original(fn)
        covered.add(key)
        restore = scope.restore

        def restore_all() -> None:
            covered.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch


def environment() -> dict[str, str]:
    """os.environ plus what makes all Python processes below run Model Runner V2, interpreted."""
    path = [str(SITE), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "STREAMGUARD_TEST_MRV2": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
