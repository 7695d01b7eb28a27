"""Mappings: what a rule's literals and the text around them are read as."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamguard.compiler.mapping import Mapping, is_word_character

WORD = Mapping((), "word")
CASE = Mapping(("case",))
CASE_WORD = Mapping(("case",), "word")


def test_no_character_above_the_folded_planes_is_changed_by_case_folding() -> None:
    # `forms.changed_characters` looks no further.
    high = "".join(map(chr, range(0x20000, 0x110000)))
    assert high.casefold() == high


@given(st.text())
def test_case_folding_works_character_by_character(text: str) -> None:
    assert CASE.fold(text) == "".join(map(CASE.fold, text))


@pytest.mark.parametrize(
    "text_and_folded",
    ["ß ss", "ẞ ss", "İ i\u0307", "\u212a k", "ſ s", "ﬃ ffi", "Σς σσ"],
)
def test_case_folding_is_full_and_unicode_aware(text_and_folded: str) -> None:
    text, folded = text_and_folded.split()
    assert CASE.patterns(text) == (folded.encode(),)
    assert Mapping().patterns(text) == (text.encode(),)


@pytest.mark.parametrize("character", "aZ0_éßжΩ中の한ªⅷ٣\u0301\u200d\u203f")
def test_letters_digits_marks_joiners_and_connectors_are_word_characters(character: str) -> None:
    assert is_word_character(character)


@pytest.mark.parametrize("character", " \n.-'\"/@😀€→\u00a0\u200b\u3000。\ufffd\0")
def test_spaces_punctuation_symbols_and_broken_utf8_are_not_word_characters(
    character: str,
) -> None:
    assert not is_word_character(character)


def test_word_characters_are_those_of_unicode_tr18() -> None:
    # General categories that TR18 lists in full for \w, and such as hold nothing of it.
    inside = {"Lu", "Ll", "Lt", "Lm", "Lo", "Nl", "Mn", "Mc", "Me", "Nd", "Pc"}
    outside = {"Zs", "Zl", "Zp", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sc", "Sm", "Cc"}
    for code_point in range(0x110000):
        category = unicodedata.category(chr(code_point))
        if category in inside:
            assert is_word_character(chr(code_point)), hex(code_point)
        elif category in outside:
            assert not is_word_character(chr(code_point)), hex(code_point)


def test_a_word_pattern_asks_for_a_boundary_on_both_sides() -> None:
    assert WORD.patterns("bomb") == (b"\xfebomb\xff",)
    assert WORD.patterns("a b") == (b"\xfea\xff \xfeb\xff",)
    assert WORD.patterns("-x") == (b"\xfe\xff-\xfex\xff",)
    assert CASE_WORD.patterns("Straße") == (b"\xfestrasse\xff",)


def test_only_a_rule_without_forms_and_boundary_reads_raw_bytes() -> None:
    assert Mapping().is_identity
    assert not any(mapping.is_identity for mapping in (WORD, CASE, CASE_WORD))
