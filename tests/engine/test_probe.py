"""Probe rules in a running engine: the right scores, decisions before the next token, no silent pass."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import probe_engines
import pytest
import torch
from engines import MRV2, Request, engine, scheduler, stream, token_bytes, tokenizer
from probe_engines import NEVER, NOISE, Watched, aimed, body, expected_scores, probe_of
from prometheus_client import REGISTRY
from streamguard_counters import samples, verdict_counts
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import LLM

from streamguard.errors import AttestationError

pytestmark = pytest.mark.engine

CHUNK = 32
NUM_TOKENS = 8
AT = 3
#: Chunks, a prefix cache, and blocks that a prompt of a test fills.
OPTIONS = {
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": CHUNK,
    "max_num_seqs": 8,
    "enable_prefix_caching": True,
    "max_model_len": 128,
    "num_gpu_blocks_override": 64,
}
LONG = "The quick brown fox jumps over the lazy dog, and the cat sees it. "
MESSAGE = "Let us talk of boats."


@dataclass
class Case:
    """An engine with probes at two layers, and what the model says without them."""

    model: Path
    watched: Watched
    prompts: list[list[int]]
    references: list[list[int]]
    probes: list[Any]

    @property
    def llm(self) -> LLM:
        return self.watched.llm

    def request(self, policy: str, prompt: int = 0, **params: Any) -> Request:
        return Request(self.prompts[prompt], {"max_tokens": NUM_TOKENS, **params}, policy)

    def assert_scores(self, request: str, tokens: list[int], first: int, end: int) -> None:
        """At every position in between the engine used what Hugging Face says, each time."""
        expected = expected_scores(self.model, tokens, self.probes)
        for position in range(first, end):
            used = self.watched.of(request, position)
            assert used, (request, position)
            for scores in used:
                np.testing.assert_allclose(scores, expected[position], atol=NOISE, rtol=NOISE)


def make_case(model: Path, folder: Path) -> Case:
    ids = tokenizer(model).encode(LONG * 2)
    # The first takes two chunks; the second and third begin with the same full block.
    prompts = [ids[:50], ids[3:20], [*ids[:40], *ids[5:11]], ids[7:12]]
    references = probe_engines.references(model, prompts, NUM_TOKENS, **OPTIONS)
    text = prompts[0] + references[0]
    output = range(50, len(text))
    probes = {
        "middle": probe_of(model, 0, heads=3, seed=1),
        "norm": probe_of(model, "norm", seed=2),
        "aimed": aimed(model, text, 0, output, 50 + AT, seed=3),
        "prompted": aimed(model, text, 1, range(50), 20, seed=4, stage="prompt"),
    }
    watching = [
        {"id": "watch-middle", "action": "observe", "probe": "middle.safetensors",
         "head": "head-1", "threshold": NEVER},
        {"id": "watch-norm", "action": "halt", "probe": "norm.safetensors", "threshold": NEVER},
    ]  # fmt: skip
    aim = {"probe": "aimed.safetensors", "threshold": 0}
    read = {"probe": "prompted.safetensors", "threshold": 0, "stage": "prompt"}
    piece = token_bytes(model)[references[0][1]].decode(errors="ignore")
    rules: dict[str, list[dict[str, Any]]] = {
        "watch": watching,
        "pass": [*watching, {"id": "piece", "action": "halt", "literals": [piece]}],
        "halt": [{"id": "aimed-halt", "action": "halt", **aim}],
        "redirect": [{"id": "aimed-say", "action": "redirect", "message": MESSAGE, **aim}],
        "observe": [{"id": "aimed-note", "action": "observe", **aim}],
        "prompt": [{"id": "prompt-halt", "action": "halt", **read}],
        "prompt-observe": [{"id": "prompt-note", "action": "observe", **read}],
    }
    probe_engines.policies(folder, probes, rules, passing=["pass"])
    llm = engine(model, folder, **OPTIONS)
    # Columns are in the order of the policies' names (files in a folder are read so).
    order = list(body(llm).probing.table.probes)
    return Case(model, Watched(llm), prompts, references, order)


@pytest.fixture(scope="module", params=["in-stream", "kept-beside"] if MRV2 else ["in-stream"])
def case(
    request: pytest.FixtureRequest,
    tiny_models: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    """In Model Runner V2 also with the body on the host, which a vocabulary without spare ids needs."""
    model = tiny_models() if request.param == "in-stream" else tiny_models(spare_ids=False)
    return make_case(model, tmp_path_factory.mktemp("probes") / "policies")


def test_engine_uses_the_scores_of_hugging_face_in_chunks_and_behind_a_cached_prefix(
    case: Case,
) -> None:
    requests = [case.request("watch", i) for i in range(len(case.prompts))]
    for again in range(2):
        for (name, tokens, reply), reference in zip(
            case.watched.run(requests), case.references, strict=True
        ):
            assert reply.tokens == reference
            length = len(tokens) - len(reply.tokens)
            case.assert_scores(name, tokens, length, len(tokens) - 1)
            computed = [p for p in range(length) if case.watched.of(name, p)]
            case.assert_scores(name, tokens, computed[0], computed[-1] + 1)
            if length == 50:
                assert computed[0] == (32 if again else 0), "the prefix was to be cached"


@pytest.mark.parametrize("prompt", [0, 1])
def test_preempted_text_is_read_again_though_its_own_output_is_cached(
    case: Case, monkeypatch: pytest.MonkeyPatch, prompt: int
) -> None:
    planner = scheduler(case.llm)
    # The blocks of what was computed stay in the cache, as where memory is not that short.
    monkeypatch.setattr(planner.kv_cache_manager, "reset_prefix_cache", lambda: True)
    steps = iter(range(1000))

    def preempt() -> None:
        if next(steps) in (4, 19):  # then a block that ends in its output is full
            planner.reset_prefix_cache(reset_running_requests=True)

    before = verdict_counts()
    params = {"max_tokens": 22, "min_tokens": 22}
    request = Request(case.prompts[prompt], params, "watch")
    ((_, tokens, whole),) = case.watched.run([request])
    case.watched.used.clear()
    (((reply,)),) = stream(case.llm, [request], preempt)
    assert reply.tokens == whole.tokens
    assert reply.finish_reason == whole.finish_reason == "length"
    length = len(case.prompts[prompt])
    (name,) = {request for request, _ in case.watched.used}
    case.assert_scores(name, tokens, length, len(tokens) - 1)
    assert max(len(case.watched.of(name, p)) for p in range(length, len(tokens))) > 1
    assert verdict_counts() == before


def test_halt_ends_the_text_at_exactly_the_token_behind_the_score(case: Case) -> None:
    before = verdict_counts()
    ((name, _, reply),) = case.watched.run([case.request("halt")])
    assert reply.tokens == case.references[0][: AT + 1]
    assert (reply.finish_reason, reply.stop_reason) == ("content_filter", "streamguard:aimed-halt")
    assert verdict_counts()["aimed-halt"] - before.get("aimed-halt", 0) == 1
    column = case.probes.index(next(p for p in case.probes if p.bias[0] == 0 and p.card.layer == 0))
    offset = sum(len(p.heads) for p in case.probes[:column])
    scores = [float(case.watched.of(name, 50 + i)[0][offset]) for i in range(AT + 1)]
    assert [score > 0 for score in scores] == [False] * AT + [True]


def test_redirect_says_its_message_from_there_on(case: Case) -> None:
    ((_, _, reply),) = case.watched.run([case.request("redirect", max_tokens=24)])
    assert reply.finish_reason == "content_filter"
    assert reply.stop_reason == "streamguard:aimed-say"
    assert reply.text.endswith(MESSAGE)
    assert reply.tokens[: AT + 1] == case.references[0][: AT + 1]


def test_observe_counts_a_crossing_once_and_changes_nothing(case: Case) -> None:
    before = verdict_counts()
    ((_, _, reply),) = case.watched.run([case.request("observe")])
    assert reply.tokens == case.references[0]
    assert verdict_counts()["aimed-note"] - before.get("aimed-note", 0) == 1


@pytest.mark.parametrize("kind", ["prompt", "prompt-observe"])
def test_prompt_is_read_whole_in_chunks_and_though_it_is_cached(case: Case, kind: str) -> None:
    rule = {"prompt": "prompt-halt", "prompt-observe": "prompt-note"}[kind]
    case.watched.run([case.request("watch")])  # now it is cached
    for _ in range(2):
        before = verdict_counts()
        ((name, tokens, reply),) = case.watched.run([case.request(kind)])
        case.assert_scores(name, tokens, 0, 50)
        assert verdict_counts()[rule] - before.get(rule, 0) == 1
        if kind == "prompt":
            assert reply.tokens == []
            assert reply.stop_reason == "streamguard:prompt-halt"
        else:
            assert reply.tokens == case.references[0]


def score_buckets(name: str) -> dict[float, float]:
    """Upper bound -> scores counted up to it."""
    found = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name == "streamguard_probe_score_bucket" and sample.labels["probe"] == name:
                found[float(sample.labels["le"])] = sample.value
    return found


def test_scores_are_on_the_metrics_page(case: Case) -> None:
    before = samples("streamguard_probe_score_count", "probe")
    bucket_before = score_buckets("middle/head-1")
    sum_before = samples("streamguard_probe_score_sum", "probe").get("middle/head-1", 0)
    ((name, _, _),) = case.watched.run([case.request("watch")])
    after = samples("streamguard_probe_score_count", "probe")
    grown = {name: after[name] - before.get(name, 0) for name in after}
    # One score for each token that a sample was taken behind: the prompt's is no output.
    assert grown["middle/head-1"] == grown["norm/head-0"] == NUM_TOKENS - 1
    assert grown["middle/head-0"] == grown["aimed/head-0"] == 0
    column = body(case.llm).context.score_names.index("middle/head-1")
    used = [case.watched.of(name, 50 + i)[0][column] for i in range(NUM_TOKENS - 1)]
    for bound, count in score_buckets("middle/head-1").items():
        expected = sum(score <= bound for score in used)
        assert count - bucket_before.get(bound, 0) == expected, bound
    total = samples("streamguard_probe_score_sum", "probe")["middle/head-1"] - sum_before
    assert total == pytest.approx(sum(map(float, used)), abs=1e-3)
    assert samples("streamguard_step_seconds_count", "phase")["probe"] > 0


class Recorder(TorchDispatchMode):
    """Notes every operation that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def waiting(seen: list[str]) -> list[str]:
    """Those operations of a recording that would wait for a device."""
    words = ("_local_scalar_dense", "nonzero", "item", "_to_copy", "unique", "masked_select")
    return [name for name in seen if any(word in name for word in words)]


