"""Engines with probes, the scores that they use, and what Hugging Face says these should be."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import Reply, Request, engine, generate, worker
from numpy.typing import NDArray
from vllm import LLM

from streamguard.probe.aggregation import Aggregation
from streamguard.probe.artifact import Probe
from streamguard.probe.model import ServedModel
from streamguard.vllm_plugin.collector import rows_of
from streamguard.vllm_plugin.tap import Decoder

sys.path.append(str(Path(__file__).parents[1] / "probe"))

from probes import make_probe

#: float32 through two implementations of one model.
NOISE = 1e-3
#: A threshold that nothing reaches.
NEVER = 1e6


@cache
def card(model: Path) -> dict[str, Any]:
    """What a probe's card says of a model."""
    return ServedModel(str(model)).card.model_dump()


def probe_of(
    model: Path, layer: int | str, heads: int = 1, seed: int = 0, stage: str = "output", **said: Any
) -> Probe:
    """A probe of random weights for a model. said: what its card has wrong of that."""
    names = {f"head-{i}": Aggregation() for i in range(heads)}
    mine = {**card(model), **said}
    return make_probe(mine["hidden_size"], names, layer=layer, seed=seed, stage=stage, model=mine)


@cache
def _reference(model: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()


def hidden_states(
    model: Path, tokens: Sequence[int], layer: int | str, dtype: torch.dtype = torch.float32
) -> NDArray[np.float32]:
    """float32[num_tokens, hidden_size] behind a layer, or the last norm, as Hugging Face computes it."""
    reference = _reference(model, dtype)
    num_layers = reference.config.get_text_config().num_hidden_layers
    seen: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, torch.Tensor) else output[0])

    hook = Decoder.of(reference, num_layers).module(layer).register_forward_hook(keep)
    with torch.no_grad():
        reference(torch.tensor([list(tokens)]))
    hook.remove()
    return seen[0].reshape(len(tokens), -1).float().numpy()


def expected_scores(
    model: Path, tokens: Sequence[int], probes: Iterable[Probe], dtype: torch.dtype = torch.float32
) -> NDArray[np.float32]:
    """float32[num_tokens, num_columns]: the scores of a text, by Hugging Face's hidden states."""
    parts = [
        hidden_states(model, tokens, probe.card.layer, dtype) @ probe.weight + probe.bias
        for probe in probes
    ]
    return np.concatenate(parts, axis=1)


def aimed(
    model: Path, tokens: Sequence[int], layer: int | str, positions: Iterable[int], high: int,
    **more: Any,
) -> Probe:  # fmt: skip
    """A probe whose score is 4 at position `high` and -4 at the others of `positions`."""
    places = [p for p in positions if p != high]
    states = hidden_states(model, tokens, layer)[[high, *places]]
    wanted = np.array([4.0] + [-4.0] * len(places))
    weight, *_ = np.linalg.lstsq(states.astype(float), wanted, rcond=None)
    assert np.abs(states @ weight - wanted).max() < 0.5
    made = probe_of(model, layer, **more)
    return dataclasses.replace(
        made, weight=weight[:, None].astype(np.float32), bias=np.zeros(1, np.float32)
    )


def policies(
    folder: Path, probes: Mapping[str, Probe], rules: Mapping[str, Sequence[Mapping[str, Any]]],
    passing: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write probes (by file stem) and a policy per entry of `rules`; `passing` go on after errors."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, probe in probes.items():
        probe.save(folder / f"{name}.safetensors")
    idle = [{"id": "idle", "action": "halt", "literals": ["never said by anyone at all"]}]
    for name, mine in {"default": idle, **rules}.items():
        document: dict[str, Any] = {
            "version": 1, "name": name, "client_selectable": True,
            "rules": [{"category": "custom", **rule} for rule in mine],
        }  # fmt: skip
        if name in passing:
            document["defaults"] = {"on_error": "pass"}
        (folder / f"{name}.yaml").write_text(json.dumps(document), encoding="utf-8")
    return folder


def body(llm: LLM) -> Any:
    """What streamguard put into the engine's sampler."""
    return worker(llm).model_runner.sampler.streamguard_body


class Watched:
    """An engine, and every score that its guard used: by request and position, in the order of steps."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.used: dict[tuple[str, int], list[NDArray[np.float32]]] = {}
        mine = body(llm)
        device = getattr(mine, "_device_probes", None)
        owner, name = (mine, "read_scores") if device is None else (device, "read")
        original = getattr(owner, name)
        self.runner = worker(llm).model_runner

        def read(*args: Any) -> Any:
            scores = mine.probing.tap.scores.cpu().numpy()
            for request, first, count, position in self._rows(args):
                for i in range(count):
                    place = request.rsplit("-", 1)[0], position + i
                    self.used.setdefault(place, []).append(scores[first + i].copy())
            return original(*args)

        setattr(owner, name, read)

    def _rows(self, args: Sequence[Any]) -> list[tuple[str, int, int, int]]:
        batch = next((arg for arg in args if hasattr(arg, "query_start_loc_np")), None)
        if batch is None:
            batch = getattr(body(self.llm), "input_batch", None)
        if batch is None:
            return rows_of(self.runner)
        starts = batch.query_start_loc_np
        return [
            (name, int(starts[i]), int(starts[i + 1] - starts[i]),
             int(batch.num_computed_tokens_np[i]))
            for i, name in enumerate(batch.req_ids)
        ]  # fmt: skip

    def of(self, request: str, position: int) -> list[NDArray[np.float32]]:
        """All scores used at a position of a request."""
        return self.used.get((request, position), [])

    def run(self, requests: Sequence[Request]) -> list[tuple[str, list[int], Reply]]:
        """Run requests as one batch: (id, tokens of prompt and reply, reply) of each."""
        params = [r.sampling(True) for r in requests]
        outputs = self.llm.generate([r.engine_prompt for r in requests], params, use_tqdm=False)
        found = []
        for output in outputs:
            o = output.outputs[0]
            reply = Reply(o.text, list(o.token_ids), o.finish_reason, o.stop_reason)
            found.append((output.request_id, [*output.prompt_token_ids, *reply.tokens], reply))
        return found


def references(
    model: Path, prompts: Sequence[Sequence[int]], num_tokens: int, **options: Any
) -> list[list[int]]:
    """What an unguarded engine writes, greedily."""
    plain = engine(model, **options)
    requests = [Request(p, {"max_tokens": num_tokens}) for p in prompts]
    return [replies[0].tokens for replies in generate(plain, requests)]
