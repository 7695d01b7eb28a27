"""The probes of one worker: their tap in the model, and what a step needs of its scores.

Installed after the model is loaded and before anything runs, so the ops are part of whatever is
traced, compiled or captured later. From then on the weights may not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

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

    table  columns of the scores. tap.scores float32[max_rows, num_columns] on the device.
    """

    def __init__(self, worker: Any, context: Context) -> None:
        """Install the tap in a worker's model. Raises ProbeError for a structure not understood."""
        config = worker.vllm_config
        self.table = ProbeTable.from_table(context.table)
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
        self._least = torch.zeros(1, dtype=torch.int64, device=worker.device)
        self.last = torch.zeros(1, dtype=torch.int64, device=worker.device)
        # On the host the same memory as arrays: each torch operation costs some 20 µs in a step.
        on_host = self.tap.steps.device.type == "cpu"
        self._counters = [self.tap.steps.numpy(), self.last.numpy()] if on_host else None
        self._scores = self.tap.scores.numpy() if on_host else None

    def begin(self) -> None:
        """Before a forward pass: no op has run yet.

        From zero in each step: a pass without requests (data parallelism) must not stand in for one
        in which the op is missing, and a second pass would have overwritten the scores.
        """
        if self._counters is None:
            torch._foreach_zero_([self.tap.steps, self.last])
            return
        for counter in self._counters:
            counter.fill(0)

    def counter(self) -> torch.Tensor:
        """int64[1] on the device: how often the op ran that ran least in this forward pass."""
        if len(self.tap.steps) == 1:
            return self.tap.steps
        torch.amin(self.tap.steps, 0, keepdim=True, out=self._least)
        return self._least

    def ran(self) -> bool:
        """Whether every op ran exactly once since the forward pass began. Waits for the device."""
        steps = self.tap.steps if self._counters is None else self._counters[0]
        return all(count == 1 for count in steps.tolist())

    def scores(self, num_rows: int) -> NDArray[np.float32]:
        """What the ops wrote of this step's rows: float32[>= num_rows, num_columns] on the host."""
        if self._scores is not None:
            return self._scores
        found: NDArray[np.float32] = self.tap.scores[:num_rows].cpu().numpy()
        return found


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
    probing = worker.streamguard_probing = Probing(worker, context)
    runner = worker.model_runner
    execute: Callable[..., Any] = runner.execute_model

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        probing.begin()
        return execute(*args, **kwargs)

    runner.execute_model = execute_model
    for owner in (worker, runner):
        for name in _CHANGES:
            if hasattr(owner, name):
                setattr(owner, name, _refusal(name))
    return probing


def prove(worker: Any) -> None:
    """Run two tokens through the engine's own graph: every op has to run exactly once; in the worker.

    After compilation and capture, so that a graph without the op (one from another cache, say) is
    found before a request is taken, and so is a layer with an output that is not understood.
    """
    worker = getattr(worker, "worker", worker)
    probing: Probing | None = getattr(worker, "streamguard_probing", None)
    if probing is None:
        return
    probing.begin()
    worker.model_runner._dummy_run(2)  # two, to tell tokens from several streams of one
    if not probing.ran():
        raise AttestationError(
            f"the ops that read hidden states for the probes ran {probing.tap.steps.tolist()} times in "
            f"one forward pass, instead of once each: the model that runs is not the one that was "
            f"loaded. Delete vLLM's compile cache; if that does not help, remove the probe rules."
        )


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
