"""The tap finds hidden states by a model's structure, compiled or not, on one worker or several."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import probe_engines
import pytest
import torch
from engines import Request, engine, tokenizer
from probe_engines import NEVER, NOISE, Watched, body, expected_scores, probe_of
from torch import nn
from vllm import LLM

from streamguard.errors import ProbeError
from streamguard.vllm_plugin.tap import Decoder, Tap

pytestmark = pytest.mark.engine

PROMPT = "The capital of France is Paris, and the river that crosses"
#: What all of them have in common, under the names that most configurations use.
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.125,
    "tie_word_embeddings": False,
}
OTHER: dict[str, dict[str, Any]] = {
    "Qwen2Config": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "GemmaConfig": {"tie_word_embeddings": True},
    "Gemma2Config": {
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 32,
        "sliding_window": 64,
    },
    "Gemma3TextConfig": {
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 32,
        "sliding_window": 64,
    },
    "MistralConfig": {"sliding_window": None},
    "MixtralConfig": {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "OPTConfig": {
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
        "head_dim": None,
        "num_attention_heads": 2,
    },
    "GPT2Config": {
        "n_embd": 64,
        "n_layer": 3,
        "num_attention_heads": 2,
        "n_positions": 256,
        "head_dim": None,
    },
}
KINDS = [
    "LlamaConfig", "Qwen2Config", "Qwen3Config", "GemmaConfig", "Gemma2Config", "Gemma3TextConfig",
    "MistralConfig", "OPTConfig", "GPT2Config",
]  # fmt: skip


def random_model(kind: str, tokens: Path, path: Path) -> Path:
    """A small random model of a kind, with the tokenizer of another."""
    import transformers

    shape = {key: value for key, value in {**SHAPE, **OTHER.get(kind, {})}.items() if value is not None
             or key == "sliding_window"}  # fmt: skip
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, kind)(**shape, **ids)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokens / name, path / name)
    return path


def watching(model: Path, folder: Path, layers: list[int | str]) -> Path:
    """A folder with a policy `watch` that has a probe on each of some layers."""
    probes = {f"p{i}": probe_of(model, layer, seed=i) for i, layer in enumerate(layers)}
    rules = [
        {"id": name, "action": "halt", "probe": f"{name}.safetensors", "threshold": NEVER}
        for name in probes
    ]
    return probe_engines.policies(folder, probes, {"watch": rules})


def hidden_states_of_all(model: Path, tokens: list[int]) -> Any:
    """float32[num_layers, num_tokens, hidden_size], by Hugging Face."""
    count = probe_engines.card(model)["num_layers"]
    return np.stack([probe_engines.hidden_states(model, tokens, i) for i in range(count)])


def assert_agrees(
    model: Path, llm: LLM, dtype: torch.dtype = torch.float32, noise: float = NOISE
) -> None:
    """The engine used Hugging Face's scores for all tokens of two texts in one batch."""
    ids = tokenizer(model).encode(PROMPT)
    watched = Watched(llm)
    probes = body(llm).probing.table.probes
    requests = [Request(ids[i:], {"max_tokens": 6, "ignore_eos": True}, "watch") for i in (0, 5)]
    for name, tokens, reply in watched.run(requests):
        assert len(reply.tokens) == 6
        expected = expected_scores(model, tokens, probes, dtype)
        spread = np.abs(expected).max()
        apart = np.diff(hidden_states_of_all(model, tokens), axis=0)
        assert np.abs(apart).max(axis=(1, 2)).min() > 0.1, "another layer's would be as good"
        for position in range(len(tokens) - 1):
            (used,) = watched.of(name, position)
            np.testing.assert_allclose(used, expected[position], atol=noise * spread)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_a_family_are_those_of_hugging_face(
    kind: str, model: Path, tmp_path: Path
) -> None:
    made = random_model(kind, model, tmp_path / "model")
    llm = engine(made, watching(made, tmp_path / "policies", [0, 1, 2, "norm"]))
    assert_agrees(made, llm)


def test_compiled_model_has_the_ops_in_its_graph(model: Path, tmp_path: Path) -> None:
    folder = watching(model, tmp_path / "policies", [0, "norm"])
    assert_agrees(model, engine(model, folder, enforce_eager=False))


def in_a_process(model: Path, folder: Path, workers: int) -> dict[str, Any]:
    """What an engine of its own scored: tokens, finish_reason, scores by worker."""
    script = Path(__file__).with_name("probe_workers.py")
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(folder), str(workers)],
        capture_output=True,
        text=True,
        timeout=float(os.environ.get("STREAMGUARD_TEST_TIMEOUT_S", "600")),
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(lines) == 1, done.stdout[-3000:]
    found: dict[str, Any] = json.loads(lines[0])
    assert found["finish_reason"] == "length"
    return found


