"""Normal forms: what they claim holds in every combination, and through every engine."""

from __future__ import annotations

import itertools
import random

import pytest
from guard_cases import (
    EVERY_BYTE,
    TextOracle,
    matches,
    policy,
    program,
    random_text,
    rule,
    split_bytes,
    vocabulary,
)
from test_lookahead import assert_exact
from test_scanner import reference_scan, scan
from test_session import hits_per_token

from streamguard.compiler.forms import changed_characters, read_character, read_text, readings
from streamguard.errors import PolicyError
from streamguard.policy import NORMAL_FORMS, Policy
from streamguard.session import Session

SETS = (
    *itertools.combinations(NORMAL_FORMS, 1), *itertools.combinations(NORMAL_FORMS, 2),
    ("case", "width", "confusables"), ("case", "confusables", "leet"), NORMAL_FORMS[:-1],
    NORMAL_FORMS,
)  # fmt: skip


def together(forms: tuple[str, ...]) -> str:
    return "+".join(forms)


@pytest.mark.parametrize("forms", SETS, ids=together)
def test_what_is_read_is_read_as_itself(forms: tuple[str, ...]) -> None:
    changed = changed_characters(forms)
    assert all(read_text(read, forms) == read for read in changed.values())
    # Only these two skip characters: what stands between the others keeps them apart.
    assert ("" in changed.values()) == bool({"zero-width", "marks"} & set(forms))


@pytest.mark.parametrize("forms", SETS, ids=together)
def test_no_form_loses_what_another_one_reads_as_letters(forms: tuple[str, ...]) -> None:
    lost = {
        chr(code_point)
        for form in forms
        for code_point, read in changed_characters((form,)).items()
        if read.isascii()
        and read.isalnum()
        and read_character(chr(code_point), forms) != read_text(read, forms)
    }
    # The long s folds to s and looks like f; the first of both holds.
    assert lost <= {"ſ"}, lost


def test_every_changed_character_is_found_without_trying_all() -> None:
    for forms in (*SETS[:7], NORMAL_FORMS):
        tried = {
            c: read_character(chr(c), forms)
            for c in (*range(0, 0xD800, 31), *range(0xE000, 0x110000, 31))
        }
        changed = changed_characters(forms)
        assert all(changed.get(c, chr(c)) == read for c, read in tried.items())


READ = {
    "width": "ｂ b | ﬁ fi | 𝓫𝖔𝕞𝚋 bomb | ⓑⓞⓜⓑ bomb | 🅱🄾🅼🇧 BOMB | ⒝ b | ² 2 | é e\u0301",
    "zero-width": "b\u200bo bo | b\u00ado bo | a\u202eb ab | x\U000e0041y xy | q\ufe0f q | \u2060z z",
    "confusables": "ЬоⅿЬ bornb | вомь bornb | bomb bornb | ᴘᴏʟ pol | раураl paypal | ƅ b",
    "leet": "b0m8 bomb | B0M8 boMb | k1LL klll | $3x sex | p@s5 pass",
    "marks": "b\u0334o\u0336m\u0301b bomb | é e | ñ n | й и",
    "case": "BOMB bomb | ẞ ss | ſ s | \u212a k",
}


def test_forms_read_as_documented() -> None:
    for form, pairs in READ.items():
        for pair in pairs.split(" | "):
            text, read = pair.split(" ")
            assert read_text(text, (form,)) == read, (form, text)
    assert read_text("10I|", ("confusables",)) == "lOll"


def test_separators_give_three_spellings_of_a_phrase() -> None:
    assert readings("kill, him", ("separators",)) == ("kill him", "killhim", "k i l l h i m")
    assert readings(" bomb\n", ("separators",)) == ("bomb", "b o m b")
    assert readings(".", ("separators",)) == ()
    # One letter may be read as two, and marks belong to their letter.
    both = ("confusables", "separators")
    assert readings("m\u0301a", both) == ("rn\u0301a", "rn\u0301 a")


