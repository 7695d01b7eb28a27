"""Made-up evaluations: scores with a known answer, no text of any data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamguard.probe.artifact import AggregationCard, Card, DataCard, HeadCard, ModelCard
from streamguard.probe.evaluate import Scored

#: In every text, so that a report that quotes one is found out.
MARK = "zanzibar"


def scored(texts: Sequence[Sequence[float]], label: Sequence[int], **fields: Any) -> Scored:
    """An evaluation of texts given as the scores of their tokens; other fields as in `Scored`."""
    count = len(texts)
    sizes = np.array([len(text) for text in texts], np.int64)
    made: dict[str, Any] = {
        "scores": np.array([score for text in texts for score in text], np.float32),
        "offsets": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        "label": np.array(label, np.int8),
        "source": ["made up"] * count,
        "prompt_id": [f"prompt {i}" for i in range(count)],
        "refusal": np.zeros(count, bool),
        "onset": np.full(count, -1, np.int64),
        "length": sizes,
        "text": [f"{MARK} {i}" for i in range(count)],
    }
    return Scored(**made | fields)


def one_score_each(scores: Sequence[float], label: Sequence[int], **fields: Any) -> Scored:
    """An evaluation of texts of one token."""
    return scored([[score] for score in scores], label, **fields)


def varied(rng: np.random.Generator, num_texts: int = 400) -> Scored:
    """Two sources of both labels, one of harmful texts only; refusals, spliced and cut texts."""
    label = rng.integers(0, 2, num_texts)
    source = rng.choice(["first <source>", "second $ource", "harmful_only"], num_texts)
    label[source == "harmful_only"] = 1
    onset = np.where((label == 1) & (rng.random(num_texts) < 0.5), 10, -1)
    texts = []
    for harmful, begin in zip(label, onset, strict=True):
        size = int(rng.integers(20, 60))
        shift = harmful * (np.arange(size) >= max(begin, 0))
        texts.append(rng.normal(size=size) + shift)
    sizes = np.array([len(text) for text in texts])
    return scored(
        texts,
        label.tolist(),
        source=source.tolist(),
        prompt_id=[f"p{i}" for i in rng.integers(0, num_texts // 2, num_texts)],
        refusal=(label == 0) & (rng.random(num_texts) < 0.3),
        onset=onset,
        length=sizes + rng.integers(0, 10, num_texts),
    )


def card() -> Card:
    shape = AggregationCard(kind="window", size=4, weight=1.0, drift=0.0, warmup=1)
    return Card(
        date="2026-11-22",
        versions={"vllm": "0.32.0", "streamguard": "<b>0.1</b>"},
        model=ModelCard(
            name="a/model", architecture="LlamaForCausalLM", fingerprint="abc", num_layers=30,
            hidden_size=576, dtype="bfloat16",
        ),
        layer=14,
        heads=(HeadCard(name="harm", aggregation=shape),),
        data=(
            DataCard(
                name="train.jsonl", sha256="0" * 64, role="fit", items=10, positive=5,
                sources={"first <source>": 10},
            ),
        ),
        training={"loss": "mean"},
    )  # fmt: skip
