"""Call a compiled kernel with the very arguments that the session gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from streamguard import session as session_module


def captured(kernel_name: str, call: Callable[[], object]) -> tuple[Callable[..., Any], list[Any]]:
    """Run `call`; return the kernel of this name as streamguard.session knows it and its arguments.

    Raises LookupError if the call did not reach the kernel.
    """
    kernel: Callable[..., Any] = getattr(session_module, kernel_name)
    seen: list[list[Any]] = []

    def record(*arguments: Any) -> Any:
        seen.append(list(arguments))
        return kernel(*arguments)

    with patch.object(session_module, kernel_name, record):
        call()
    if not seen:
        raise LookupError(f"the session did not call {kernel_name}; the benchmark needs an update")
    return kernel, seen[-1]


def substituted(arguments: list[Any], old: object, new: object) -> tuple[Any, ...]:
    """The arguments with one object replaced by another. Raises LookupError if it is not there."""
    if not any(argument is old for argument in arguments):
        raise LookupError("the kernel did not get the caller's own array; update the benchmark")
    return tuple(new if argument is old else argument for argument in arguments)
