"""streamguard: an output guard inside the vLLM engine.

`import streamguard` is light: numba and the kernels load with the first `Guard`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamguard.errors import PolicyError, StreamguardError
from streamguard.policy import Policy, PolicySet

if TYPE_CHECKING:
    from streamguard.guard import Guard
    from streamguard.text_stream import TextStream

__all__ = ["Guard", "Policy", "PolicyError", "PolicySet", "StreamguardError", "TextStream"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Guard":
        from streamguard.guard import Guard

        return Guard
    if name == "TextStream":
        from streamguard.text_stream import TextStream

        return TextStream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
