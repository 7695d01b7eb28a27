"""The tap: what a probe reads of the forward pass, written into buffers that were there before.

A custom op behind the probed layers adds the residual stream's two parts and writes scores (serving)
or the sum itself (collecting). It is part of the traced graph, so it runs compiled and captured as
well as eagerly; a counter that it increments proves each step that it did. The layers are found by
the model's structure, not by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from streamguard.errors import ProbeError

#: In place of a layer's number: the model's last norm.
NORM = "norm"
_library = torch.library.Library("streamguard", "FRAGMENT")
_library.define(
    "score(Tensor hidden, Tensor? residual, Tensor weight, Tensor bias, "
    "Tensor(a!) scores, Tensor(b!) steps, int column, int tap) -> ()"
)
_library.define(
    "capture(Tensor hidden, Tensor? residual, Tensor(a!) states, Tensor(b!) steps, int tap) -> ()"
)


def _score(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scores: torch.Tensor,
    steps: torch.Tensor,
    column: int,
    tap: int,
) -> None:
    """scores[r, column:] = (hidden + residual)[r] @ weight + bias; steps[tap] += 1.

    The sum is rounded to the model's dtype, as the next layer reads it; the rest is float32.
    """
    stream = (hidden if residual is None else hidden + residual).float()
    found = torch.addmm(bias, stream.view(-1, stream.shape[-1]), weight)
    scores[: found.shape[0], column : column + found.shape[1]].copy_(found)
    steps[tap].add_(1)


def _capture(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    states: torch.Tensor,
    steps: torch.Tensor,
    tap: int,
) -> None:
    """states[tap, r] = (hidden + residual)[r]; steps[tap] += 1."""
    stream = hidden if residual is None else hidden + residual
    stream = stream.view(-1, stream.shape[-1])
    states[tap, : stream.shape[0]].copy_(stream)
    steps[tap].add_(1)


def _nothing(*_args: Any) -> None:
    """What tracing needs to know of both ops: they return nothing."""


for _name, _body in (("score", _score), ("capture", _capture)):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"streamguard::{_name}", _nothing, lib=_library)


@dataclass(frozen=True)
class Decoder:
    """Where the residual stream of a model can be read."""

    layers: nn.ModuleList
    norm: nn.Module | None
    owner: nn.Module

    @classmethod
    def of(cls, model: nn.Module, num_layers: int) -> Decoder:
        """Find the text decoder: the one module that owns a list of `num_layers` layers.

        Where several do (a vision tower of equal depth), the one beside the token embedding. Raises
        ProbeError if there is no such module, or no telling which.
        """
        found: list[Decoder] = []
        for module in model.modules():
            lists = [
                child
                for child in module.children()
                if isinstance(child, nn.ModuleList) and len(child) == num_layers
            ]
            if len(lists) == 1:
                norms = [c for c in module.children() if type(c).__name__.lower().endswith("norm")]
                found.append(cls(lists[0], norms[0] if len(norms) == 1 else None, module))
        if len(found) > 1:
            embedded = [d for d in found if any(map(_embeds, d.owner.children()))]
            found = embedded or found
        if len(found) != 1:
            raise ProbeError(
                f"model {type(model).__name__}: {len(found)} modules hold a list of {num_layers} "
                f"decoder layers, exactly 1 is needed to know where hidden states are. Probes do not "
                f"support this structure; remove the probe rules from the policy."
            )
        return found[0]

    def module(self, layer: int | str) -> nn.Module:
        """The module whose output is the stream behind a layer. Raises ProbeError."""
        if layer == NORM:
            if self.norm is None:
                raise ProbeError(
                    f"{type(self.owner).__name__} has no single last norm. Choose a layer "
                    f"0..{len(self.layers) - 1}."
                )
            return self.norm
        if not isinstance(layer, int) or not 0 <= layer < len(self.layers):
            raise ProbeError(
                f"layer {layer!r}: the model has layers 0..{len(self.layers) - 1} and {NORM!r}."
            )
        return self.layers[layer]


def _embeds(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or "Embedding" in type(module).__name__


class Tap:
    """Buffers, and the ops that fill them, in a loaded model that was not run yet.

    scores  float32[max_rows, num_columns]: row r is the r-th token of the last step's batch.
    steps   int64[num_taps]: how often each op ran.
    """

    def __init__(self, model: nn.Module, num_layers: int, max_rows: int, device: torch.device):
        self.decoder = Decoder.of(model, num_layers)
        self._max_rows = max_rows
        self._device = device
        self._tapped: list[tuple[nn.Module, type, list[str]]] = []
        self._end_layer: int | None = None
        self.scores = torch.empty(0)
        self.states = torch.empty(0)
        self.steps = torch.empty(0)

    def score(self, parts: list[tuple[int | str, torch.Tensor, torch.Tensor]]) -> None:
        """Install scoring ops: for each (layer, weight [hidden, k], bias [k]) k columns, in order."""
        columns = sum(weight.shape[1] for _, weight, _ in parts)
        self.scores = torch.zeros((self._max_rows, columns), device=self._device)
        self.steps = torch.zeros(len(parts), dtype=torch.int64, device=self._device)
        column = 0
        for tap, (layer, weight, bias) in enumerate(parts):
            buffers = {
                "weight": weight.float().to(self._device).contiguous(),
                "bias": bias.float().to(self._device),
                "scores": self.scores,
                "steps": self.steps,
            }
            self._attach(layer, _scoring(layer == NORM), tap, column, buffers)
            column += weight.shape[1]

    def capture(self, layers: list[int | str], hidden_size: int, dtype: torch.dtype) -> None:
        """Install capturing ops: states[tap, max_rows, hidden_size], one tap a layer."""
        shape = (len(layers), self._max_rows, hidden_size)
        self.states = torch.zeros(shape, dtype=dtype, device=self._device)
        self.steps = torch.zeros(len(layers), dtype=torch.int64, device=self._device)
        for tap, layer in enumerate(layers):
            buffers = {"states": self.states, "steps": self.steps}
            self._attach(layer, _capturing(layer == NORM), tap, 0, buffers)

    def _attach(
        self, layer: int | str, kind: Any, tap: int, column: int, buffers: dict[str, torch.Tensor]
    ) -> None:
        """Change the class of one module, so that its forward pass ends with the op.

        A class of its own rather than a hook: tracing sees a plain method. Buffers rather than
        attributes: compiled graphs and graph capture treat them as the weights, at fixed addresses.
        """
        module = self.decoder.module(layer)
        original = type(module)
        prefix = f"_streamguard_{tap}_"
        for name, tensor in buffers.items():
            module.register_buffer(prefix + name, tensor, persistent=False)
        forward = kind(original.forward, prefix, tap, column)
        module.__class__ = type(f"Tapped{original.__name__}", (original,), {"forward": forward})
        self._tapped.append((module, original, [prefix + name for name in buffers]))

    def stop_behind(self, layer: int | str) -> None:
        """Skip the layers behind one: what the model then generates means nothing."""
        owner: Any = self.decoder.owner
        if isinstance(layer, int) and isinstance(getattr(owner, "end_layer", None), int):
            self._end_layer = owner.end_layer
            owner.end_layer = layer + 1

    def remove(self) -> None:
        """Give the model back as it was; only for a model that is not compiled."""
        while self._tapped:
            module, original, names = self._tapped.pop()
            module.__class__ = original
            for name in names:
                delattr(module, name)
        if self._end_layer is not None:
            owner: Any = self.decoder.owner
            owner.end_layer, self._end_layer = self._end_layer, None


def _scoring(norm: bool) -> Any:
    def kind(original: Any, prefix: str, tap: int, column: int) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            hidden, residual = _stream(output, norm)
            torch.ops.streamguard.score(
                hidden, residual, getattr(self, prefix + "weight"), getattr(self, prefix + "bias"),
                getattr(self, prefix + "scores"), getattr(self, prefix + "steps"), column, tap,
            )  # fmt: skip
            return output

        return forward

    return kind


def _capturing(norm: bool) -> Any:
    def kind(original: Any, prefix: str, tap: int, _column: int) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            hidden, residual = _stream(output, norm)
            torch.ops.streamguard.capture(
                hidden, residual, getattr(self, prefix + "states"), getattr(self, prefix + "steps"),
                tap,
            )  # fmt: skip
            return output

        return forward

    return kind


def _stream(output: Any, norm: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The parts whose sum is the residual stream; of a norm's output, its first part alone.

    vLLM's layers return (hidden, residual), to be added by the next layer's norm, or the sum.
    """
    if norm and isinstance(output, tuple) and output:
        output = output[0]
    if _is_stream(output):
        return output, None
    if isinstance(output, tuple) and output and _is_stream(output[0]):
        if len(output) == 1 or output[1] is None:
            return output[0], None
        if isinstance(output[1], torch.Tensor) and output[1].shape == output[0].shape:
            return output[0], output[1]
    raise ProbeError(
        "a decoder layer returned neither one row a token nor (hidden, residual) of such: probes do not "
        "support this model's structure. Remove the probe rules from the policy."
    )


def _is_stream(output: Any) -> bool:
    """One row a token. Several streams a token (hyper-connections) would pass for more tokens."""
    if not isinstance(output, torch.Tensor):
        return False
    return output.dim() == 2 or (output.dim() == 3 and output.shape[0] == 1)
