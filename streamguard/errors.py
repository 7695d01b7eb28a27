"""The exceptions of streamguard, one per place where bad input is turned away.

Every one of them derives from `StreamguardError` (catch all of streamguard) and from the builtin
that the caller would expect (`ValueError` for a value, `RuntimeError` for a state of the world).
All are raised at load, at start or at admission; none because of a text that a model generated.

A message says where, what was found, what is allowed, why, and the remedy.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "AttestationError",
    "ConfigurationError",
    "PolicyError",
    "ProbeError",
    "RequestError",
    "ShapeError",
    "StreamError",
    "StreamguardError",
    "TokenizerError",
]


class StreamguardError(Exception):
    """Base of all streamguard exceptions; never raised itself."""


class PolicyError(StreamguardError, ValueError):
    """Raised while loading a policy, a folder of policies or a literals file that cannot be used.

    The message lists every problem found in the file (up to ten), so that one edit fixes them all.
    """


class TokenizerError(StreamguardError, ValueError):
    """Raised while compiling when the bytes of a tokenizer's tokens cannot be told.

    Also when a tokenizer does not fit the model (its vocabulary is larger than the logits row).
    """


class ShapeError(StreamguardError, ValueError):
    """Raised when an array handed to a session has the wrong shape, dtype or range.

    A session checks once per batch, before any state changes; the kernels check nothing.
    """


class StreamError(StreamguardError, ValueError):
    """Raised when a text stream is fed a piece that cannot belong to its text.

    Whether a call raises depends on the piece's type and the calls before it, never on the text.
    """


class ArtifactError(StreamguardError, ValueError):
    """Raised when a compiled artefact cannot be read.

    It is truncated, of another format version, or made from another policy or tokenizer.
    """


class ProbeError(StreamguardError, ValueError):
    """Raised while fitting, calibrating, evaluating or loading a probe that could not be trusted.

    Data that cannot support it, a file of another model or layer, or a threshold without enough
    benign texts behind it.
    """


class ConfigurationError(StreamguardError, RuntimeError):
    """Raised at engine start where the guard could not act: a refusal to start.

    The message names the setting and the remedy.
    """


class AttestationError(StreamguardError, RuntimeError):
    """Raised after the model is loaded when the guard is required but is not really in place."""


class RequestError(StreamguardError, ValueError):
    """Raised at admission when a request's parameters are refused; HTTP 400 on the wire.

    Only that request is turned away: the others of its batch are not disturbed.
    """
