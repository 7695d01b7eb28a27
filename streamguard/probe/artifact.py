"""A probe in one file: weights, thresholds' evidence and a card that says what it may be used for.

A safetensors file. Tensors: `weight` float32[hidden_size, num_heads], `bias` float32[num_heads] and
`benign.<head>` float32[num_benign], the peaks of the benign texts that thresholds are computed from.
The card is JSON under the key `card` of the file's metadata. Nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from streamguard.errors import ProbeError
from streamguard.probe.aggregation import Aggregation
from streamguard.probe.threshold import DEFAULT_CONFIDENCE, threshold_for

FORMAT = "streamguard-probe/1"
#: In place of a layer's number: the model's last norm, what the LM head reads.
NORM = "norm"
_AGAIN = "Make it again: streamguard probe fit --model MODEL --data FILE -o FILE."


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelCard(_Schema):
    """The model whose hidden states the probe reads; a probe is good for no other.

    fingerprint  `fingerprint.model_fingerprint` of its folder; adapter: that of a LoRA adapter's.
    """

    name: str
    architecture: str
    fingerprint: str
    adapter: str | None = None
    num_layers: Annotated[int, Field(ge=1)]
    hidden_size: Annotated[int, Field(ge=1)]
    dtype: str


class AggregationCard(_Schema):
    """`Aggregation`, as the file has it."""

    kind: str
    size: int
    weight: float
    drift: float
    warmup: int


class HeadCard(_Schema):
    """One column of the weights: what a high score means, and how scores become decisions."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
    aggregation: AggregationCard


class DataCard(_Schema):
    """A file that the probe was fitted on or calibrated with. It is not part of the probe.

    max_tokens  tokens of a response that a calibration read at most, None = all of them.
    """

    name: str
    sha256: str
    role: Literal["fit", "calibration"]
    items: int
    positive: int
    sources: dict[str, int] = {}
    licences: dict[str, int] = {}
    max_tokens: int | None = None


class Card(_Schema):
    """What a probe is, where it comes from and what was measured.

    layer    0-based index of the decoder layer whose output (residual stream) is read, or NORM.
    stage    whose tokens are read: the response's (output) or the prompt's.
    metrics  figures of `probe eval` on the test split of the fit, by head; see `evaluate`.
    """

    format: str = FORMAT
    date: str
    versions: dict[str, str]
    model: ModelCard
    layer: int | Literal["norm"]
    stage: Literal["output", "prompt"] = "output"
    heads: Annotated[tuple[HeadCard, ...], Field(min_length=1, max_length=256)]
    data: tuple[DataCard, ...] = ()
    training: dict[str, Any] = {}
    metrics: dict[str, Any] = {}

    @property
    def read_tokens(self) -> int | None:
        """Most tokens of the benign texts behind the thresholds; None = they were read whole."""
        again = [card.max_tokens for card in self.data if card.role == "calibration"]
        limit = "max_prompt" if self.stage == "prompt" else "max_response"
        fitted: int | None = self.training.get("options", {}).get(limit)
        return again[0] if again else fitted


