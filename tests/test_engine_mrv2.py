"""The engine tests once more, inside Model Runner V2: a process of its own, Triton interpreted."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import triton_interpreter

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
#: File -> the least number of tests that must have passed in it.
FILES = {
    "test_runner": 100,
    "test_scheduling": 4,
    "test_statistics": 5,
    "test_vocabularies": 18,
}


def test_engine_cases_pass_in_model_runner_v2_under_the_interpreter(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", *(f"tests/engine/{name}.py" for name in FILES), "-q",
            "--tb=short", "--show-capture=stdout", f"--junit-xml={report}",
            "-p", "no:cacheprovider", "--durations=10",
        ],
        cwd=ROOT,
        env={**triton_interpreter.environment(), "VLLM_LOGGING_LEVEL": "WARNING"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=float(os.environ.get("STREAMGUARD_TEST_TIMEOUT_S", "1800")),
        check=False,
    )  # fmt: skip
    print(run.stdout[-20_000:])
    assert run.returncode == 0
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    assert [suite.attrib[key] for key in ("skipped", "failures", "errors")] == ["0"] * 3
    ran = collections.Counter(case.attrib["classname"].split(".")[-1] for case in suite)
    print(f"passed in Model Runner V2: {dict(ran)}")
    assert all(ran[name] >= least for name, least in FILES.items())
