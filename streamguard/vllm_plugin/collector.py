"""Inside a worker: write what the tap saw of each text to disk, while vLLM computes the texts.

`probe.collect` installs it by collective_rpc in an engine of its own, without a policy. Rows are
mapped to requests by the runner's own indices; texts are named by their number in the request's
extra_args, since vLLM renames requests.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamguard.errors import ProbeError
from streamguard.vllm_plugin.tap import Tap

ITEM = "streamguard_text"


class Collector:
    """Keeps the rows of each text from a position on, in one file a column group.

    rows.bin  [num_layers, num_rows, hidden_size] (capture) or [num_rows, num_columns] (score)
    done.bin  uint8[num_texts]: 1 once all rows of the text are written
    """

    def __init__(self, worker: Any, spec: dict[str, Any]) -> None:
        self.runner = worker.model_runner
        config = worker.vllm_config
        model = self.runner.get_model()
        hf = config.model_config.hf_text_config
        self.tap = Tap(
            model,
            hf.num_hidden_layers,
            config.scheduler_config.max_num_batched_tokens,
            worker.device,
        )
        folder = Path(spec["folder"])
        self.offsets = np.load(folder / "offsets.npy")
        self.starts = np.load(folder / "starts.npy")
        self.lengths = np.load(folder / "lengths.npy")
        num_rows = int(self.offsets[-1])
        self.writes = worker.rank == 0
        if "layers" in spec:
            layers = spec["layers"]
            hidden = config.model_config.get_hidden_size()
            self.tap.capture(spec["layers"], hidden, torch.bfloat16)
            shape: tuple[int, ...] = (len(spec["layers"]), num_rows, hidden)
            dtype: Any = np.uint16
        else:
            parts = [
                (layer, torch.from_numpy(w), torch.from_numpy(b)) for layer, w, b in spec["parts"]
            ]
            self.tap.score(parts)
            layers = [layer for layer, _, _ in parts]
            shape, dtype = (num_rows, self.tap.scores.shape[1]), np.float32
        if spec["stop"]:  # nothing of what these texts go on with is wanted
            self.tap.stop_behind(max(layers))
        self.captures = "layers" in spec
        if self.writes:
            self.rows = np.memmap(folder / "rows.bin", dtype, "r+", shape=shape)
            self.done = np.memmap(folder / "done.bin", np.uint8, "r+", shape=(len(self.starts),))
        self.text_of: dict[str, int] = {}
        self.seen = self.tap.steps.clone()
        original = self._original = self.runner.execute_model

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            for new in scheduled.scheduled_new_reqs:
                text = ((new.sampling_params or _NONE).extra_args or {}).get(ITEM)
                if text is not None:
                    self.text_of[new.req_id] = text
            for ended in scheduled.finished_req_ids:
                self.text_of.pop(ended, None)
            result = original(scheduled, *args, **kwargs)
            if scheduled.total_num_scheduled_tokens:
                self._keep()
            return result

        self.runner.execute_model = execute_model

    def _keep(self) -> None:
        if not bool((self.tap.steps > self.seen).all()):
            raise ProbeError(
                "the tap did not run in this step, so nothing is known of its texts. Use "
                "vLLM's own models and workers (no --load-format of another kind)."
            )
        self.seen = self.tap.steps.clone()
        if not self.writes:
            return
        for request, begin, count, position in rows_of(self.runner):
            text = self.text_of.get(request)
            if text is None:
                continue
            start, length = int(self.starts[text]), int(self.lengths[text])
            first, end = max(position, start), min(position + count, length)
            if first >= end:
                continue
            at = int(self.offsets[text]) + first - start
            rows = slice(begin + first - position, begin + end - position)
            if self.captures:
                found = self.tap.states[:, rows].contiguous().cpu().view(torch.uint16).numpy()
                self.rows[:, at : at + end - first] = found
            else:
                self.rows[at : at + end - first] = self.tap.scores[rows].cpu().numpy()
            if end == length:
                self.done[text] = 1

    def flush(self) -> None:
        """Make what was written last beyond a crash of the machine."""
        if self.writes:
            for array in (self.rows, self.done):
                base: Any = array.base
                if isinstance(base, mmap.mmap):
                    base.flush()

    def remove(self) -> None:
        """Take the taps out again."""
        self.runner.execute_model = self._original
        self.tap.remove()


class _NONE:
    extra_args = None


def rows_of(runner: Any) -> list[tuple[str, int, int, int]]:
    """(request id, first row, number of rows, position of the first) of the forward pass just made."""
    state = getattr(runner, "execute_model_state", None)
    batch = getattr(state, "input_batch", None)
    if batch is not None and hasattr(batch, "query_start_loc_np"):  # Model Runner V2
        ids, starts = batch.req_ids, batch.query_start_loc_np
        positions = batch.num_computed_tokens_np
    else:
        batch = runner.input_batch
        ids, starts = batch.req_ids, runner.query_start_loc.np
        positions = batch.num_computed_tokens_cpu
    return [
        (name, int(starts[i]), int(starts[i + 1] - starts[i]), int(positions[i]))
        for i, name in enumerate(ids)
    ]


def install(worker: Any, spec: dict[str, Any]) -> None:
    """Build a Collector in a worker; runs there."""
    worker = getattr(worker, "worker", worker)
    worker.streamguard_collector = Collector(worker, spec)


def remove(worker: Any) -> None:
    """Write everything out and take the taps out again; runs in the worker."""
    collector = getattr(worker, "worker", worker).streamguard_collector
    collector.flush()
    collector.remove()
