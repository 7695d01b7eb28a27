"""Advice on valid policies: found where a pattern cannot act, silent where it can."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import streamguard
from streamguard.policy import Policy
from streamguard.policy_advice import _Index, _Owner, advice


def advice_on(*rules: dict[str, Any], **header: Any) -> list[str]:
    named = [{"id": f"r{index}", "action": "halt", **rule} for index, rule in enumerate(rules)]
    return advice(Policy.from_dict({"version": 1, **header, "rules": named}))


SHADOWED = {
    "a longer literal": ({"literals": ["foo"]}, {"literals": ["foo bar"]}),
    "a mask rule comes first too": (
        {"literals": ["foo"], "action": "mask"},
        {"literals": ["foo bar"], "action": "observe"},
    ),
    "folded case": (
        {"literals": ["FOO"], "normalize": ["case"]},
        {"literals": ["a Foo b"], "normalize": ["case"]},
    ),
    "folded case over exact": (
        {"literals": ["FOO"], "normalize": ["case"]},
        {"literals": ["xfoox"]},
    ),
    "a word inside": ({"literals": ["foo"], "boundary": "word"}, {"literals": ["a foo b"]}),
    "a word at the edge of a word": (
        {"literals": ["foo"], "boundary": "word"},
        {"literals": ["foo b"], "boundary": "word"},
    ),
    "other spellings that the first rule reads too": (
        {"literals": ["b0mb"], "normalize": ["case", "leet"]},
        {"literals": ["a Bomb"], "normalize": ["case"]},
    ),
    "a word in a phrase with separators": (
        {"literals": ["foo"], "boundary": "word", "normalize": ["separators"]},
        {"literals": ["a, foo."]},
    ),
    "letters with separators": (
        {"literals": ["foo"], "normalize": ["separators"]},
        {"literals": ["xf-o-oy"]},
    ),
    "the same pattern twice": ({"literals": ["foo"]}, {"literals": ["foo"]}),
    "the same end, less severe": (
        {"literals": ["foo"]},
        {"literals": ["a foo"], "action": "mask"},
    ),
}

REACHED = {
    "no relation": ({"literals": ["foo"]}, {"literals": ["bar"]}),
    "observe stops nothing": ({"literals": ["foo"], "action": "observe"}, {"literals": ["foo b"]}),
    "other spellings get through": (
        {"literals": ["foo"]},
        {"literals": ["foo bar"], "normalize": ["case"]},
    ),
    "spellings of another form": (
        {"literals": ["bomb"], "normalize": ["leet"]},
        {"literals": ["a bomb"], "normalize": ["case", "leet"]},
    ),
    "a phrase whose spaces may be missing": (
        {"literals": ["foo"], "boundary": "word", "normalize": ["separators"]},
        {"literals": ["foo ba"], "normalize": ["separators"]},
    ),
    "no word of its own": ({"literals": ["foo"], "boundary": "word"}, {"literals": ["foobar"]}),
    "perhaps within a word": ({"literals": ["foo"], "boundary": "word"}, {"literals": ["foo b"]}),
    "the same end, more severe": (
        {"literals": ["foo"], "action": "mask"},
        {"literals": ["a foo"], "action": "halt"},
    ),
    "within one rule": ({"literals": ["foo", "foo bar"]}, {"literals": ["quux"]}),
}


@pytest.mark.parametrize("case", SHADOWED)
def test_a_pattern_that_another_rule_always_precedes_is_reported(case: str) -> None:
    lines = advice_on(*SHADOWED[case])
    assert len(lines) == 1
    assert lines[0].startswith('rules[1] "r1": its pattern never acts: ')
    assert 'of rule "r0"' in lines[0]


@pytest.mark.parametrize("case", REACHED)
def test_a_pattern_that_can_act_is_not_reported(case: str) -> None:
    assert advice_on(*REACHED[case]) == []


def test_a_more_severe_rule_behind_a_shorter_pattern_acts_only_within_one_token() -> None:
    lines = advice_on({"literals": ["foo"], "action": "mask"}, {"literals": ["foo bar"]})
    assert "its pattern acts only where one token completes both" in lines[0]


def test_a_rule_is_reported_once_with_the_number_of_its_patterns() -> None:
    lines = advice_on({"literals": ["foo"]}, {"literals": ["foo 1", "foo 2", "bar"]})
    assert len(lines) == 1
    assert '2 of its 3 patterns, such as "foo 1", never act' in lines[0]


def test_a_message_that_breaks_the_policy_is_reported() -> None:
    lines = advice_on(
        {"literals": ["foo"], "normalize": ["case"]},
        {"literals": ["bar"], "action": "redirect", "message": "Not a word on FOO."},
    )
    assert len(lines) == 1
    assert 'rules[1] "r1": its message contains "foo" of rule "r0" (halt)' in lines[0]


def test_patterns_that_hit_nearly_everything_are_reported() -> None:
    assert "single character" in advice_on({"literals": ["e"]})[0]
    assert "white space" in advice_on({"literals": ["  "], "action": "mask"})[0]
    assert advice_on({"literals": ["e"], "action": "observe"}) == []


def test_letting_text_pass_on_errors_is_reported() -> None:
    assert "on_error is pass" in advice_on({"literals": ["foo"]}, defaults={"on_error": "pass"})[0]


def test_the_examples_need_no_advice() -> None:
    examples = (Path(streamguard.__file__).parent / "examples").glob("*.yaml")
    files = sorted(examples)
    assert files
    for file in files:
        assert advice(Policy.load(file)) == [], file


def test_lists_too_large_to_compare_are_said_to_be() -> None:
    literals = [f"pattern number {number:0>40}" for number in range(50_000)]
    lines = advice_on({"literals": literals})
    assert len(lines) == 1
    assert "too many to compare" in lines[0]


def test_the_index_finds_what_a_naive_search_finds(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        words = {bytes(rng.choices(b"ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 12))}
        text = bytes(rng.choices(b"ab", k=rng.randint(0, 20)))
        index = _Index((word, _Owner(0, word.decode())) for word in words)
        expected = {
            (end, word.decode())
            for word in words
            for end in range(len(word), len(text) + 1)
            if text[:end].endswith(word)
        }
        assert {(end, owner.literal) for end, owner in index.occurrences(text)} == expected
