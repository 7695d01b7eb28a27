"""A clean environment and the policies that the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_commands import POLICY, STRICT

VARIABLES = ("STREAMGUARD_POLICY", "STREAMGUARD_REQUIRED", "VLLM_PLUGINS", "NUMBA_CACHE_DIR",
             "VLLM_USE_V2_MODEL_RUNNER", "VLLM_USE_RUST_FRONTEND", "VLLM_RUST_FRONTEND_PATH",
             "PROMETHEUS_MULTIPROC_DIR")  # fmt: skip


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "policies"
    path.mkdir()
    (path / "a.yaml").write_text(POLICY)
    (path / "b.yaml").write_text(STRICT)
    return path
