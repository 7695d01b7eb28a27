"""The logits processor that vLLM loads, for both model runners.

Light to import: vLLM's frontend loads this class too. The two bodies come with construction, in the
workers only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as V2LogitsProcessor,
)

from streamguard.errors import AttestationError
from streamguard.vllm_plugin import register
from streamguard.vllm_plugin.settings import Context

if TYPE_CHECKING:
    from streamguard.vllm_plugin.runner_v1 import V1Body
    from streamguard.vllm_plugin.runner_v2 import V2Body
    from streamguard.vllm_plugin.runner_v2_host import V2HostBody


class StreamguardProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Commits tokens, masks logits and, attached to the sampler, turns samples into verdicts.

    V1: __init__(vllm_config, device, is_pin_memory); V2: __init__(vllm_config, req_states).
    Inert without a policy. Raises AttestationError if the general plugin did not run.
    """

    body: V1Body | V2Body | V2HostBody | None

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        self.body = None
        self.attested = False
        context = Context.from_config(vllm_config)
        if context is None:
            return
        if not register.registered:
            raise AttestationError(
                "the general plugin `streamguard` did not run in this process, so verdicts would not "
                "reach clients. VLLM_PLUGINS must list streamguard (or be unset)."
            )
        if len(rest) == 2:
            from streamguard.vllm_plugin.runner_v1 import V1Body

            self.body = V1Body(context, vllm_config)
        elif context.codes.kept_beside:
            from streamguard.vllm_plugin.runner_v2_host import V2HostBody

            self.body = V2HostBody(context, vllm_config, rest[0])
        else:
            from streamguard.vllm_plugin.runner_v2 import V2Body

            self.body = V2Body(context, vllm_config, rest[0])

    def is_argmax_invariant(self) -> bool:
        """V1: a mask changes the argmax. Without a policy the processor never needs to run."""
        return self.body is None

    def update_state(self, batch_update: Any) -> None:
        """V1: follow the persistent batch."""
        if self.body is not None:
            self._attested_body().update_state(batch_update)

    def add_request(self, req_idx: int, params: Any) -> bool:
        """V2: begin in a slot; True if the request's logits may need a mask."""
        return self.body is not None and bool(self._attested_body().add_request(req_idx, params))

    def apply_staged_writes(self) -> None:
        """V2: bring what `add_request` noted to the device."""
        if self.body is not None:
            self._attested_body().apply_staged_writes()

    def apply(self, logits: Any, ctx: Any = None) -> Any:
        """Commit new tokens, then mask; both runners."""
        if self.body is not None:
            self.body.apply(logits, ctx)
        return logits

    def _attested_body(self) -> Any:
        if not self.attested:
            raise AttestationError(
                "the guard was built but never attested: this worker's load_model did not pass "
                "through streamguard. Use a vLLM worker class that inherits load_model."
            )
        return self.body
