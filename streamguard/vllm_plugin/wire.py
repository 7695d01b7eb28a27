"""From committed tokens to what the client reads: scripts come out, the verdict goes in.

Spare ids are taken out of an engine core output before the detokenizer, the logprobs processor and
the statistics see it, so no text, token id or logprob of them can reach a client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from streamguard.verdict import FAILED, UNKNOWN, VerdictReader
from streamguard.vllm_plugin import beside
from streamguard.vllm_plugin.settings import KEY, Context

FINISH_REASON = "content_filter"
_BY_SHA: dict[str, Context] = {}


class _NoTokens(list[int]):
    """An empty list that counts as something: vLLM's completions stream drops a chunk without text
    and tokens as "still prefilling", and with it the finish_reason of a verdict at the first token.
    """

    def __bool__(self) -> bool:
        return True


class _Response:
    """Verdict of one response, while it is being read."""

    def __init__(self, context: Context, request_id: str, policy: int) -> None:
        self.context = context
        self.request_id = request_id
        self.reader = VerdictReader(context.codes, policy)

    def stop_reason(self) -> str | None:
        """`streamguard:<rule id>` once a verdict stands."""
        rule = self.reader.rule
        if rule is None:
            return None
        if rule < 0:
            return {UNKNOWN: "streamguard:unspecified", FAILED: "streamguard:error"}[rule]
        return f"streamguard:{self.context.table.rules[rule].rule.id}"


def process_outputs(
    original: Callable[..., Any], self: Any, engine_core_outputs: list[Any], *args: Any, **kw: Any
) -> Any:
    """Around OutputProcessor.process_outputs."""
    for output in engine_core_outputs:
        state = self.request_states.get(output.request_id)
        response: _Response | None = getattr(state, "streamguard", None)
        if response is not None:
            _strip(response, state, output)
    return original(self, engine_core_outputs, *args, **kw)


def _strip(response: _Response, state: Any, output: Any) -> None:
    reader = response.reader
    before = reader.rule
    tokens = output.new_token_ids
    if tokens:
        shown = reader.feed(tokens)
        if len(shown) < len(tokens):
            output.new_token_ids = [tokens[i] for i in shown]
            if output.new_logprobs is not None:
                output.new_logprobs = _pick(output.new_logprobs, shown)
    codes = response.context.codes
    if codes.kept_beside:
        if reader.rule is None:
            reader.rule = beside.read(response.request_id)
        if reader.rule is not None and tokens and tokens[-1] == codes.eos_id:
            output.new_token_ids = tokens[:-1]  # the EOS that stands for the verdict
            if output.new_logprobs is not None:
                output.new_logprobs = _pick(output.new_logprobs, list(range(len(tokens) - 1)))
    if reader.rule is not None and before is None and state.detokenizer is not None:
        # A message is said to the end: the client's stop strings apply to the model's text only.
        detokenizer = state.detokenizer
        if getattr(detokenizer, "stop", None):
            detokenizer.stop = []
            detokenizer.stop_buffer_length = 0


def _pick(logprobs: Any, shown: list[int]) -> Any:
    """Keep the positions of a LogprobsLists slice that a client may see; None if none is left."""
    if not shown:
        return None
    return logprobs._replace(
        logprob_token_ids=logprobs.logprob_token_ids[shown],
        logprobs=logprobs.logprobs[shown],
        sampled_token_ranks=logprobs.sampled_token_ranks[shown],
    )


def from_new_request(original: Callable[..., Any], cls: Any, *args: Any, **kw: Any) -> Any:
    """Around RequestState.from_new_request: give a guarded request its reader."""
    state = original(cls, *args, **kw)
    request: Any = kw["request"] if "request" in kw else args[1]
    params = getattr(request, "sampling_params", None)
    entry = (getattr(params, "extra_args", None) or {}).get(KEY)
    if entry is not None:
        context = _BY_SHA[entry["guard"]]
        policy = context.table.policies.index(entry["policy"])
        state.streamguard = _Response(context, request.request_id, policy)
    return state


def remember(context: Context) -> str:
    """Register a context under a key that requests can carry; return the key."""
    key = f"{context.policies.sha256}:{context.table.vocabulary.sha256}"
    _BY_SHA[key] = context
    return key


def new_completion_output(
    original: Callable[..., Any], self: Any, token_ids: Any, finish_reason: Any, stop_reason: Any
) -> Any:
    """Around RequestState._new_completion_output: say why a response ended."""
    output = original(self, token_ids, finish_reason, stop_reason)
    response: _Response | None = getattr(self, "streamguard", None)
    reason = None if response is None else response.stop_reason()
    if reason is not None:
        if not output.token_ids:
            output.token_ids = _NoTokens()
        if output.finish_reason in ("stop", "length", "repetition"):
            output.finish_reason = FINISH_REASON
            output.stop_reason = reason
    return output


def accept_tokens(
    original: Callable[..., bool], self: Any, request: Any, new_token_ids: list[int]
) -> bool:
    """Around StructuredOutputManager.accept_tokens: a script is no part of the grammar's text."""
    params = request.sampling_params
    entry = (getattr(params, "extra_args", None) or {}).get(KEY) if params else None
    if entry is not None and new_token_ids:
        marks = entry["marks"]
        if getattr(request, "_streamguard_verdict", False) or any(t in marks for t in new_token_ids):
            request._streamguard_verdict = True
            return True
    return original(self, request, new_token_ids)
