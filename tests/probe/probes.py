"""Made-up probes for tests that need no model: known weights, scores and calibration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from streamguard.probe.aggregation import Aggregation
from streamguard.probe.artifact import AggregationCard, Card, HeadCard, ModelCard, Probe


def make_probe(
    hidden_size: int = 4,
    heads: Mapping[str, Aggregation] | None = None,
    *,
    seed: int = 0,
    stage: str = "output",
    layer: int | str = 1,
    num_benign: int = 500,
    benign: np.ndarray | None = None,
    model: Mapping[str, Any] | None = None,
) -> Probe:
    """A probe with random weights. heads: aggregation by name, one raw head "harm" if None.

    benign  float32[num_benign], peaks of every head's benign texts; normal ones if None. Probes of
    two seeds differ.
    """
    heads = {"harm": Aggregation()} if heads is None else heads
    rng = np.random.default_rng(seed)
    peaks = rng.normal(size=num_benign).astype(np.float32) if benign is None else benign
    shape = {
        "name": "made-up",
        "architecture": "LlamaForCausalLM",
        "fingerprint": "0" * 64,
        "num_layers": 2,
        "hidden_size": hidden_size,
        "dtype": "float32",
        **(model or {}),
    }
    card = Card(
        date="2026-01-01",
        versions={"streamguard": "0"},
        model=ModelCard(**shape),
        layer=layer,
        stage=stage,
        heads=tuple(
            HeadCard(
                name=name,
                aggregation=AggregationCard(
                    kind=a.kind, size=a.size, weight=a.weight, drift=a.drift, warmup=a.warmup
                ),
            )
            for name, a in heads.items()
        ),
    )
    weight = rng.normal(size=(hidden_size, len(heads))).astype(np.float32)
    bias = rng.normal(size=len(heads)).astype(np.float32)
    return Probe(card, weight, bias, {name: np.asarray(peaks, np.float32) for name in heads})


def save_probe(folder: Path, name: str = "p.safetensors", **options: Any) -> Probe:
    """The same, written to a file in `folder`."""
    probe = make_probe(**options)
    probe.save(folder / name)
    return probe
