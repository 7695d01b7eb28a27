"""Rule packs: the versioned files of `streamguard/packs/`, taken into a policy with `extends`.

A pack is a policy file with two more keys: `release`, its version, and `description`, one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from streamguard.errors import PolicyError
from streamguard.policy_errors import did_you_mean, show
from streamguard.policy_reader import parse_yaml, read_text

FOLDER = Path(__file__).parent / "packs"


@dataclass(frozen=True)
class Pack:
    """One pack. text: the file as it is; policy: what it holds, as `Policy.from_dict` takes it."""

    name: str
    release: str
    description: str
    text: str
    policy: dict[str, Any]


@cache
def pack_names() -> tuple[str, ...]:
    """Names of all packs, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@cache
def load_pack(name: str) -> Pack:
    """One pack by name. Raises PolicyError for an unknown one."""
    if name not in pack_names():
        raise PolicyError(unknown_pack(name))
    text = read_text(FOLDER / f"{name}.yaml")
    content = parse_yaml(text)
    release, description = content.pop("release"), content.pop("description")
    return Pack(name, release, description, text, content)


def unknown_pack(name: object) -> str:
    """Word a name that is no pack's."""
    return (
        f"no pack is named {show(name)}; packs: {', '.join(pack_names())}. Rules that are not found "
        f"would not guard.{did_you_mean(name, pack_names()) or ' Name one of these.'}"
    )
