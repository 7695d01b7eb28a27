"""Words for what is wrong with a policy: values shown short, problems gathered, one screen at most.

Kept apart from `policy.py` so that the schema reads as a schema.
"""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from streamguard.errors import PolicyError

MAX_SHOWN_CHARS = 80
MAX_LISTED_PROBLEMS = 10

# What a strict pydantic type error allows, by pydantic's error type.
_EXPECTED = {
    "string_type": "a string",
    "bool_type": "true or false, without quotes",
    "int_type": "an integer, without quotes",
    "float_type": "a number, without quotes",
    "list_type": "a list",
    "model_type": "a mapping",
    "dict_type": "a mapping",
}


@dataclass(frozen=True)
class Unquoted:
    """A YAML scalar in a list of literals that is no string, with its text as written.

    `- 0123` would arrive as 83 and `- yes` as True; the message should show what the file says.
    """

    text: str
    kind: str


def show(value: object) -> str:
    """Shorten a value to about 80 characters that are safe to print on a terminal.

    Control characters and lone surrogates are escaped; containers are shown by kind only, since
    YAML aliases can make a small file's containers endless.
    """
    if isinstance(value, Unquoted):
        return _escape(value.text)
    if isinstance(value, str):
        return f'"{_escape(value)}"'
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | datetime.date):
        return str(value)
    if isinstance(value, int) and value.bit_length() < 256:
        return str(value)
    return kind(value)


def _escape(text: str) -> str:
    short = text[:MAX_SHOWN_CHARS]
    safe = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in short
    )
    return safe if len(text) <= MAX_SHOWN_CHARS else f"{safe}…"


def kind(value: object) -> str:
    """Name the type of a value in the words of a YAML author."""
    if isinstance(value, Unquoted):
        return value.kind
    names: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a number"),
        (str, "a string"),
        (datetime.date, "a date"),
        ((list, tuple), "a list"),
        (Mapping, "a mapping"),
        (type(None), "null"),
    )
    return next((name for types, name in names if isinstance(value, types)), type(value).__name__)


def found(value: object) -> str:
    """Say a value with its kind: `0123 (an integer)`, `a mapping`."""
    shown, named = show(value), kind(value)
    return shown if shown == named else f"{shown} ({named})"


def did_you_mean(word: object, allowed: Iterable[str]) -> str:
    """Return ` Did you mean "…"?`, or nothing when no allowed word is near."""
    near = difflib.get_close_matches(str(word)[:MAX_SHOWN_CHARS].lower(), list(allowed), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


def unknown_key(key: object, allowed: Iterable[str]) -> str:
    """Word a key that no version of the schema has."""
    names = list(allowed)
    return (
        f"unknown key {show(key)}; allowed: {', '.join(names)}. A key that is not read would leave "
        f"the policy weaker than it looks.{did_you_mean(key, names) or ' Delete it.'}"
    )


def wrong_type(key: str, value: object, expected: str) -> str:
    """Word a value of the wrong type, with the remedy that most often fits."""
    remedy = "Correct it."
    if value is None:
        remedy = "Give a value or delete it."
    elif expected.startswith("a list") and isinstance(value, Mapping):
        remedy = 'Begin each entry with "- ".'
    elif expected == "a mapping":
        remedy = 'Write it as "key: value" lines.'
    elif expected.startswith("a string") and not isinstance(value, list | tuple | Mapping):
        remedy = "YAML reads it as something else: quote it."
    elif expected.startswith("a list") and isinstance(value, str | Unquoted):
        text = value.text if isinstance(value, Unquoted) else value
        remedy = f"Put it in brackets: [{show(text)}]."
    elif "without quotes" in expected and isinstance(value, str):
        remedy = "Remove the quotes."
    return f"{key} is {found(value)}; it must be {expected}. {remedy}"


def explain(error: Mapping[str, Any], allowed_keys: Iterable[str]) -> str:
    """Turn one entry of pydantic's `ValidationError.errors()` into a sentence of ours."""
    kind_of_error, place = error["type"], error["loc"]
    key = ".".join(str(part) for part in place if not isinstance(part, int))
    if kind_of_error == "value_error":
        return str(error["ctx"]["error"])
    if kind_of_error in ("extra_forbidden", "invalid_key"):
        return unknown_key(place[-1], allowed_keys)
    if kind_of_error == "missing":
        return f"key {show(key)} is missing; every rule needs it. Add it."
    if place and isinstance(place[-1], int):
        key = f"{key}[{place[-1]}]"
    return wrong_type(key, error["input"], _EXPECTED.get(kind_of_error, error["msg"]))


class Problems:
    """Gathers what is wrong in one policy file and raises it as one PolicyError.

    Keeps the first ten and counts the rest: a broken list of a million literals costs one screen.
    lenient  a bad literal is left out of its rule with a warning, instead of being a problem.
    """

    def __init__(self, source: str, *, lenient: bool = False) -> None:
        self.source = source
        self.lenient = lenient
        self.total = 0
        self._listed: list[str] = []
        self._num_skipped = 0
        self._skipped: list[str] = []

    def add(self, problem: str) -> None:
        """Note one problem; `problem` starts with the place in the file."""
        self.total += 1
        if len(self._listed) < MAX_LISTED_PROBLEMS:
            self._listed.append(f"{self.source}: {problem}")

    def bad_literal(self, problem: str) -> None:
        """Note a literal that cannot be used: a problem, or a warning if lenient."""
        if not self.lenient:
            self.add(problem)
            return
        self._num_skipped += 1
        if len(self._skipped) < MAX_LISTED_PROBLEMS:
            self._skipped.append(f"{self.source}: {problem} Skipped.")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was left out, the first ten one by one."""
        more = self._num_skipped - len(self._skipped)
        if not more:
            return tuple(self._skipped)
        return *self._skipped, f"{self.source}: … and {more:,} more bad literals skipped."

    def stop(self, problem: str) -> NoReturn:
        """Note a problem after which looking further makes no sense, and raise."""
        self.add(problem)
        raise PolicyError(self._text()) from None

    def raise_if_any(self) -> None:
        """Raise PolicyError if anything was noted."""
        if self.total:
            raise PolicyError(self._text())

    def _text(self) -> str:
        lines = list(self._listed)
        if self.total > len(lines):
            lines.append(f"… and {self.total - len(lines)} more problems in {self.source}.")
        return "\n".join(lines)
