"""Probe rules on the device without a GPU: interpreted, in a process of its own; see
`tests/test_device_kernels.py`, which also compiles the kernels for one."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_device_kernels import run


@pytest.mark.slow
def test_probe_kernels_agree_with_the_host_bit_for_bit(seed: int) -> None:
    cases = Path(__file__).parent / "device_probe_cases.py"
    print(run("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(cases), seed=seed))
