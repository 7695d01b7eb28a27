"""A short run of the fuzz `fuzz_never_emitted.py`, and proof that it would find something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fuzz_never_emitted import KINDS, Client, Counts, fuzz
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

NUM_STEPS = 50_000
TinyModels = Callable[..., Path]


@pytest.fixture(scope="module")
def models(tiny_models: TinyModels) -> dict[str, Path]:
    return {kind: tiny_models(kind) for kind in KINDS}


def show(all_counts: dict[str, Counts]) -> None:
    for kind, counts in all_counts.items():
        print(kind, *(f"{name} {number:,}" for name, number in counts.rows()), sep="  ")


def test_no_client_ever_reads_a_match(models: dict[str, Path], seed: int) -> None:
    all_counts = fuzz(models, NUM_STEPS, seed)
    show(all_counts)
    for counts in all_counts.values():
        assert counts.violations == []
        assert min(counts.near_misses, counts.masked, counts.halted, counts.full, counts.ended) > 0
    assert all_counts["byte_level_bpe"].odd_bytes > 0
    assert all_counts["byte_fallback"].resets > 0


def test_the_fuzz_finds_matches_where_nothing_guards(models: dict[str, Path], seed: int) -> None:
    # Some ten policies for each tokenizer: a few may have observe rules alone.
    all_counts = fuzz(models, 60_000, seed, guarded=False)
    show(all_counts)
    for counts in all_counts.values():
        assert len(counts.violations) > 10


def test_a_restart_of_the_detokenizer_would_hide_broken_bytes(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # An engine test in the same process may have put the plugin's repair in place.
    step = FastIncrementalDetokenizer._protected_step
    original = getattr(step, "__wrapped__", step)
    monkeypatch.setattr(FastIncrementalDetokenizer, "_protected_step", original)
    # vLLM's stream starts over where decoding more tokens changes what was already shown, and drops
    # what it held: a client would read "中b", though the model wrote "中", a broken byte and "b".
    tokenizer = AutoTokenizer.from_pretrained(models["byte_fallback"])
    pieces = [*(f"<0x{byte:02X}>" for byte in "中".encode() + b"\xff"), "b"]
    tokens = tokenizer.convert_tokens_to_ids(pieces)
    request = SimpleNamespace(
        sampling_params=SamplingParams(), request_id="r", prompt_token_ids=tokens[-1:]
    )
    plain = FastIncrementalDetokenizer(tokenizer, request)
    client = Client(tokenizer, tokens[-1:], SamplingParams())
    for token in tokens:
        plain.update([token], False)
        client.update([token], False)
    assert plain.output_text == "中b"
    assert client.output_text == "中\ufffdb"
