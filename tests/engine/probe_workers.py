"""An engine in a process of its own, with probes: print what each of its workers scored, as JSON.

Arguments: the model's folder, the policies', the number of tensor-parallel workers.
`test_probe_structures` runs this file.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind",
)  # fmt: skip


class ScoreKeeper:
    """Mixed into the workers: keeps the scores of every step."""

    model_runner: Any
    streamguard_probing: Any
    kept: list[list[float]]

    def keep_scores(self) -> None:
        self.kept = []
        mine = self.model_runner.sampler.streamguard_body
        original = mine.read_scores

        def read(slots: list[int], starts: Any, row_offsets: Any, *rest: Any) -> None:
            rows = self.streamguard_probing.tap.scores[: int(row_offsets[len(slots)])]
            self.kept += rows.tolist()
            original(slots, starts, row_offsets, *rest)

        mine.read_scores = read

    def kept_scores(self) -> list[list[float]]:
        return self.kept


def main() -> None:
    from vllm import LLM, SamplingParams

    model, policies, workers = sys.argv[1:]
    llm = LLM(
        model, tensor_parallel_size=int(workers), max_model_len=128, max_num_seqs=4, enforce_eager=True,
        num_gpu_blocks_override=32, block_size=32, dtype="float32",
        worker_extension_cls="probe_workers.ScoreKeeper",
        additional_config={"streamguard": {"policy": policies}},
    )  # fmt: skip
    llm.collective_rpc("keep_scores")
    params = SamplingParams(
        temperature=0, max_tokens=6, ignore_eos=True, extra_args={"streamguard_policy": "watch"}
    )
    (output,) = llm.generate(["The capital of France"], params, use_tqdm=False)
    scores = llm.collective_rpc("kept_scores")
    reply = output.outputs[0]
    tokens = [*output.prompt_token_ids, *reply.token_ids]
    found = {"scores": scores, "tokens": tokens, "finish_reason": reply.finish_reason}
    sys.stdout.flush()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
