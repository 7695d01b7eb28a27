"""The V1 sampler with a guard in it: decisions after sampling, alternatives scrubbed."""

from __future__ import annotations

from typing import Any

from vllm.v1.sample.sampler import Sampler

from streamguard.errors import AttestationError
from streamguard.vllm_plugin.runner_v1 import V1Body


class GuardedSampler(Sampler):
    """Decides after sampling, where a completing token's probability is exactly the model's."""

    streamguard_body: V1Body
    _scrub_next = False

    def sample(self, logits: Any, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        sampled, processed = super().sample(logits, sampling_metadata, *args, **kwargs)
        # gather_logprobs comes next for these rows, and only if logprobs were asked for.
        self._scrub_next = (sampling_metadata.max_num_logprobs or -1) >= 0
        return self.streamguard_body.after_sample(sampled, logits), processed

    def gather_logprobs(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        tensors = Sampler.gather_logprobs(*args, **kwargs)
        if self._scrub_next:
            self._scrub_next = False
            self.streamguard_body.scrub(tensors.logprob_token_ids, tensors.logprobs)
        return tensors


def guard_sampler(sampler: Any, body: V1Body) -> None:
    """Turn a sampler into a guarded one, in place."""
    if type(sampler) is not Sampler:
        raise AttestationError(
            f"this worker samples with {type(sampler).__module__}.{type(sampler).__qualname__}, which "
            f"streamguard does not know. Use vLLM's own sampler."
        )
    sampler.streamguard_body = body
    sampler.__class__ = GuardedSampler