def test_look_alikes_part_upper_and_lower_greek_but_not_its_words() -> None:
    one = policy(rule("halt", "νέα", forms=["case", "confusables", "marks"])).rules[0]
    for text in ("νέα", "ΝΈΑ", "Νέα", "νεα"):
        assert matches(text, one), text


NOTHING = {"zero-width": "\u200b\u200d", "marks": "\u0301", "separators": " .- "}


@pytest.mark.parametrize("form", NOTHING)
def test_a_literal_of_which_nothing_is_left_is_refused(form: str) -> None:
    rules = [{"id": "r", "literals": [NOTHING[form]], "action": "halt", "normalize": [form]}]
    with pytest.raises(PolicyError) as caught:
        Policy.from_dict({"version": 1, "rules": rules}, source="p.yaml")
    message = str(caught.value)
    for part in ("p.yaml", 'rules[0] "r"', "pattern 0", f"after normalize [{form}]", "Delete it"):
        assert part in message


# ------------------------------------------------------------- separators in every engine

LETTERS = "bom bom .-_\n!é\u200b"
LITERALS = ("bomb", "bo mb", "b", "om", "m b o", "o!", "!b", "b.o", "bb", "mom bob", "é b", "- !")
TOKENS = (
    *EVERY_BYTE,
    *(piece.encode() for piece in "b.o o.m bo mb .b b. -- !b b! b.o.m .. . m.b é .é !.b b.!".split()),
    *(piece.encode() for piece in (" b", "b ", " bomb", "bomb ", "  ", " bo mb", "o m", "\n", "\u200b")),
    *(b" \t m", b"b  o  m", b" \xc3", b"\xa9 b", b". bomb !"),
)  # fmt: skip
VOCABULARY = vocabulary(TOKENS)
KNOWN = set(TOKENS)
SEPARATE = (("separators",), ("case", "separators"), ("zero-width", "leet", "separators"))


@pytest.mark.parametrize("word", [False, True])
@pytest.mark.parametrize("forms", SEPARATE, ids=together)
def test_separators_equal_a_plain_search(forms: tuple[str, ...], word: bool, seed: int) -> None:
    rng = random.Random(f"{seed} {forms} {word}")
    num_hits = 0
    for _ in range(40):
        literals = rng.sample(LITERALS, rng.randint(1, 3))
        unique = list({readings(text, forms): text for text in literals}.values())
        one = policy(
            rule("mask", *unique, forms=forms, word=word), rule("halt", "bom", forms=forms)
        )
        compiled = program(one, VOCABULARY)
        session = Session(compiled, 1)
        for _ in range(3):
            prompt = random_text(rng, LETTERS, 5).encode() if rng.random() < 0.5 else b""
            data = random_text(rng, LETTERS, 14).encode()
            oracle = TextOracle(compiled, 0, prompt=list(prompt))
            session.reset(0, list(prompt), end_token_ids=())
            for piece in split_bytes(rng, data, KNOWN):
                token = TOKENS.index(piece)
                num_hits += assert_exact(session, 0, last=rng.random() < 0.1) > 0
                expected = oracle.feed(token)
                assert hits_per_token(session, 0, [token]) == [expected], (prompt, oracle.output)
        found = scan(compiled, data)
        assert sorted(found) == reference_scan(one, data), (data, one.rules)
        assert all(scan(compiled, data, [size]) == found for size in (1, 2, 5))
    assert num_hits


def test_a_prompt_may_hold_any_number_of_skipped_characters_within_a_pattern() -> None:
    # Its tail was once cut after as many bytes as the longest pattern may take.
    forms = ["zero-width", "separators"]
    session = Session(program(policy(rule("halt", "bo mb", forms=forms)), VOCABULARY), 1)
    for between in (b" ", "\u200b".encode()):
        session.reset(0, list(b"bo " + between * 3000))
        assert session.advance([0, 0], list(b"mb")).tolist() == [0, 1]
