"""The Triton kernels without a GPU: interpreted against the host's guard, and compiled for one.

Each runs in a process of its own: whether kernels are interpreted is decided when triton is first
imported, and an engine test may have done that in this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*arguments: str, seed: int) -> str:
    environment = {**os.environ, "STREAMGUARD_TEST_SEED": str(seed)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_kernels_agree_with_the_host_bit_for_bit(seed: int) -> None:
    cases = HERE / "device_kernel_cases.py"
    print(run("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(cases), seed=seed))


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(seed: int) -> None:
    # The interpreter accepts programs that the compiler does not.
    print(run(str(HERE / "compile_device_kernels.py"), seed=seed))
