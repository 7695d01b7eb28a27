"""concept.yaml: a topic by example prompts, so that a probe can be fitted without labelled data.

The served model answers both lists; what it writes to `prompts` is the concept, what it writes to
`others` is not. Near misses in `others` (a pottery kiln beside an oven) are what makes the probe
learn the topic and not a few words of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from streamguard.errors import ProbeError
from streamguard.policy_errors import MAX_LISTED_PROBLEMS, did_you_mean, found, show, wrong_type
from streamguard.policy_reader import UnreadableError, parse_yaml, read_text
from streamguard.probe.items import normalised

MIN_PROMPTS = 8
MAX_PROMPTS = 10_000
_NAME = r"^[a-z0-9][a-z0-9-]{0,63}$"


class Concept(BaseModel):
    """A topic and how to ask a model about it; immutable. Read one with `Concept.load`.

    name         the probe's head gets this name.
    prompts      about the concept; others: about other things. At least 8 of each, all different.
    max_tokens   most tokens of an answer.
    samples      answers per prompt.
    temperature  0 gives the same answer each time.
    system       a system message before every prompt; None = the chat template's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=_NAME)]
    description: Annotated[str, Field(min_length=1)]
    prompts: Annotated[list[str], Field(min_length=MIN_PROMPTS, max_length=MAX_PROMPTS)]
    others: Annotated[list[str], Field(min_length=MIN_PROMPTS, max_length=MAX_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=16, le=512)] = 96
    samples: Annotated[int, Field(ge=1, le=16)] = 2
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    system: Annotated[str, Field(min_length=1)] | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Concept:
        """Read and check a concept file.

        Raises ProbeError with every problem found (the first ten, then a count): file, key, value,
        what is allowed and the remedy.
        """
        path = Path(path)
        if not path.exists():
            raise ProbeError(f"{path}: no such file. Correct the path of the concept file.")
        try:
            content = parse_yaml(read_text(path))
        except UnreadableError as error:
            raise ProbeError(f"{path}: {error}") from None
        return cls.from_dict(content, source=str(path))

    @classmethod
    def from_dict(cls, content: Any, *, source: str = "concept") -> Concept:
        """Check a concept that is in memory; `source` stands for the file in messages."""
        if not isinstance(content, Mapping):
            raise ProbeError(
                f"{source}: {found(content)}; needed: a mapping with name, description, prompts and "
                f"others."
            )
        problems: list[str] = []
        concept = None
        try:
            concept = cls.model_validate(dict(content))
        except ValidationError as error:
            problems = [_explain(entry) for entry in error.errors(include_url=False)]
        else:
            problems = _repeated(concept)
        if problems or concept is None:
            listed = [f"{source}: {problem}" for problem in problems[:MAX_LISTED_PROBLEMS]]
            more = len(problems) - len(listed)
            raise ProbeError("\n".join([*listed, f"… and {more} more."] if more else listed))
        return concept


def _explain(error: Mapping[str, Any]) -> str:
    place, kind, value = error["loc"], error["type"], error["input"]
    names = list(Concept.model_fields)
    key = str(place[0]) if len(place) == 1 else f"{place[0]}[{place[1]}]"
    limits = error.get("ctx", {})
    if kind in ("extra_forbidden", "invalid_key"):
        return (
            f"unknown key {show(place[0])}; allowed: {', '.join(names)}."
            f"{did_you_mean(place[0], names) or ' Delete it.'}"
        )
    if kind == "missing":
        return f"key {show(key)} is missing; a concept needs it. Add it."
    if kind == "too_short":
        return (
            f"{key} has {limits['actual_length']} prompts; at least {MIN_PROMPTS} are needed, "
            f"since a probe of fewer learns those prompts and not the topic. Add some."
        )
    if kind == "too_long":
        return f"{key} has more than {MAX_PROMPTS:,} prompts. Shorten it."
    if kind == "string_too_short":
        return f"{key} is empty; it must be text. Write some or delete it."
    if kind == "string_pattern_mismatch":
        return (
            f"{key} is {show(value)}; it must be 1 to 64 of a-z, 0-9 and -, not starting with -. "
            f"Rename it."
        )
    if kind in ("greater_than_equal", "less_than_equal"):
        return f"{key} is {found(value)}; it must be {_range(key)}. Correct it."
    expected = {
        "int_type": "an integer, without quotes",
        "float_type": "a number, without quotes",
        "string_type": "a string",
        "list_type": "a list of prompts",
    }.get(kind, error["msg"])
    return wrong_type(key, value, expected)


def _range(key: str) -> str:
    limits = {type(limit).__name__: limit for limit in Concept.model_fields[key].metadata}
    return f"{limits['Ge'].ge} to {limits['Le'].le}"


def _repeated(concept: Concept) -> list[str]:
    """Prompts that are empty or there twice, in one list or in both."""
    problems = []
    first: dict[str, str] = {}
    for key, prompts in (("prompts", concept.prompts), ("others", concept.others)):
        for index, prompt in enumerate(prompts):
            place = f"{key}[{index}]"
            text = normalised(prompt)
            if not text:
                problems.append(f"{place} is empty; it must be a prompt. Write one or delete it.")
            elif text in first:
                problems.append(
                    f"{place} {show(prompt)} is the same prompt as {first[text]}; each may occur "
                    f"once, else parts of a split would share it. Delete one."
                )
            else:
                first[text] = place
    return problems
