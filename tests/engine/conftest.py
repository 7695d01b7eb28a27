"""Engines that the tests of a runner share: an unguarded one for references, a guarded one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import case_table
import pytest
from engines import MRV2, Reply, engine, generate, policy_folder, stream
from streamguard_counters import verdict_counts
from vllm import LLM


@pytest.fixture(scope="session")
def model(tiny_models: Callable[..., Path]) -> Path:
    """A tiny model with spare ids."""
    return tiny_models()


@pytest.fixture(scope="session")
def plain(model: Path) -> LLM:
    """The unguarded engine."""
    options = {
        "reasoning_config": case_table.REASONING,
        "structured_outputs_config": case_table.GRAMMAR,
    }
    return engine(model, **options)


@pytest.fixture(scope="session")
def plan(model: Path, plain: LLM) -> case_table.Plan:
    """References, policies and requests."""
    return case_table.plan(model, plain)


@pytest.fixture(scope="session")
def policies(plan: case_table.Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all policies of the plan."""
    return policy_folder(tmp_path_factory.mktemp("policies") / "all", plan.policies)


@pytest.fixture(scope="session")
def guarded(model: Path, policies: Path) -> LLM:
    """The guarded engine."""
    options = {
        "reasoning_config": case_table.REASONING,
        "structured_outputs_config": case_table.GRAMMAR,
    }
    return engine(model, policies, **options)


@dataclass
class Outcome:
    """What came back for every request of a plan, and how the counters moved meanwhile."""

    replies: dict[str, list[Reply]]
    counted: dict[str, float]


@pytest.fixture(scope="session")
def outcome(plan: case_table.Plan, guarded: LLM) -> Outcome:
    """All requests of the plan at once, not streaming."""
    before = verdict_counts()
    replies: dict[str, list[Reply]] = {}
    # Apart, since one request with logprobs makes the engine compute them for its whole batch.
    for apart in (True, False):
        part = {n: r for n, r in plan.requests.items() if ("logprobs" in r.params) == apart}
        replies |= zip(part, generate(guarded, list(part.values())), strict=True)
    after = verdict_counts()
    counted = {rule: n - before.get(rule, 0) for rule, n in after.items()}
    return Outcome(replies, {rule: n for rule, n in counted.items() if n})


@pytest.fixture(scope="session")
def streamed(plan: case_table.Plan, guarded: LLM) -> Outcome:
    """All requests of the plan at once, as a stream of deltas; a part of them in MRV2."""
    part = ("greedy", "n2", "many", "cut-message", "stop-in-message", "grammar", "word")
    chosen = {n: r for n, r in plan.requests.items() if not MRV2 or n.startswith(part)}
    replies = stream(guarded, list(chosen.values()))
    return Outcome(dict(zip(chosen, replies, strict=True)), {})
