"""Hidden states or scores of texts, computed by vLLM with the tap that serving uses.

Thresholds are only good for the stack that they were calibrated on, so nothing here goes through
another implementation of the model. What is computed is on disk at once: a run that is cut off goes
on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamguard.errors import ProbeError
from streamguard.probe.texts import Text

_BATCH = 64
_FILES = {"offsets.npy", "starts.npy", "lengths.npy", "rows.bin", "done.bin", "request.json"}


@dataclass
class Engine:
    """A vLLM engine for reading texts. Starts at the first use; one a process.

    options  further arguments of `vllm.LLM`, such as tensor_parallel_size or quantization.
    """

    model: str
    max_model_len: int
    options: dict[str, Any] = field(default_factory=dict)
    _llm: Any = None

    @property
    def llm(self) -> Any:
        """The engine. Raises ProbeError if vLLM cannot start it."""
        if self._llm is None:
            self._llm = self._start()
        return self._llm

    def _start(self) -> Any:
        # No policy guards this engine: it reads what a guard would stop.
        for name in ("STREAMGUARD_POLICY", "STREAMGUARD_REQUIRED"):
            os.environ.pop(name, None)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if int(self.options.get("tensor_parallel_size", 1)) == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        else:  # the collector is sent to the workers as a function, to processes of our own
            os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        from vllm import LLM

        defaults = {
            "max_model_len": self.max_model_len,
            "max_num_seqs": 64,
            "max_num_batched_tokens": max(4096, self.max_model_len),
            "enforce_eager": True,
            "enable_prefix_caching": False,  # a cached token's state would not be computed again
            "disable_log_stats": True,
        }
        logging.getLogger("vllm").setLevel(logging.ERROR)
        return LLM(self.model, **{**defaults, **self.options})

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        if self._llm is not None:
            shutdown = getattr(self._llm.llm_engine.engine_core, "shutdown", None)
            if shutdown is not None:
                shutdown()
            self._llm = None


@dataclass(frozen=True)
class Rows:
    """What was read of texts: `rows(i)` of text i.

    offsets int64[num_texts + 1]; array uint16[num_layers, num_rows, hidden_size], bfloat16 in it
    (hidden states), or float32[num_rows, num_columns] (scores); mapped from disk.
    """

    offsets: NDArray[np.int64]
    array: Any
    folder: Path


def hidden_states(
    engine: Engine,
    texts: Sequence[Text],
    layers: Sequence[int | str],
    folder: Path,
    *,
    stage: str = "output",
    fingerprint: str = "",
    progress: Callable[[int], None] = lambda _: None,
) -> Rows:
    """Compute the layers' outputs at each token of the texts' responses (or prompts).

    folder    where they are kept: 2 bytes x layers x hidden size x tokens. What a cut-off run for the
              same texts left there is taken over.
    progress  called with the number of tokens (`num_tokens`) read since the last call.
    Raises ProbeError if an activation is not finite, naming text and layer.
    """
    spec = {"layers": list(layers), "stop": all(isinstance(layer, int) for layer in layers)}
    hidden = engine.llm.llm_engine.model_config.get_hidden_size()
    shape = (len(layers), -1, hidden)
    rows = _collect(engine, texts, spec, folder, shape, np.uint16, stage, fingerprint, progress)
    _check_finite(rows, layers)
    return rows


def scores(
    engine: Engine,
    texts: Sequence[Text],
    parts: Sequence[tuple[int | str, NDArray[np.float32], NDArray[np.float32]]],
    folder: Path,
    *,
    stage: str = "output",
    fingerprint: str = "",
    progress: Callable[[int], None] = lambda _: None,
) -> Rows:
    """Compute a probe's scores at each token, exactly as serving does.

    parts  (layer, weight, bias) of each probe; their columns side by side.
    """
    stop = all(isinstance(layer, int) for layer, _, _ in parts)
    spec = {"parts": list(parts), "stop": stop}
    columns = sum(weight.shape[1] for _, weight, _ in parts)
    return _collect(
        engine, texts, spec, folder, (-1, columns), np.float32, stage, fingerprint, progress
    )


def _collect(
    engine: Engine,
    texts: Sequence[Text],
    spec: dict[str, Any],
    folder: Path,
    shape: tuple[int, ...],
    dtype: Any,
    stage: str,
    fingerprint: str,
    progress: Callable[[int], None],
) -> Rows:
    starts, lengths = _extents(texts, stage)
    offsets = np.concatenate([[0], np.cumsum(lengths - starts)]).astype(np.int64)
    shape = tuple(int(offsets[-1]) if size < 0 else size for size in shape)
    _prepare(folder, texts, spec, (starts, lengths, offsets), shape, dtype, stage, fingerprint)
    done = np.memmap(folder / "done.bin", np.uint8, "r", shape=(len(texts),))
    left = np.flatnonzero(np.asarray(done) == 0)
    progress(sum(map(_size, texts)) - sum(_size(texts[i]) for i in left))
    if len(left):
        _run(engine, texts, left, {**spec, "folder": str(folder)}, progress)
        if not np.asarray(done).all():
            raise ProbeError(
                f"{int((np.asarray(done) == 0).sum())} of {len(texts)} texts were not read to their end. "
                f"Run the command again; it goes on from {folder}."
            )
    return Rows(offsets, np.memmap(folder / "rows.bin", dtype, "r", shape=shape), folder)


def num_tokens(texts: Sequence[Text]) -> int:
    """How much there is to read."""
    return sum(map(_size, texts))


def _size(text: Text) -> int:
    return len(text.prompt) + len(text.response)


def _extents(texts: Sequence[Text], stage: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per text the first position that is kept, and the end."""
    prompts = np.array([len(t.prompt) for t in texts], np.int64)
    if stage == "prompt":
        return np.zeros(len(texts), np.int64), prompts
    return prompts, prompts + np.array([len(t.response) for t in texts], np.int64)


