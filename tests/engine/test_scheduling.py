"""Verdicts do not depend on how the engine schedules: chunks, cached prefixes, preemption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from case_table import ACTIONS, MESSAGE, Plan, rule
from conftest import Outcome
from engines import (
    MRV2,
    Reply,
    Request,
    completed_at,
    engine,
    generate,
    policy_folder,
    scheduler,
    spanning_pattern,
    stream,
    token_bytes,
    tokenizer,
)
from streamguard_counters import verdict_counts
from test_runner import assert_obeys, assert_same
from vllm import LLM

pytestmark = pytest.mark.engine

CHUNK = 32
# Under the interpreter a guarded token takes a tenth of a second.
NUM_TOKENS = 8 if MRV2 else 12
CHUNKED = {
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": CHUNK,
    "max_num_seqs": 8,
    "enable_prefix_caching": True,
}
#: Requests, tokens of each, and memory for about half of what they come to need.
CROWD, CROWD_TOKENS, BLOCKS = (5, 36, 8) if MRV2 else (8, 70, 12)
CRAMPED = {"num_gpu_blocks_override": BLOCKS, "max_model_len": 128, "max_num_seqs": 8}
LONG = "The quick brown fox jumps over the lazy dog, and the cat sees it. "


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> Callable[[LLM], list[tuple[str, int]]]:
    """`preempted(llm)`: a list that grows by (request id, tokens written) with every preemption."""

    def watch(llm: LLM) -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []
        planner = scheduler(llm)
        original = planner._preempt_request

        def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((request.request_id, request.num_output_tokens))
            return original(request, *args, **kwargs)

        monkeypatch.setattr(planner, "_preempt_request", preempt)
        return seen

    return watch


def test_preemption_at_every_single_step_changes_no_outcome(
    plan: Plan, guarded: LLM, outcome: Outcome, preempted: Callable[[LLM], list[tuple[str, int]]]
) -> None:
    # A thinking budget does not survive preemption in V1 itself (vLLM 0.32: "<<<<" for ever).
    left_out = ("crowd", "idle", *(() if MRV2 else ("thinking", "end-of-thinking")))
    names = [n for n in plan.requests if not n.startswith(left_out)]
    if MRV2:  # a third of a second a step there
        kinds = ("greedy", "n2-halt", "thinking-halt", "many-", "only-pattern", "grammar-halt")
        names = [n for n in names if n.startswith(kinds)]
    seen = preempted(guarded)
    before = verdict_counts()
    replies = stream(
        guarded,
        [plan.requests[name] for name in names],
        each_step=lambda: scheduler(guarded).reset_prefix_cache(reset_running_requests=True),
    )
    for name, mine in zip(names, replies, strict=True):
        for reply, other in zip(mine, outcome.replies[name], strict=True):
            if name != "many-redirect":
                assert (name, reply.text, reply.tokens) == (name, other.text, other.tokens)
            said = reply.stop_reason
            if name.startswith("many") and said == "streamguard:unspecified":
                said = other.stop_reason  # the engine's memory went between marker and code
            assert (name, reply.finish_reason, said) == (
                name, other.finish_reason, other.stop_reason,
            )  # fmt: skip
    written = {number for _, number in seen}
    # In the middle of the pattern, and of the message that a redirect says in its place.
    assert {plan.base.found.index, plan.base.found.index + 2} <= written
    assert len(seen) > 3 * len(names)
    after = verdict_counts()
    verdicts = sum(r.finish_reason == "content_filter" for mine in replies for r in mine)
    assert sum(after.values()) - sum(before.values()) == verdicts


@pytest.fixture(scope="module")
def long_prompts(model: Path) -> list[list[int]]:
    """Prompts that take several chunks, of different lengths."""
    tokens = tokenizer(model).encode(LONG * 3)
    return [tokens[i : i + 3 * CHUNK + 5 * i] for i in range(3 if MRV2 else 6)]


@pytest.fixture(scope="module")
def chunked_references(model: Path, long_prompts: list[list[int]]) -> list[Reply]:
    requests = [Request(p, {"max_tokens": NUM_TOKENS}) for p in long_prompts]
    requests.append(Request(long_prompts[0][:CHUNK], {"max_tokens": 1}))
    return [replies[0] for replies in generate(engine(model, **CHUNKED), requests)]


@pytest.fixture(scope="module")
def chunked_patterns(model: Path, chunked_references: list[Reply]) -> dict[int, tuple[str, int]]:
    """Per prompt its pattern and the index that completes it."""
    found = {
        i: (f.literal, f.index)
        for i, reply in enumerate(chunked_references[:-1])
        if (f := spanning_pattern(model, reply.tokens, LONG * 3, first=2)) is not None
    }
    assert found
    return found


@pytest.fixture(scope="module")
def chunked(
    model: Path,
    long_prompts: list[list[int]],
    chunked_references: list[Reply],
    chunked_patterns: dict[int, tuple[str, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> LLM:
    literals = list(dict.fromkeys(literal for literal, _ in chunked_patterns.values()))
    # What the model would have said after the first chunk; nobody asked it to.
    pieces = token_bytes(model)
    between = pieces[long_prompts[0][CHUNK - 1]] + pieces[chunked_references[-1].tokens[0]]
    policies = {action: [rule(action, *literals)] for action in ACTIONS}
    policies["between-chunks"] = [rule("halt", between.decode(errors="ignore"))]
    folder = policy_folder(tmp_path_factory.mktemp("chunked") / "p", policies)
    return engine(model, folder, **CHUNKED)


def test_verdicts_after_a_prompt_in_chunks_and_after_a_cached_prompt(
    plan: Plan,
    chunked: LLM,
    long_prompts: list[list[int]],
    chunked_references: list[Reply],
    chunked_patterns: dict[int, tuple[str, int]],
) -> None:
    literals = [literal for literal, _ in chunked_patterns.values()]
    for action in ACTIONS:
        requests = [Request(p, {"max_tokens": NUM_TOKENS}, action) for p in long_prompts]
        for _ in ("computed", "cached"):
            for (reply,), reference in zip(
                generate(chunked, requests), chunked_references[:-1], strict=True
            ):
                at = [completed_at(plan.model, reference.tokens, text) for text in literals]
                index = min((i for i in at if i is not None), default=None)
                if index is None:
                    assert_same(reply, reference)
                else:
                    assert_obeys(
                        plan, reply, reference.tokens, index, action, max_tokens=NUM_TOKENS
                    )
    params = Request(long_prompts[0], {"max_tokens": 2}, "halt").sampling(True)
    prompt = {"prompt_token_ids": long_prompts[0]}
    output = chunked.generate([prompt], [params], use_tqdm=False)[0]  # type: ignore[list-item]
    assert output.num_cached_tokens >= CHUNK, "the prefix was not cached, so nothing was shown"


def test_sample_that_is_discarded_between_chunks_is_no_verdict(
    chunked: LLM, long_prompts: list[list[int]], chunked_references: list[Reply]
) -> None:
    scheduler(chunked).reset_prefix_cache()
    before = verdict_counts()
    request = Request(long_prompts[0], {"max_tokens": NUM_TOKENS}, "between-chunks")
    ((reply,),) = stream(chunked, [request])
    assert_same(reply, chunked_references[0])
    assert verdict_counts() == before
    # The very same sample, asked for, is one.
    ((reply,),) = stream(chunked, [Request(long_prompts[0][:CHUNK], {}, "between-chunks")])
    assert reply.finish_reason == "content_filter"


def test_requests_preempted_for_want_of_memory_keep_their_verdicts(
    plan: Plan,
    model: Path,
    tmp_path: Path,
    preempted: Callable[[LLM], list[tuple[str, int]]],
) -> None:
    prompts = tokenizer(model).encode(LONG)
    params = {"max_tokens": CROWD_TOKENS, "ignore_eos": True}
    requests = [Request(prompts[: 8 + i], params) for i in range(CROWD)]
    roomy = engine(model, **{**CRAMPED, "num_gpu_blocks_override": 64})
    references = [replies[0] for replies in generate(roomy, requests)]
    literals: dict[int, tuple[str, int]] = {}
    for i, reference in enumerate(references):
        # Late in the text, when the memory has run out.
        found = spanning_pattern(model, reference.tokens, LONG, first=18 if MRV2 else 30)
        if found is not None:
            literals[i] = (found.literal, found.index)
    assert len(literals) >= (2 if MRV2 else 3)
    policies = {f"p{i}": [rule(ACTIONS[i % 3], text)] for i, (text, _) in literals.items()}
    llm = engine(model, policy_folder(tmp_path / "p", policies), **CRAMPED)
    seen = preempted(llm)
    guarded = [
        Request(r.prompt, r.params, f"p{i}" if i in literals else None)
        for i, r in enumerate(requests)
    ]
    replies = [mine[0] for mine in stream(llm, guarded)]
    print(f"preempted (request, tokens written): {seen}")
    resumed = {int(name.split("-")[0]) for name, written in seen if written > 0}
    assert resumed & set(literals), "no request with a pattern was preempted after its first token"
    for i, (reply, reference) in enumerate(zip(replies, references, strict=True)):
        if i in literals:
            limit = int(params["max_tokens"])
            assert_obeys(
                plan, reply, reference.tokens, literals[i][1], ACTIONS[i % 3], max_tokens=limit
            )
        else:
            assert_same(reply, reference)
    assert MRV2 or any(MESSAGE in reply.text for reply in replies)
