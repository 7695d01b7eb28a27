"""The engine tests once more, inside Model Runner V2: a process of its own, Triton interpreted."""

from __future__ import annotations

import collections
import xml.etree.ElementTree as ElementTree

import pytest
from mrv2_run import FILES, Mrv2Run

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_engine_cases_pass_in_model_runner_v2_under_the_interpreter(mrv2_run: Mrv2Run) -> None:
    returncode = mrv2_run.wait()
    print(mrv2_run.output[-20_000:])
    assert returncode == 0
    (suite,) = ElementTree.parse(mrv2_run.report).getroot().iter("testsuite")
    assert [suite.attrib[key] for key in ("skipped", "failures", "errors")] == ["0"] * 3
    ran = collections.Counter(case.attrib["classname"].split(".")[-1] for case in suite)
    print(f"passed in Model Runner V2: {dict(ran)}")
    assert all(ran[name] >= least for name, least in FILES.items())
