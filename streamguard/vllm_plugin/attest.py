"""Put the guard into a worker's sampler after the model is loaded, and prove that it is there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from streamguard.errors import AttestationError
from streamguard.vllm_plugin.settings import Context

logger = logging.getLogger("vllm.streamguard")
PROVEN = "in place"
NO_SAMPLER = "no sampler on this pipeline rank"


def load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Around Worker.load_model: attach to the sampler, in every worker.

    Raises AttestationError unless exactly one processor of ours is in place.
    """
    result = original(self, *args, **kwargs)
    context = Context.from_config(self.vllm_config)
    if context is None:
        return result
    from streamguard.vllm_plugin import probes

    probing = probes.install(self, context)
    runner = self.model_runner
    sampler = getattr(runner, "sampler", None)
    if sampler is None:
        self.streamguard_attestation = NO_SAMPLER
        return result
    from streamguard.vllm_plugin.processor import StreamguardProcessor

    if hasattr(sampler, "logits_processors"):
        found = sampler.logits_processors
    else:
        found = list(runner.input_batch.logitsprocs.all)
        # Under async scheduling the output lists hold -1 unless a processor is known to read them;
        # vLLM looks at --logits-processors only, not at entry points.
        runner.input_batch.logitsprocs_need_output_token_ids = True
    mine = [p for p in found if isinstance(p, StreamguardProcessor)]
    if len(mine) != 1:
        raise AttestationError(
            f"{len(mine)} streamguard processors are in this worker's sampler, exactly 1 is needed "
            f"(processors: {', '.join(type(p).__name__ for p in found)}). Check that vllm-streamguard "
            f"is installed once and that nothing else changes logits processors."
        )
    processor = mine[0]
    body = processor.body
    assert body is not None
    body.attach(runner)
    if probing is not None:
        body.watch(probing)
    processor.attested = True
    self.streamguard_attestation = PROVEN
    if getattr(self, "is_driver_worker", True):
        program = context.program
        names = {name: policy.sha256 for name, policy in context.policies.policies.items()}
        context.worker_metrics.started(names, program.compile_seconds, program.size_bytes)
        logger.info(
            "streamguard: in place (%s%s); %d states, %.1f MB, compiled in %.2f s",
            type(body).__name__,
            "" if probing is None else f", {probing.table.num_columns} scores a token",
            program.num_states,
            program.size_bytes / 1e6,
            program.compile_seconds,
        )
    return result


def attestation(worker: Any) -> str:
    """What a worker can say for itself; runs in the worker."""
    worker = getattr(worker, "worker", worker)
    return str(getattr(worker, "streamguard_attestation", "nothing attested"))


def initialize_kv_caches(original: Callable[..., Any], self: Any, config: Any) -> Any:
    """Around EngineCore._initialize_kv_caches: all workers must have attested by now.

    Behind it everything is compiled and captured: the probes' ops have to run in that.

    Covers worker classes that do not inherit load_model, and executors on other machines.
    """
    context = Context.from_config(config)
    if context is not None:
        said = self.model_executor.collective_rpc(attestation)
        if PROVEN not in said or not set(said) <= {PROVEN, NO_SAMPLER}:
            raise AttestationError(
                f"workers attested: {', '.join(said)}; each one with a sampler must have the guard in "
                f"place. Install vllm-streamguard on every machine and use a vLLM worker class that "
                f"inherits load_model."
            )
    result = original(self, config)
    if context is not None and context.uses_probes:
        from streamguard.vllm_plugin import probes

        self.model_executor.collective_rpc(probes.prove)
    return result