def _prepare(
    folder: Path,
    texts: Sequence[Text],
    spec: dict[str, Any],
    extents: tuple[NDArray[np.int64], ...],
    shape: tuple[int, ...],
    dtype: Any,
    stage: str,
    fingerprint: str,
) -> None:
    """Lay out the files, unless they are those of the same request."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.prompt.tobytes() + b"|" + text.response.tobytes() + b"\n")
    for _, weight, bias in spec.get("parts", ()):
        digest.update(weight.tobytes() + bias.tobytes())
    request = json.dumps(
        {
            "texts": digest.hexdigest(),
            "layers": spec.get("layers"),
            "stage": stage,
            "model": fingerprint,
            "shape": shape,
        }
    )
    marker = folder / "request.json"
    if marker.is_file() and marker.read_text(encoding="utf-8") == request:
        return
    folder.mkdir(parents=True, exist_ok=True)
    foreign = {path.name for path in folder.iterdir()} - _FILES
    if foreign:
        raise ProbeError(
            f"{folder}: holds files that are not activations ({', '.join(sorted(foreign)[:3])}). Name "
            f"an empty folder."
        )
    marker.unlink(missing_ok=True)
    size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    free = os.statvfs(folder)
    if size_bytes > free.f_bavail * free.f_frsize:
        raise ProbeError(
            f"{folder}: {size_bytes / 1e9:.1f} GB are needed for activations, "
            f"{free.f_bavail * free.f_frsize / 1e9:.1f} GB are free. Name another folder with "
            f"--activations, or read fewer tokens (--max-items, --max-tokens)."
        )
    starts, lengths, offsets = extents
    np.save(folder / "starts.npy", starts)
    np.save(folder / "lengths.npy", lengths)
    np.save(folder / "offsets.npy", offsets)
    for name, size in (("rows.bin", size_bytes), ("done.bin", len(texts))):
        with open(folder / name, "wb") as file:
            file.truncate(max(size, 1))
    marker.write_text(request, encoding="utf-8")


def _run(
    engine: Engine,
    texts: Sequence[Text],
    left: NDArray[np.int64],
    spec: dict[str, Any],
    progress: Callable[[int], None],
) -> None:
    from vllm import SamplingParams

    from streamguard.vllm_plugin import collector

    llm = engine.llm
    llm.collective_rpc(collector.install, args=(spec,))
    # Texts of like length fill a batch evenly.
    order = sorted(left.tolist(), key=lambda i: _size(texts[i]))
    for begin in range(0, len(order), _BATCH):
        batch = order[begin : begin + _BATCH]
        prompts = [
            {"prompt_token_ids": np.concatenate([texts[i].prompt, texts[i].response]).tolist()}
            for i in batch
        ]
        params = [
            SamplingParams(max_tokens=1, temperature=0.0, extra_args={collector.ITEM: int(i)})
            for i in batch
        ]
        llm.generate(prompts, params, use_tqdm=False)
        progress(sum(map(_size, (texts[i] for i in batch))))
    llm.collective_rpc(collector.remove)


def _check_finite(rows: Rows, layers: Sequence[int | str]) -> None:
    """Exponents of all ones in a bfloat16 are infinities and NaN."""
    for at, layer in enumerate(layers):
        for begin in range(0, rows.array.shape[1], 1 << 16):
            block = np.asarray(rows.array[at, begin : begin + (1 << 16)])
            broken = np.flatnonzero(((block & 0x7F80) == 0x7F80).any(axis=1))
            if len(broken):
                text = int(np.searchsorted(rows.offsets, begin + broken[0], side="right")) - 1
                raise ProbeError(
                    f"layer {layer}: NaN or infinite activations, first in text {text + 1}. Another "
                    f"dtype (--dtype bfloat16 or float32) or another layer may help; a probe on "
                    f"such a layer would fail at every request."
                )
