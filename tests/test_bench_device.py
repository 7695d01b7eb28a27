"""The GPU benchmark without a GPU: it compares with the host when interpreted, else it says why not.

In processes of their own: see `test_device_kernels`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {key: os.environ[key] for key in os.environ if key != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_device", *map(str, arguments)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_interpreted_bench_agrees_with_the_host_and_reports_no_times(tmp_path: Path) -> None:
    done = bench("--interpret", "--json", tmp_path / "record.json")
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    record = json.loads((tmp_path / "record.json").read_text())
    assert {row["name"] for row in record["rows"]} == {
        "advance_slots", "mask_rows", "decide_rows", "whole step",
    }  # fmt: skip
    assert all(row["times"] is None for row in record["rows"])
    assert {"torch", "triton"} <= record["versions"].keys()
    facts = record["facts"]["mask, 40 literals"]
    assert facts["tokens_masked_a_row"] > 0
    assert facts["verdicts_compared"] > 0


def test_bench_without_a_gpu_is_one_line_and_exit_code_2() -> None:
    done = bench()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "--interpret" in done.stderr
    assert done.stderr.count("\n") == 1
