"""Real vLLM engines for tests: start one, run requests through it, read what a client reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.ops import topk_topp_sampler

#: Set by tests/triton_interpreter.py: this process runs Model Runner V2, interpreted.
MRV2 = os.environ.get("STREAMGUARD_TEST_MRV2") == "1"
MAX_SEQS = 64
_ALIVE: list[LLM] = []

if MRV2:
    # Triton's interpreter cannot run vLLM's top-k/top-p kernel ("'int' object has no attribute
    # 'to'"); without it vLLM takes its PyTorch version.
    topk_topp_sampler.HAS_TRITON = False


@dataclass(frozen=True)
class Request:
    """What a client sends: a prompt, sampling parameters, and a policy by name."""

    prompt: str | Sequence[int]
    params: Mapping[str, Any] = field(default_factory=dict)
    policy: str | None = None

    @property
    def engine_prompt(self) -> Any:
        """As vLLM takes it."""
        if isinstance(self.prompt, str):
            return {"prompt": self.prompt}
        return {"prompt_token_ids": list(self.prompt)}

    def sampling(self, guarded: bool, **more: Any) -> SamplingParams:
        """Fresh SamplingParams; the policy's name only where an engine has policies."""
        given = {"temperature": 0.0, "max_tokens": 12, **self.params, **more}
        if guarded and self.policy is not None:
            given["extra_args"] = {**given.get("extra_args", {}), "streamguard_policy": self.policy}
        return SamplingParams(**given)


@dataclass
class Reply:
    """What a client got."""

    text: str
    tokens: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: Any = None
    deltas: list[str] = field(default_factory=list)


def engine(model: Path, policies: Path | None = None, **options: Any) -> LLM:
    """Start an engine in this process. It is small, and lives until the process ends."""
    if policies is not None:
        options["additional_config"] = {"streamguard": {"policy": str(policies)}}
    defaults = {
        "max_model_len": 256,
        "max_num_seqs": MAX_SEQS,
        "enforce_eager": True,
        "enable_chunked_prefill": False,  # V1 on a CPU crashes with it and per-request seeds
        "max_num_batched_tokens": 4096,
        "num_gpu_blocks_override": 512,
        "block_size": 32,
        "dtype": "float32",
    }
    llm = LLM(str(model), **{**defaults, **options})
    # vLLM's shutdown, also by garbage collection, ends the process group of all its engines.
    _ALIVE.append(llm)
    return llm


def scheduler(llm: LLM) -> Any:
    """The engine's scheduler, which runs in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def worker(llm: LLM) -> Any:
    """The engine's only worker, which runs in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def _guarded(llm: LLM) -> bool:
    return llm.llm_engine.input_processor._streamguard is not None


def generate(llm: LLM, requests: Sequence[Request]) -> list[list[Reply]]:
    """Run all requests as one batch, not streaming; per request one reply per sample."""
    params = [r.sampling(_guarded(llm)) for r in requests]
    outputs = llm.generate([r.engine_prompt for r in requests], params, use_tqdm=False)
    return [
        [
            Reply(o.text, list(o.token_ids), o.finish_reason, o.stop_reason, o.logprobs)
            for o in sorted(output.outputs, key=lambda o: o.index)
        ]
        for output in outputs
    ]


def stream(llm: LLM, requests: Sequence[Request], each_step: Any = None) -> list[list[Reply]]:
    """Run all requests as one batch, streaming deltas; `each_step()` runs before every step."""
    engine = llm.llm_engine
    replies: dict[str, dict[int, Reply]] = {}
    for number, request in enumerate(requests):
        params = request.sampling(_guarded(llm), output_kind=RequestOutputKind.DELTA)
        engine.add_request(str(number), request.engine_prompt, params)
        replies[str(number)] = {i: Reply("", [], None, None) for i in range(params.n)}
    while engine.has_unfinished_requests():
        if each_step is not None:
            each_step()
        for output in engine.step():
            for part in output.outputs:
                reply = replies[output.request_id][part.index]
                reply.text += part.text
                reply.deltas.append(part.text)
                reply.tokens += part.token_ids
                reply.finish_reason = part.finish_reason or reply.finish_reason
                if part.stop_reason is not None:
                    reply.stop_reason = part.stop_reason
    return [list(replies[str(n)].values()) for n in range(len(requests))]


def policy_folder(folder: Path, policies: Mapping[str, Iterable[Mapping[str, Any]]]) -> Path:
    """Write one file per policy, all selectable by clients; `default` has one idle rule."""
    folder.mkdir(parents=True, exist_ok=True)
    idle = {"id": "idle", "action": "halt", "literals": ["never said by anyone at all"]}
    for name, rules in {"default": [idle], **policies}.items():
        document = {
            "version": 1,
            "name": name,
            "client_selectable": True,
            "rules": [{"category": "custom", **rule} for rule in rules],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(document), encoding="utf-8")
    return folder


@cache
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@cache
def token_bytes(model: Path) -> tuple[bytes, ...]:
    """What each token adds to the text, special tokens nothing."""
    from streamguard.compiler.vocabulary import Vocabulary

    vocabulary = Vocabulary.from_tokenizer(tokenizer(model))
    return tuple(
        b"" if special else data
        for data, special in zip(vocabulary.token_bytes, vocabulary.special, strict=True)
    )


@dataclass(frozen=True)
class Found:
    """A pattern in a text that a model writes: the token at `index` completes it."""

    literal: str
    index: int


def completed_at(model: Path, tokens: Sequence[int], literal: str, prompt: str = "") -> int | None:
    """Index of the first token with which `literal` stands in the text; None if none does."""
    pieces, read = token_bytes(model), prompt.encode()
    for index, token in enumerate(tokens):
        read += pieces[token]
        if literal.encode() in read:
            return index
    return None


def spanning_pattern(
    model: Path, tokens: Sequence[int], prompt: str = "", first: int = 3
) -> Found | None:
    """A pattern that begins in one token and is completed by a later one, at index >= `first`."""
    pieces = token_bytes(model)
    for index in range(first, len(tokens)):
        before, here = pieces[tokens[index - 1]][-3:], pieces[tokens[index]][:3]
        literal = before + here
        if not before or not here or not all(0x20 < byte < 0x7F for byte in literal):
            continue
        text = literal.decode()
        if text not in prompt and completed_at(model, tokens, text) == index:
            return Found(text, index)
    return None
