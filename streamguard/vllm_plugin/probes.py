"""The probes of one worker: their tap in the model, and what a step needs of its scores.

Installed after the model is loaded and before anything runs, so the ops are part of whatever is
traced, compiled or captured later. From then on the weights may not change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from streamguard.errors import AttestationError
from streamguard.metrics import SCORE_BOUNDS
from streamguard.probe.columns import ProbeTable
from streamguard.vllm_plugin import settings
from streamguard.vllm_plugin.settings import Context
from streamguard.vllm_plugin.tap import Tap

if TYPE_CHECKING:
    from streamguard.metrics import WorkerMetrics

_PUBLISH_EVERY_S = 0.25
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

    table    columns of the scores. tap.scores float32[max_rows, num_columns] on the device.
    watched  int32[num_policies, num_columns]: 1 = the policy reads the column in outputs, 2 = in
             prompts, 3 = in both.
    """

    def __init__(self, worker: Any, context: Context) -> None:
        """Install the tap in a worker's model. Raises ProbeError for a structure not understood."""
        config = worker.vllm_config
        self.table = ProbeTable.from_table(context.table)
        table = self.table
        self.watched = np.zeros((len(table.rule), table.num_columns), np.int32)
        for policy, monitor in zip(*np.nonzero(table.rule >= 0), strict=True):
            stage = 2 if table.stage[policy, monitor] else 1
            self.watched[policy, table.column[policy, monitor]] |= stage
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

    def begin(self) -> None:
        """Before a forward pass: no op has run yet.

        From zero in each step: a pass without requests (data parallelism) must not stand in for one
        in which the op is missing, and a second pass would have overwritten the scores.
        """
        torch._foreach_zero_([self.tap.steps, self.last])

    def counter(self) -> torch.Tensor:
        """int64[1] on the device: how often the op ran that ran least in this forward pass."""
        if len(self.tap.steps) == 1:
            return self.tap.steps
        torch.amin(self.tap.steps, 0, keepdim=True, out=self._least)
        return self._least

    def ran(self) -> bool:
        """Whether every op ran exactly once since the forward pass began. Waits for the device."""
        return bool((self.tap.steps == 1).all())


class ScoreCounter:
    """Counts scores by column and bucket on the host, and hands them to the metrics now and then.

    Here and not in the metrics: a step has too many scores to be written to shared memory each.
    """

    def __init__(self, probing: Probing, metrics: WorkerMetrics) -> None:
        self._watched = probing.watched
        self._metrics = metrics
        self._lock = threading.Lock()
        self._counts, self._sums = self._nothing()
        self._stepped = threading.Event()
        threading.Thread(target=self._publish_forever, daemon=True).start()

    def add(self, scores: Any, policies: Any, in_prompt: Any) -> None:
        """scores float32[n, num_columns]; policies int[n]; in_prompt bool[n]: whose tokens these are."""
        stage = np.where(in_prompt, 2, 1)[:, None]
        rows, columns = np.nonzero(self._watched[policies] & stage)
        if not len(rows):
            return
        values = scores[rows, columns]
        bucket = np.searchsorted(SCORE_BOUNDS, values)  # the first bound that is not below
        num_columns, num_buckets = self._counts.shape
        counts = np.bincount(columns * num_buckets + bucket, minlength=self._counts.size)
        sums = np.bincount(columns, values, num_columns)
        with self._lock:
            self._counts += counts.reshape(self._counts.shape)
            self._sums += sums
        self._stepped.set()

    def publish(self) -> None:
        """Hand over what was counted since the last time."""
        with self._lock:
            counts, sums = self._counts, self._sums
            self._counts, self._sums = self._nothing()
        self._metrics.scores(counts, sums)

    def _nothing(self) -> tuple[Any, Any]:
        columns = self._watched.shape[1]
        return np.zeros((columns, len(SCORE_BOUNDS) + 1), np.int64), np.zeros(columns)

    def _publish_forever(self) -> None:
        while True:
            self._stepped.wait()
            self._stepped.clear()
            time.sleep(_PUBLISH_EVERY_S)
            self.publish()


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
