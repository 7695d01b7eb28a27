"""A halt happens exactly as often as the unguarded sampler would have completed the match."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from case_table import rule
from engines import MRV2, Request, engine, generate, policy_folder, token_bytes
from vllm import LLM

pytestmark = pytest.mark.engine

#: Requests per setting and engine; the interpreter takes 30 ms for one.
NUM_SAMPLES = 64 if MRV2 else 1000
#: |z| of two equal rates stays below this with probability 0.999.
INTERVAL = 3.29
PROMPT = "The cat"
SETTINGS = {
    "temperature-1": {"temperature": 1.0},
    "temperature-0.7": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 20},
    "top_p": {"temperature": 1.0, "top_p": 0.7},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
}


def first_tokens(llm: LLM, params: dict[str, float], seeds: range, policy: str | None) -> list[int]:
    """The first token of one request per seed, -1 for a halt."""
    requests = [
        Request(PROMPT, {**params, "seed": seed, "max_tokens": 1}, policy) for seed in seeds
    ]
    replies = [mine[0] for mine in generate(llm, requests)]
    for reply in replies:
        assert bool(reply.tokens) == (reply.finish_reason != "content_filter")
    return [reply.tokens[0] if reply.tokens else -1 for reply in replies]


@pytest.fixture(scope="module")
def patterns(model: Path, plain: LLM) -> list[str]:
    """Whole tokens that together are written first in every setting, though not always."""
    pieces = token_bytes(model)
    found: dict[bytes, None] = {}
    for name, params in SETTINGS.items():
        pilot = first_tokens(plain, params, range(10**6, 10**6 + 24), None)
        words = {pieces[t]: None for t in pilot if pieces[t].isalpha() and pieces[t].isascii()}
        assert len(words) >= 2, name
        found |= dict.fromkeys(list(words)[::2])
    return [text.decode() for text in found]


@pytest.fixture(scope="module")
def halting(model: Path, patterns: list[str], tmp_path_factory: pytest.TempPathFactory) -> LLM:
    policies = {"count": [rule("halt", *patterns)]}
    return engine(model, policy_folder(tmp_path_factory.mktemp("statistics") / "p", policies))


@pytest.mark.parametrize("name", SETTINGS)
def test_rate_of_halts_equals_the_unguarded_rate_of_completions(
    name: str, model: Path, plain: LLM, halting: LLM, patterns: list[str]
) -> None:
    pieces = token_bytes(model)
    literals = [text.encode() for text in patterns]

    def completes(token: int) -> bool:
        return any(literal in pieces[token] for literal in literals)

    seeds, others = range(NUM_SAMPLES), range(NUM_SAMPLES, 2 * NUM_SAMPLES)
    unguarded = first_tokens(plain, SETTINGS[name], seeds, None)
    coupled = first_tokens(halting, SETTINGS[name], seeds, "count")
    # At equal seeds the guard halts exactly where the model completes, and changes nothing else.
    assert coupled == [-1 if completes(token) else token for token in unguarded]

    independent = first_tokens(halting, SETTINGS[name], others, "count")
    n = NUM_SAMPLES
    halts, completions = independent.count(-1), sum(map(completes, unguarded))
    pooled = (halts + completions) / (2 * n)
    z = (halts - completions) / n / math.sqrt(max(pooled * (1 - pooled), 1e-9) * 2 / n)
    print(f"{name}: {halts} halts, {completions} unguarded completions of {n}: z = {z:+.2f}")
    assert 0 < completions < n
    assert abs(z) < INTERVAL