def test_op_in_the_forward_pass_waits_for_nothing(case: Case) -> None:
    module, _, _ = tapped(case)[0]
    states = torch.ones((3, 64))
    ops = torch.ops.streamguard.score
    buffers = [getattr(module, f"_streamguard_0_{name}") for name in ("weight", "bias")]
    into = torch.zeros((4, 3)), torch.zeros(1, dtype=torch.int64)
    width = buffers[0].shape[1]
    with Recorder() as ran:
        ops(states, states, *buffers, into[0][:, :width], into[1], 0, 0)
    assert ran.seen
    assert waiting(ran.seen) == []
    with Recorder() as waits:
        into[1].item()
    assert waiting(waits.seen)


if MRV2:

    def test_step_on_the_device_waits_for_nothing(
        case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine = body(case.llm)
        probes = getattr(mine, "_device_probes", None)
        if probes is None:  # the body on the host waits once a step
            assert type(mine).__name__ == "V2HostBody"
            return
        grids: list[tuple[int, ...]] = []

        class Launches:
            """What is left of a launch is what the launching code does itself."""

            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                grids.append(grid)
                return lambda *_, **__: None

        from streamguard_kernels import device, device_probe, device_scores

        monkeypatch.setattr(device_probe, "_read_kernel", Launches())
        monkeypatch.setattr(device_scores, "_count_kernel", Launches())
        monkeypatch.setattr(device, "_decide_kernel", Launches())
        monkeypatch.setattr(device, "_advance_kernel", Launches())
        row = torch.arange(4)
        batch = SimpleNamespace(query_start_loc=row, positions=row, idx_mapping=row[:3])
        monkeypatch.setattr(mine, "input_batch", batch)
        monkeypatch.setattr(probes, "read", partial(type(probes).read, probes))  # nobody watches
        monkeypatch.setattr(
            mine, "_publish", lambda _counted: None
        )  # of its own thread on a device
        monkeypatch.setattr(mine, "_counted", list)
        monkeypatch.setattr(mine, "_policy", np.zeros(8, np.int64))
        monkeypatch.setattr(mine.probing, "_counters", None)  # as on a device
        with Recorder() as ran:
            mine.probing.begin()
            mine.after_sample(row[:3], None, row[:3], np.arange(3), row[:3], np.zeros(3))
        assert len(grids) == 4  # commit, read, count, decide
        assert waiting(ran.seen) == []


def tapped(case: Case) -> list[tuple[Any, type, list[str]]]:
    return body(case.llm).probing.tap._tapped


@pytest.fixture
def no_op(case: Case) -> Iterator[None]:
    """One of the tapped modules has its own forward pass back: the op is gone from the graph."""
    module, original, _ = tapped(case)[0]
    mine = type(module)
    module.__class__ = original
    yield
    module.__class__ = mine


@pytest.fixture
def frozen_counter(case: Case) -> Iterator[None]:
    module, _, names = tapped(case)[-1]
    name = next(name for name in names if name.endswith("steps"))
    mine = getattr(module, name)
    setattr(module, name, mine.clone())
    yield
    setattr(module, name, mine)


@pytest.fixture
def no_number(case: Case) -> Iterator[None]:
    kept = [(m, name) for m, _, names in tapped(case) for name in names if name.endswith("weight")]
    values = [getattr(module, name)[0].clone() for module, name in kept]
    for module, name in kept:
        getattr(module, name)[0] = torch.nan
    yield
    for (module, name), value in zip(kept, values, strict=True):
        getattr(module, name)[0] = value


@pytest.fixture
def activations(case: Case) -> Iterator[None]:
    """An activation of the model itself is no number from the second token on: its embedding."""
    weight = body(case.llm).runner.get_model().model.embed_tokens.weight
    token = case.references[0][1]
    kept = weight[token].clone()
    with torch.inference_mode():
        weight.data[token] = torch.inf
    yield
    with torch.inference_mode():
        weight.data[token] = kept
    case.llm.reset_prefix_cache()  # what was computed meanwhile is no number either


@pytest.mark.parametrize("fault", ["no_op", "frozen_counter", "no_number"])
def test_broken_tap_never_ends_in_silent_pass(
    case: Case, request: pytest.FixtureRequest, fault: str
) -> None:
    request.getfixturevalue(fault)
    before = samples("streamguard_errors_total", "kind").get("step", 0)
    runs = case.watched.run([case.request("watch"), case.request("pass"), case.request("default")])
    blocked, passed, other = (reply for _, _, reply in runs)
    assert blocked.finish_reason == "content_filter"
    assert blocked.stop_reason == "streamguard:error"
    # The prompt's last token has no score that an output rule reads, but the op has to have run.
    assert blocked.tokens == case.references[0][: 1 if fault == "no_number" else 0]
    # Its patterns go on.
    assert passed.stop_reason == "streamguard:piece"
    assert other.tokens == case.references[0]
    assert samples("streamguard_errors_total", "kind")["step"] > before


def test_engine_is_well_after_a_fault(case: Case) -> None:
    ((_, _, reply),) = case.watched.run([case.request("watch")])
    assert reply.tokens == case.references[0]


def test_activation_that_is_no_number_ends_the_text(case: Case, activations: None) -> None:
    ((_, _, reply),) = case.watched.run([case.request("watch", max_tokens=16)])
    assert (reply.finish_reason, reply.stop_reason) == ("content_filter", "streamguard:error")


@pytest.mark.parametrize(
    "method", ["reload_weights", "update_weights", "start_weight_update", "add_lora"]
)
def test_weights_cannot_change_under_a_probe(case: Case, method: str) -> None:
    with pytest.raises(AttestationError, match=f"{method}: the policy has probe rules"):
        case.llm.collective_rpc(method, args=(None,))


def test_a_mixed_batch_has_each_decision_in_its_own_row(case: Case) -> None:
    names = ["halt", "watch", "observe", "prompt", "default", "redirect"]
    runs = case.watched.run([case.request(name, max_tokens=24) for name in names])
    ends = collections.Counter(str(reply.stop_reason) for _, _, reply in runs)
    assert ends["streamguard:aimed-halt"] == ends["streamguard:prompt-halt"] == 1
    assert ends["streamguard:aimed-say"] == 1
    for (_, _, reply), name in zip(runs, names, strict=True):
        if name in ("watch", "observe", "default"):
            assert reply.tokens[:NUM_TOKENS] == case.references[0]
