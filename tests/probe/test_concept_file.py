"""Concept files: the shipped one loads, and every way to get one wrong has its message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import streamguard
from streamguard.errors import ProbeError
from streamguard.probe.concept_file import Concept

COOKING = Path(streamguard.__file__).parent / "examples" / "concepts" / "cooking.yaml"
GOOD: dict[str, Any] = {
    "name": "sea",
    "description": "The sea.",
    "prompts": [f"sea {number}" for number in range(8)],
    "others": [f"land {number}" for number in range(8)],
}


def test_the_shipped_example_loads() -> None:
    concept = Concept.load(COOKING)
    assert concept.name == "cooking"
    assert (len(concept.prompts), len(concept.others)) == (24, 32)
    assert concept.system is None


def test_settings_left_out_have_their_defaults() -> None:
    concept = Concept.from_dict(GOOD)
    assert (concept.max_tokens, concept.samples, concept.temperature) == (96, 2, 0.8)
    assert Concept.from_dict({**GOOD, "temperature": 0}).temperature == 0


WRONG = [
    ({"name": "Sea Side"}, 'name is "Sea Side"; it must be 1 to 64 of a-z, 0-9 and -'),
    ({"description": None}, "description is null; it must be a string. Give a value or delete it."),
    ({"prompts": ["a"]}, "prompts has 1 prompts; at least 8 are needed"),
    ({"others": "a"}, 'others is "a" (a string); it must be a list of prompts. Put it in brackets'),
    ({"others": [*GOOD["others"], 7]}, "others[8] is 7 (an integer); it must be a string."),
    ({"prompts": [*GOOD["prompts"], " "]}, "prompts[8] is empty; it must be a prompt."),
    (
        {"prompts": [*GOOD["prompts"], "SEA  1"]},
        'prompts[8] "SEA  1" is the same prompt as prompts[1]; each may occur once',
    ),
    (
        {"others": [*GOOD["others"], "Sea 3"]},
        'others[8] "Sea 3" is the same prompt as prompts[3]; each may occur once',
    ),
    ({"max_tokens": 8}, "max_tokens is 8 (an integer); it must be 16 to 512."),
    ({"max_tokens": "96"}, 'max_tokens is "96" (a string); it must be an integer, without quotes.'),
    ({"samples": True}, "samples is true (a boolean); it must be an integer"),
    ({"samples": 17}, "samples is 17 (an integer); it must be 1 to 16."),
    ({"temperature": 2.5}, "temperature is 2.5 (a number); it must be 0 to 2."),
    ({"temperature": float("nan")}, "temperature is nan (a number); it must be 0 to 2."),
    ({"system": ""}, "system is empty; it must be text."),
    ({"promts": []}, 'unknown key "promts"; allowed: name, description'),
    ({"promts": []}, 'Did you mean "prompts"?'),
    ({3: []}, "unknown key 3; allowed: name"),
]


@pytest.mark.parametrize(("change", "problem"), WRONG)
def test_a_wrong_value_says_key_value_and_what_is_allowed(
    change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ProbeError) as caught:
        Concept.from_dict({**GOOD, **change}, source="c.yaml")
    assert str(caught.value).startswith("c.yaml: ")
    assert problem in str(caught.value)


def test_a_missing_key_is_named() -> None:
    for key in GOOD:
        with pytest.raises(ProbeError, match=f'key "{key}" is missing'):
            Concept.from_dict({name: value for name, value in GOOD.items() if name != key})


def test_all_problems_are_listed_at_once_up_to_ten() -> None:
    with pytest.raises(ProbeError) as caught:
        Concept.from_dict({**GOOD, "others": [*GOOD["prompts"], *GOOD["prompts"]]})
    assert str(caught.value).splitlines()[10:] == ["… and 6 more."]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"- a\n", "a list; needed: a mapping with name, description, prompts and others"),
        (b"name: [\n", "not valid YAML"),
        (b"name: a\nname: b\n", 'key "name" occurs twice'),
        (b"name: \xff\n", "not UTF-8"),
        (b"", "null; needed: a mapping"),
    ],
)
def test_a_file_that_is_no_concept_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "concept.yaml"
    path.write_bytes(content)
    with pytest.raises(ProbeError) as caught:
        Concept.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="no such file"):
        Concept.load(tmp_path / "none.yaml")
