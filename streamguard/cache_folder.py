"""Where streamguard keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "STREAMGUARD_CACHE"


def cache_folder() -> Path:
    """$STREAMGUARD_CACHE, else ~/.cache/streamguard; it need not exist."""
    configured = os.environ.get(VARIABLE)
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "streamguard"
