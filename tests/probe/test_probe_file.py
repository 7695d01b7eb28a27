"""The probe's file: what is written is read, and nothing that was damaged is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probes import make_probe
from safetensors.numpy import load_file, save_file

from streamguard.errors import ProbeError
from streamguard.probe.aggregation import Aggregation
from streamguard.probe.artifact import Probe
from streamguard.probe.fingerprint import model_fingerprint


def rewritten(path: Path, change: Any) -> Path:
    """The file with card and tensors changed by `change(card, tensors)`."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        card = json.loads(file.metadata()["card"])
    tensors = load_file(path)
    change(card, tensors)
    save_file(tensors, path, metadata={"card": json.dumps(card)})
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "p.safetensors"
    make_probe(heads={"a": Aggregation(), "b": Aggregation("ema", weight=0.1)}).save(path)
    return path


def test_what_is_written_is_read(saved: Path) -> None:
    probe = make_probe(heads={"a": Aggregation(), "b": Aggregation("ema", weight=0.1)})
    read = Probe.load(saved)
    assert read.card == probe.card
    assert read.sha256 == probe.sha256
    np.testing.assert_array_equal(read.weight, probe.weight)
    assert read.aggregation("b") == Aggregation("ema", weight=0.1)
    assert [p.name for p in saved.parent.iterdir()] == ["p.safetensors"]


def test_any_change_changes_the_digest() -> None:
    digests = {
        make_probe().sha256, make_probe(seed=1).sha256, make_probe(layer=0).sha256,
        make_probe(num_benign=501).sha256, make_probe(model={"fingerprint": "1" * 64}).sha256,
    }  # fmt: skip
    assert len(digests) == 5


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ProbeError, match="not a whole safetensors file"):
        Probe.load(saved)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c, t: t.pop("bias"), "'bias' is missing"),
        (lambda c, t: t.update(weight=t["weight"][:2]), r"shape \(2, 2\); its card needs \(4, 2\)"),
        (lambda c, t: t.update(weight=t["weight"].astype(np.float64)), "needed: float32"),
        (lambda c, t: t["weight"].fill(np.nan), "NaN or infinity"),
        (lambda c, t: t.pop("benign.b"), "'benign.b' is missing"),
        (lambda c, t: c.update(layer=2), "layer 2 of a model of 2 layers"),
        (lambda c, t: c.update(format="other/9"), "this version reads"),
        (lambda c, t: c.pop("model"), "card: model"),
        (lambda c, t: c["heads"][1].update(name="a"), "two heads have one name"),
        (lambda c, t: c["heads"][0]["aggregation"].update(kind="mode"), "allowed: window"),
    ],
)
def test_a_file_that_does_not_fit_its_card_is_refused(saved: Path, change: Any, said: str) -> None:
    with pytest.raises(ProbeError, match=said):
        Probe.load(rewritten(saved, change))


def test_other_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="no such file"):
        Probe.load(tmp_path / "none.safetensors")
    save_file({"weight": np.zeros((2, 2), np.float32)}, tmp_path / "weights.safetensors")
    with pytest.raises(ProbeError, match="without a probe's card"):
        Probe.load(tmp_path / "weights.safetensors")


# -------------------------------------------------------------------------- fingerprint


def model(folder: Path, weights: dict[str, np.ndarray], shards: int = 1, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    names = sorted(weights)
    for shard in range(shards):
        mine = {name: weights[name] for name in names[shard::shards]}
        save_file(mine, folder / f"model-{shard}.safetensors")
    return folder


def test_a_fingerprint_is_that_of_the_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.normal(size=(64, 64)).astype(np.float32) for i in range(4)}
    first = model_fingerprint(model(tmp_path / "a", weights))
    assert model_fingerprint(model(tmp_path / "shards", weights, shards=2)) == first
    assert model_fingerprint(model(tmp_path / "path", weights, _name_or_path="/x")) == first
    assert model_fingerprint(model(tmp_path / "config", weights, rope_theta=5)) != first
    for name in weights:
        tuned = {**weights, name: weights[name] + np.float32(1e-3)}
        assert model_fingerprint(model(tmp_path / f"tuned-{name}", tuned)) != first
    transposed = {**weights, "w0": weights["w0"].reshape(32, 128)}
    assert model_fingerprint(model(tmp_path / "shape", transposed)) != first


def test_a_folder_without_weights_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"no \*\.safetensors"):
        model_fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 4)
    with pytest.raises(ProbeError, match="not a safetensors file"):
        model_fingerprint(tmp_path)
