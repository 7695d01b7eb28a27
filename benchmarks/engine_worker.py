"""A real vLLM engine in a process of its own that generates a round when told to.

Run by `bench_engine` as `python -m benchmarks.engine_worker COMMANDS REPLIES` (two inherited pipe
ends): one JSON object a line in, one out. Guarded if STREAMGUARD_POLICY is set, else the plugin is
installed but inert.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from typing import Any, TextIO

from benchmarks.workload import sentences

#: vLLM reads these when imported.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
PHASES = ("commit", "mask", "decide", "probe")


class Engine:
    """The model, and the guard's own clock if there is a guard."""

    def __init__(self, model: str, max_batch: int) -> None:
        from vllm import LLM

        self._llm = LLM(
            model,
            max_model_len=512,
            max_num_seqs=max_batch,
            enforce_eager=True,
            enable_prefix_caching=False,
        )
        self._prompts = [prompt for prompt, _ in zip(sentences(1), range(max_batch), strict=False)]
        self._num_requests = 0

    def round(self, batch: int, num_tokens: int, policy: str | None) -> dict[str, Any]:
        """Generate num_tokens tokens for each of `batch` prompts, greedily.

        Returns seconds in all and of each decode step, CPU seconds (all threads) of each decode
        step, the guard's own seconds by phase, and the tokens of every request.
        """
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        extra = {"streamguard_policy": policy} if policy else None
        guard_before = guard_seconds()
        tokens: dict[str, list[int]] = {}
        reasons: dict[str, str] = {}
        ends, cpu_ends = [], []
        started = time.perf_counter()
        for prompt in self._prompts[:batch]:
            self._num_requests += 1
            engine.add_request(
                str(self._num_requests),
                prompt,
                SamplingParams(
                    temperature=0, max_tokens=num_tokens, ignore_eos=True, extra_args=extra
                ),
            )
        while engine.has_unfinished_requests():
            outputs = engine.step()
            ends.append(time.perf_counter())
            cpu_ends.append(time.process_time())
            for output in outputs:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
                reasons[output.request_id] = str(output.outputs[0].finish_reason)
        return {
            "seconds": ends[-1] - started,
            "step_seconds": [b - a for a, b in itertools.pairwise(ends)],
            "step_cpu_seconds": [b - a for a, b in itertools.pairwise(cpu_ends)],
            "guard_seconds": {p: s - guard_before[p] for p, s in guard_seconds().items()},
            "tokens": [tokens[key] for key in sorted(tokens, key=int)],
            "reasons": sorted(set(reasons.values())),
        }


def guard_seconds() -> dict[str, float]:
    """Sums of streamguard_step_seconds, as /metrics would show them; nothing if unguarded."""
    from prometheus_client import REGISTRY

    found = {}
    for phase in PHASES:
        value = REGISTRY.get_sample_value("streamguard_step_seconds_sum", {"phase": phase})
        if value is not None:
            found[phase] = value
    return found


def serve(commands: TextIO, replies: TextIO) -> None:
    """Answer commands until the pipe closes. The first one builds the engine."""
    engine = None
    for line in commands:
        command = json.loads(line)
        if engine is None:
            started = time.perf_counter()
            engine = Engine(**command)
            reply: dict[str, Any] = {"seconds": time.perf_counter() - started}
        else:
            reply = engine.round(**command)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    read_end, write_end = (int(argument) for argument in sys.argv[1:3])
    serve(os.fdopen(read_end), os.fdopen(write_end, "w"))
