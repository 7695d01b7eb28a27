"""Verdicts for vocabularies without spare ids: kept in a file beside the token stream.

The worker appends one line per verdict before the token that ends the response leaves it, so the
frontend finds it when that token arrives. One machine only; a request's line is read once.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_FILE = "STREAMGUARD_VERDICTS_FILE"
#: Worker side: request id -> (rule, tokens committed when it fired), while the process lives.
running: dict[str, tuple[int, int]] = {}
_MOST_KEPT = 10_000
_verdicts: dict[str, int] = {}
_offset = 0


def prepare() -> None:
    """Choose the file, before children start. Idempotent."""
    prefix = f"streamguard-verdicts-{os.getpid()}-"
    if not Path(os.environ.get(_FILE, "")).name.startswith(prefix):
        handle, path = tempfile.mkstemp(prefix=prefix)
        os.close(handle)
        os.environ[_FILE] = path


def write(request_id: str, rule: int, committed: int) -> None:
    """Note a verdict that fired after `committed` tokens. Appends of one short line are atomic."""
    running[request_id] = (rule, committed)
    while len(running) > _MOST_KEPT:
        del running[next(iter(running))]
    with open(os.environ[_FILE], "a", encoding="utf-8") as file:
        file.write(f"{rule} {request_id}\n")


def read(request_id: str) -> int | None:
    """The rule that fired on a request, None if none did so far."""
    global _offset
    path = Path(os.environ.get(_FILE, ""))
    try:
        if path.stat().st_size > _offset:
            with path.open(encoding="utf-8") as file:
                file.seek(_offset)
                for line in file:
                    rule, _, name = line.rstrip("\n").partition(" ")
                    _verdicts[name] = int(rule)
                _offset = file.tell()
    except OSError:
        return None
    return _verdicts.pop(request_id, None)