def test_scores_in_bfloat16_agree_within_its_noise(model: Path, tmp_path: Path) -> None:
    folder = watching(model, tmp_path / "policies", [0, 1, "norm"])
    llm = engine(model, folder, dtype="bfloat16")
    assert_agrees(model, llm, torch.bfloat16, noise=0.02)


@pytest.mark.slow
def test_two_tensor_parallel_workers_have_the_same_scores(model: Path, tmp_path: Path) -> None:
    layers: list[int | str] = [0, "norm"]
    found = in_a_process(model, watching(model, tmp_path / "policies", layers), 2)
    probes = [probe_of(model, layer, seed=i) for i, layer in enumerate(layers)]
    expected = expected_scores(model, found["tokens"], probes)
    first, second = (np.array(scores) for scores in found["scores"])
    assert first.tolist() == second.tolist(), "both decide, so both have to see the same"
    assert len(first) == len(found["tokens"]) - 1
    np.testing.assert_allclose(first, expected[: len(first)], atol=NOISE, rtol=NOISE)


@pytest.mark.slow
def test_scores_of_a_mixture_of_experts_are_those_of_hugging_face(
    model: Path, tmp_path: Path
) -> None:
    # vLLM sets a process up for experts with its first engine, or never.
    made = random_model("MixtralConfig", model, tmp_path / "model")
    layers: list[int | str] = [0, 1, 2, "norm"]
    found = in_a_process(made, watching(made, tmp_path / "policies", layers), 1)
    probes = [probe_of(made, layer, seed=i) for i, layer in enumerate(layers)]
    expected = expected_scores(made, found["tokens"], probes)
    (scores,) = (np.array(scores) for scores in found["scores"])
    assert len(scores) == len(found["tokens"]) - 1
    np.testing.assert_allclose(scores, expected[: len(scores)], atol=NOISE * np.abs(expected).max())


class Strange(nn.Module):
    """Layers under no common name, or none at all."""

    def __init__(self, layers: int, output: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Layer(output) for _ in range(layers)])

    def forward(self, hidden: torch.Tensor) -> Any:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Layer(nn.Module):
    def __init__(self, output: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.output(hidden)


def tap(model: nn.Module, layer: int | str) -> Tap:
    made = Tap(model, 2, 8, torch.device("cpu"))
    made.score([(layer, torch.ones(4, 1), torch.zeros(1))])
    return made


def test_layers_are_found_under_any_name() -> None:
    model = Strange(2, lambda hidden: hidden)
    made = tap(model, 1)
    model(torch.ones(3, 4))
    assert made.steps.tolist() == [1]
    assert made.scores[:4, 0].tolist() == [4, 4, 4, 0]


def test_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ProbeError, match=r"Strange: 0 modules hold a list of 2 decoder layers"):
        tap(Strange(3, lambda hidden: hidden), 1)


def test_two_towers_that_cannot_be_told_apart_are_refused() -> None:
    both = nn.Sequential(Strange(2, lambda hidden: hidden), Strange(2, lambda hidden: hidden))
    with pytest.raises(ProbeError, match=r"2 modules hold a list of 2 decoder layers"):
        Decoder.of(both, 2)


def test_unknown_layers_and_norms_are_refused() -> None:
    with pytest.raises(ProbeError, match=r"layer 2: the model has layers 0..1 and 'norm'"):
        tap(Strange(2, lambda hidden: hidden), 2)
    with pytest.raises(ProbeError, match=r"no single last norm. Choose a layer 0..1"):
        tap(Strange(2, lambda hidden: hidden), "norm")


@pytest.mark.parametrize(
    "output",
    [
        lambda hidden: {"hidden": hidden},
        lambda hidden: torch.stack([hidden, hidden], 1),
        lambda hidden: (hidden, hidden[:1]),
        lambda hidden: (),
    ],
    ids=["mapping", "two-streams", "other-rows", "nothing"],
)
def test_layer_with_another_kind_of_output_is_refused(output: Any) -> None:
    model = Strange(2, output)
    tap(model, 0)
    with pytest.raises(ProbeError, match="do not support this model's structure"):
        model(torch.ones(3, 4))


def test_removed_tap_leaves_the_model_as_it_was() -> None:
    model = Strange(2, lambda hidden: hidden)
    before = [(name, type(module)) for name, module in model.named_modules()]
    made = tap(model, 0)
    made.remove()
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert list(model.named_buffers()) == []
