"""Admission: which policy a request falls under, and what its parameters may not do.

Runs in the frontend, where an error becomes HTTP 400 and reaches no other request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from streamguard.errors import RequestError
from streamguard.vllm_plugin import wire
from streamguard.vllm_plugin.settings import KEY, Context

if TYPE_CHECKING:
    from vllm import SamplingParams

#: The client's key in vllm_xargs / SamplingParams.extra_args.
POLICY_ARGUMENT = "streamguard_policy"


def init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Around InputProcessor.__init__: load the rules once, before the first request."""
    original(self, *args, **kwargs)
    context = Context.from_config(self.vllm_config)
    if context is not None and context.word_hold is not None:
        context.word_hold.warm_up()
    self._streamguard = context


def process_inputs(
    original: Callable[..., Any], self: Any, request_id: str, prompt: Any, params: Any,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Around InputProcessor.process_inputs: validate, then complete the engine's own copy."""
    context: Context | None = self._streamguard
    from vllm import SamplingParams

    if context is None or not isinstance(params, SamplingParams):
        return original(self, request_id, prompt, params, *args, **kwargs)
    try:
        policy = choose_policy(context, params)
        check(context, params, resumable=bool(kwargs.get("resumable", False)))
        request = original(self, request_id, prompt, params, *args, **kwargs)
        complete(context, policy, request.sampling_params)
    except Exception as error:
        context.admission_metrics.refused()
        if isinstance(error, RequestError):
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(str(error)) from None
        raise
    context.admission_metrics.request(policy)
    return request


def choose_policy(context: Context, params: SamplingParams) -> str:
    """The operator's default, or the policy that the client asks for and may ask for.

    Raises RequestError.
    """
    extra = params.extra_args or {}
    unknown = [key for key in extra if key.startswith(KEY) and key != POLICY_ARGUMENT]
    if unknown:
        raise RequestError(
            f"vllm_xargs: unknown key {unknown[0]!r}; allowed: {POLICY_ARGUMENT!r}. Remove it."
        )
    policies = context.policies.policies
    if POLICY_ARGUMENT not in extra:
        return context.policies.default
    wanted = extra[POLICY_ARGUMENT]
    allowed = [name for name, policy in policies.items() if policy.client_selectable]
    if wanted not in allowed:
        names = ", ".join(sorted(allowed)) or "none on this server"
        raise RequestError(
            f"vllm_xargs: {POLICY_ARGUMENT} is {str(wanted)[:80]!r}; a client may choose: {names}. "
            f"Name one of these or leave the key out."
        )
    return str(wanted)


def check(context: Context, params: SamplingParams, *, resumable: bool) -> None:
    """Refuse what would show suppressed tokens or go on after a verdict. Raises RequestError."""
    if resumable:
        raise RequestError(
            "streaming input (resumable requests) is not guarded: a client could go on after a "
            "verdict. Send one request per turn."
        )
    if (params.prompt_logprobs or 0) != 0 or params.prompt_logprob_token_ids is not None:
        raise RequestError(
            f"prompt_logprobs is {params.prompt_logprobs}; under a policy only 0 is allowed, since "
            f"the alternatives at prompt positions show text that the policy forbids. Leave it out."
        )
    if params.logprobs is not None and params.logprobs < 0:
        raise RequestError(
            f"logprobs is {params.logprobs} (the whole vocabulary); under a policy a number of "
            f"alternatives (0 or more) is needed, since forbidden tokens are left out. Give a number."
        )
    reserved = context.codes.spare.intersection(params.stop_token_ids or ())
    if reserved:
        raise RequestError(
            f"stop_token_ids holds {min(reserved)}, an id that this server reserves for its own use "
            f"and no model output contains. Remove it."
        )


def complete(context: Context, policy: str, params: SamplingParams) -> None:
    """Make the engine's copy of the parameters stop on verdicts and carry the policy's name."""
    p = context.table.policies.index(policy)
    codes = context.codes
    end_tokens = list(params.stop_token_ids or [])
    if params.eos_token_id is not None:
        end_tokens.append(params.eos_token_id)
    params.extra_args = {
        **{k: v for k, v in (params.extra_args or {}).items() if k != POLICY_ARGUMENT},
        KEY: {
            "policy": policy,
            "guard": wire.remember(context),
            "ends": end_tokens,
            "marks": sorted(codes.spare) if not codes.kept_beside else [codes.eos_id],
            "probed": context.reads_hidden_states(policy),
        },
    }
    if context.reads_hidden_states(policy, "prompt"):
        # Cached tokens are not computed again, and what is not computed has no hidden states.
        params.skip_reading_prefix_cache = True
    if codes.kept_beside:
        # EOS has to end the response even where the client asked to ignore it.
        params.ignore_eos = False
    params.stop_token_ids = list(
        dict.fromkeys([*(params.stop_token_ids or []), *codes.stop_token_ids(p)])
    )


def preempt_request(
    original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around Scheduler._preempt_request: a text that resumes is computed anew if probes read it.

    Its own output may stand in the prefix cache by then; what is read from there has no scores.
    """
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    if (extra.get(KEY) or {}).get("probed"):
        request.skip_reading_prefix_cache = True
    return original(self, request, *args, **kwargs)


def wrap_beam_search(wrap: Callable[[Any, str, Callable[..., Any]], None]) -> None:
    """Refuse beam search: each of its steps is a new request, so no state would outlive a token."""
    from vllm.entrypoints.generate.beam_search import offline, online

    def refuse(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        processor = _input_processor(self)
        context = getattr(processor, "_streamguard", None)
        if processor is not None and context is None:
            return original(self, *args, **kwargs)
        if context is not None:
            context.admission_metrics.refused()
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            "use_beam_search: beam search is not guarded: each of its steps is a request of its "
            "own. Use sampling (n > 1 with temperature) instead."
        )

    for module in (offline, online):
        for owner in vars(module).values():
            if isinstance(owner, type) and "beam_search" in vars(owner):
                wrap(owner, "beam_search", refuse)


def _input_processor(entrypoint: Any) -> Any:
    """The input processor behind an LLM or a serving object; None if it cannot be found."""
    for path in ("llm_engine.input_processor", "engine_client.input_processor", "input_processor"):
        found: Any = entrypoint
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    return None
