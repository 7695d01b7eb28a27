"""Policies to load in tests: a valid one with changes, a file around one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamguard.policy import (
    Policy,
)

LITERALS = 'literals: ["x"]'


def one_rule(**changes: Any) -> dict[str, Any]:
    """A valid policy of one rule, with that rule's keys changed; None deletes a key."""
    rule = {"id": "r", "action": "halt", "literals": ["x"], **changes}
    kept = {key: value for key, value in rule.items() if value is not None}
    return {"version": 1, "rules": [kept]}


def in_rule(line: str) -> str:
    """A policy file whose only rule "card-number" has `line` as its last line."""
    return f"version: 1\nrules:\n  - id: card-number\n    action: halt\n    {line}\n"


def load_text(folder: Path, text: str | bytes) -> Policy:
    path = folder / "policy.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Policy.load(path)
