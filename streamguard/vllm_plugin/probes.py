"""The probes of one worker: their tap in the model, and what a step needs of its scores.

Installed after the model is loaded and before anything runs, so the ops are part of whatever is
traced, compiled or captured later. From then on the weights may not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from streamguard.errors import AttestationError
from streamguard.probe.columns import ProbeTable
from streamguard.vllm_plugin import settings
from streamguard.vllm_plugin.settings import Context
from streamguard.vllm_plugin.tap import Tap

#: Methods with which weights or adapters change under a running engine, of workers and of runners.
_CHANGES = (
    "reload_weights",
    "update_weights",
    "start_weight_update",
    "start_draft_weight_update",
    "reset_weights",
    "elastic_ep_execute",
    "add_lora",
)


class Probing:
    """A tap that writes the scores of all probes, and a count of its work in the step under way.

    table   columns of the scores. tap.scores float32[max_rows, num_columns] on the device.
    counts  int64[num_taps + 1] on the device: how often each op ran in this forward pass; the last
            entry is what the device monitor remembers of it.
    """

    def __init__(self, worker: Any, context: Context) -> None:
        """Install the tap in a worker's model. Raises ProbeError for a structure not understood."""
        config = worker.vllm_config
        self.table = ProbeTable.from_table(context.table)
        self.watched = [self.table.uses(p) for p in range(len(context.table.policies))]
        self.tap = Tap(
            worker.model_runner.get_model(),
            config.model_config.hf_text_config.num_hidden_layers,
            _most_rows(config),
            worker.device,
        )
        self.tap.score(
            [
                (probe.card.layer, torch.from_numpy(probe.weight), torch.from_numpy(probe.bias))
                for probe in self.table.probes
            ]
        )

    def ran(self) -> bool:
        """Whether every op ran exactly once since the forward pass began. Waits for the device."""
        return bool((self.tap.steps == 1).all())


def install(worker: Any, context: Context) -> Probing | None:
    """Put the probes of the policies into a worker's loaded model; None if there are none.

    Raises ProbeError, or AttestationError if nobody checked that they fit the model.
    """
    if not context.uses_probes:
        return None
    if settings.stale_probes(worker.vllm_config) is None:
        raise AttestationError(
            "the engine's configuration did not pass through streamguard, so nobody checked that the "
            "probes fit the served model. Configure the engine with vLLM's EngineArgs."
        )
    probing = Probing(worker, context)
    runner = worker.model_runner
    execute: Callable[..., Any] = runner.execute_model

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        # From zero in each step: a pass without requests (data parallelism) must not stand in for one
        # in which the op is missing, and a second pass would have overwritten the scores.
        probing.tap.steps.zero_()
        return execute(*args, **kwargs)

    runner.execute_model = execute_model
    for owner in (worker, runner):
        for name in _CHANGES:
            if hasattr(owner, name):
                setattr(owner, name, _refusal(name))
    return probing


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise AttestationError(
            f"{name}: the policy has probe rules, and probes are good for the weights that they were "
            f"fitted on only. Start an engine with the new weights, and probes for them."
        )

    return refuse


def _most_rows(config: Any) -> int:
    """The largest batch, padding to the size of a captured graph included."""
    captured = getattr(config.compilation_config, "cudagraph_capture_sizes", None) or ()
    return max(config.scheduler_config.max_num_batched_tokens, *captured, 1)
