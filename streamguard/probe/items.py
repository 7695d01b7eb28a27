"""One labelled text, and when two texts count as the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Stage = Literal["output", "prompt"]
HARMFUL = 1
HARMLESS = 0


@dataclass(frozen=True)
class Item:
    """A prompt, what a model answered, and whether that is harmful. Immutable.

    label      1 harmful, 0 not: of the response at stage output, of the prompt at stage prompt.
    source     the data set within the file; the file's stem if its rows name none.
    prompt_id  group for splits: as given, else `prompt_digest(prompt)`.
    category   what kind of harm; several are joined by "|".
    refusal    whether the model declined; None = not said.
    spans      half-open character ranges of `response` that are harmful, ascending and apart;
               None = not said (the whole response has the label).
    """

    prompt: str
    response: str
    label: int
    source: str
    prompt_id: str
    category: str | None = None
    refusal: bool | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    licence: str | None = None


def normalised(text: str) -> str:
    """Case folded, runs of whitespace as one space: what duplicates are compared by."""
    return " ".join(text.casefold().split())


def digest(text: str) -> str:
    """16 hexadecimal digits, the same on every machine and run."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def prompt_digest(prompt: str) -> str:
    """The group of a prompt that comes without one: equal up to case and whitespace."""
    return digest(normalised(prompt))