@dataclass(frozen=True)
class Probe:
    """A fitted probe; immutable. Read one with `Probe.load`, fit one with `streamguard probe fit`.

    weight  float32[hidden_size, num_heads]; bias float32[num_heads]: the score of a token is
            h @ weight + bias, with h the layer's output at that token.
    benign  by head float32[num_benign], peaks of benign texts.
    """

    card: Card
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    benign: dict[str, NDArray[np.float32]]

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the columns of `weight`."""
        return tuple(head.name for head in self.card.heads)

    def aggregation(self, head: str) -> Aggregation:
        """How a head's scores become its statistic."""
        return Aggregation(**self.card.heads[self.column(head)].aggregation.model_dump())

    def column(self, head: str) -> int:
        """Column of a head. Raises ProbeError, naming those that there are."""
        if head not in self.heads:
            raise ProbeError(f"no head {head!r}; this probe has {', '.join(self.heads)}.")
        return self.heads.index(head)

    def threshold(self, head: str, fpr: float, confidence: float = DEFAULT_CONFIDENCE) -> float:
        """The lowest threshold with at most that share of benign texts halted.

        See `threshold.threshold_for`; raises ProbeError if the calibration cannot support it.
        """
        return threshold_for(self.benign[head], fpr, confidence)

    @cached_property
    def sha256(self) -> str:
        """Digest of card and tensors: what policies and compile caches are told apart by."""
        digest = hashlib.sha256(self.card.model_dump_json().encode())
        for name, array in sorted(self._tensors().items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _tensors(self) -> dict[str, NDArray[np.float32]]:
        return {
            "weight": np.ascontiguousarray(self.weight, np.float32),
            "bias": np.ascontiguousarray(self.bias, np.float32),
            **{
                f"benign.{head}": np.ascontiguousarray(peaks, np.float32)
                for head, peaks in self.benign.items()
            },
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; who reads `path` meanwhile sees the old one or the new one. Raises OSError."""
        from safetensors.numpy import save

        content = save(self._tensors(), metadata={"card": self.card.model_dump_json()})
        target = Path(os.path.realpath(path))
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with open(handle, "wb") as file:
                file.write(content)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Probe:
        """Read a probe and check that it is whole.

        Raises ProbeError that names the file, what is wrong with it and the remedy.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise ProbeError(
                f"{path}: no such file. A probe's path is relative to its policy file."
            ) from None
        except (OSError, SafetensorError, ValueError) as error:
            raise ProbeError(f"{path}: not a whole safetensors file ({error}). {_AGAIN}") from None
        if "card" not in metadata:
            raise ProbeError(f"{path}: a safetensors file without a probe's card. {_AGAIN}")
        try:
            card = Card.model_validate_json(metadata["card"])
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ProbeError(f"{path}: card: {where}: {first['msg']}. {_AGAIN}") from None
        if card.format != FORMAT:
            raise ProbeError(
                f"{path}: format {card.format!r}; this version reads {FORMAT}. {_AGAIN}"
            )
        return cls._checked(path, card, tensors)

    @classmethod
    def _checked(
        cls, path: str | os.PathLike[str], card: Card, tensors: dict[str, NDArray[Any]]
    ) -> Probe:
        heads = [head.name for head in card.heads]
        expected = {
            "weight": (card.model.hidden_size, len(heads)),
            "bias": (len(heads),),
            **{f"benign.{head}": None for head in heads},
        }
        if len(set(heads)) < len(heads):
            raise ProbeError(f"{path}: two heads have one name: {', '.join(heads)}. {_AGAIN}")
        for name, shape in expected.items():
            found = tensors.get(name)
            if found is None or found.dtype != np.float32:
                what = "missing" if found is None else f"of {found.dtype}"
                raise ProbeError(f"{path}: tensor {name!r} is {what}; needed: float32. {_AGAIN}")
            if (found.shape != shape) if shape is not None else (found.ndim != 1):
                needed = shape or "one dimension"
                raise ProbeError(
                    f"{path}: tensor {name!r} has shape {found.shape}; its card needs {needed}. {_AGAIN}"
                )
            if np.isnan(found).any() or (name in ("weight", "bias") and np.isinf(found).any()):
                raise ProbeError(f"{path}: tensor {name!r} holds NaN or infinity. {_AGAIN}")
        if card.layer != NORM and not 0 <= card.layer < card.model.num_layers:  # type: ignore[operator]
            raise ProbeError(
                f"{path}: layer {card.layer} of a model of {card.model.num_layers} layers. {_AGAIN}"
            )
        benign = {head: np.array(tensors[f"benign.{head}"]) for head in heads}
        probe = cls(card, np.array(tensors["weight"]), np.array(tensors["bias"]), benign)
        for head in heads:
            probe.aggregation(head)
        return probe
