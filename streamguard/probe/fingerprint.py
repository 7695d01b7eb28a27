"""Which weights a probe belongs to: a digest that a fine-tune, a merge or a swap changes.

Reading all bytes of a large model would take minutes at each start. Every tensor's name, dtype and
shape go into the digest, and a page from each of three places in it: training changes nearly every
weight, so no fine-tune leaves all of these as they were. It finds mistakes, not forgers.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from streamguard.errors import ProbeError

_PAGE_BYTES = 4096
_PLACES = (0.0, 0.5, 1.0)
#: What the forward pass depends on beyond the weights. Paths, dates and versions are left out.
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


def model_fingerprint(folder: str | Path) -> str:
    """Digest of a model or adapter folder's configuration and weights, as 64 hex digits.

    Takes milliseconds for small models, some seconds for large ones on a cold disk. Raises
    ProbeError if the folder holds no weights.
    """
    root = Path(folder)
    files = sorted(root.glob("*.safetensors")) or sorted(
        p for pattern in ("*.bin", "*.gguf", "*.pt") for p in root.glob(pattern)
    )
    if not files:
        raise ProbeError(
            f"{root}: no *.safetensors, *.bin, *.pt or *.gguf in it, so it cannot be told which "
            f"weights a probe belongs to. Give the folder that holds the model's weights."
        )
    digest = hashlib.sha256()
    for name in ("config.json", "adapter_config.json"):
        if (root / name).is_file():
            digest.update(_configuration(root / name))
    tensors: list[tuple[str, bytes]] = []
    for path in files:
        tensors += _tensors(path) if path.suffix == ".safetensors" else [(path.name, _sample(path))]
    for name, content in sorted(tensors):  # the same weights in other shards are the same model
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def _configuration(path: Path) -> bytes:
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProbeError(
            f"{path}: {error}. Give a folder with a model that can be loaded."
        ) from None
    kept = {key: value for key, value in settings.items() if key not in _VOLATILE}
    return json.dumps(kept, sort_keys=True).encode()


def _tensors(path: Path) -> list[tuple[str, bytes]]:
    """Name and a digest of shape, dtype and sampled pages, per tensor of a safetensors file."""
    found = []
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                digest = hashlib.sha256(f"{entry['dtype']}{entry['shape']}".encode())
                for place in _PLACES:
                    file.seek(begin + int(place * max(0, end - begin - _PAGE_BYTES)))
                    digest.update(file.read(min(_PAGE_BYTES, end - begin)))
                found.append((name, digest.digest()))
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ProbeError(
            f"{path}: not a safetensors file ({error}). Get the model again."
        ) from None
    return found


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for step in range(64):
            file.seek(step * max(0, size - _PAGE_BYTES) // 63)
            digest.update(file.read(_PAGE_BYTES))
    return digest.digest()
