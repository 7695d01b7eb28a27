"""Packages that fitting and evaluating a probe need and serving one does not."""

from __future__ import annotations

import importlib
from typing import Any

from streamguard.errors import ProbeError


def need(module: str, what_for: str) -> Any:
    """Import a module of the extra `probe`. Raises ProbeError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ProbeError(
            f"{what_for} {module.split('.')[0]}, which cannot be imported ({error}). "
            f"Install it: pip install 'vllm-streamguard[probe]'"
        ) from error
