"""What is withheld behind a word: exactly the tokens that the end of the text would turn into a match."""

from __future__ import annotations

import pytest
from guard_cases import policy, vocabulary

from streamguard.compiler.program import compile_program
from streamguard.holdback import HeldText, WordHold
from streamguard.policy import PolicySet

PIECES = [
    b" a",
    b" bo",
    b"mb",
    b" bomb",
    b"s",
    b".",
    b"\xc3",
    b"\xa9",
    b" squad",
    b"s\xc3",
    b"s\xa9",
    b"bomb",
]


def begin(*rules: dict[str, object], prompt: tuple[bytes, ...] = ()) -> tuple[HeldText, WordHold]:
    known = vocabulary(PIECES)
    policies = PolicySet.from_policies([policy(*rules)])
    hold = WordHold(policies, compile_program(policies, known).table)
    text = hold.begin(
        "default",
        [PIECES.index(piece) for piece in prompt],
        hide_special_tokens=True,
        end_token_ids=(),
        show_end_token=False,
    )
    return text, hold


def held(text: HeldText, *pieces: bytes) -> list[int]:
    return [text.feed([PIECES.index(piece)]) for piece in pieces]


@pytest.mark.parametrize("action", ["halt", "redirect", "mask"])
def test_the_token_that_completes_a_word_waits_for_the_next_one(action: str) -> None:
    rule = {"literals": ["bomb"], "boundary": "word", "action": action}
    if action == "redirect":
        rule["message"] = "no"
    text, _ = begin(rule)
    assert held(text, b" a", b" bo", b"mb", b"s", b" a") == [0, 0, 1, 0, 0]


def test_what_ends_inside_a_character_behind_a_word_waits_too() -> None:
    text, _ = begin({"literals": ["bomb"], "boundary": "word", "action": "halt"})
    assert held(text, b" bomb", b"s\xc3", b"\xa9") == [1, 2, 0]


def test_broken_characters_behind_a_word_wait_as_the_detokenizer_makes_them_wait() -> None:
    # vLLM shows nothing while the text ends in U+FFFD, and drops it if the response ends there.
    text, _ = begin({"literals": ["bomb"], "boundary": "word", "action": "halt"})
    assert held(text, b" bomb", b"s\xc3", b"s\xc3", b" a") == [1, 2, 3, 0]
    text, _ = begin({"literals": ["bomb"], "boundary": "word", "action": "halt"})
    assert held(text, b" bomb", b"s\xa9", b"\xa9", b"s") == [1, 2, 3, 0]


def test_a_longer_pattern_is_withheld_where_it_ends() -> None:
    text, _ = begin({"literals": ["bomb squad"], "boundary": "word", "action": "halt"})
    assert held(text, b" bomb", b" squad", b"s") == [0, 1, 0]


def test_only_word_rules_that_act_withhold_anything() -> None:
    rules = (
        {"literals": ["bomb"], "action": "halt"},
        {"literals": ["bomb"], "boundary": "word", "action": "observe"},
    )
    policies = PolicySet.from_policies([policy(*rules)])
    hold = WordHold(policies, compile_program(policies, vocabulary(PIECES)).table)
    assert not hold.policies


def test_more_texts_than_one_session_holds_are_followed_and_places_are_used_again() -> None:
    first, hold = begin({"literals": ["bomb"], "boundary": "word", "action": "halt"})
    texts = [
        hold.begin("default", (), hide_special_tokens=True, end_token_ids=(), show_end_token=False)
        for _ in range(600)
    ]
    assert all(held(text, b" bomb") == [1] for text in texts)
    assert held(first, b" a") == [0]
    hold.end(texts[0])
    again = hold.begin(
        "default", (), hide_special_tokens=True, end_token_ids=(), show_end_token=False
    )
    assert held(again, b" a") == [0]


def test_a_word_that_the_prompt_holds_whole_does_not_forbid_all_that_could_follow() -> None:
    known = vocabulary(PIECES)
    policies = PolicySet.from_policies(
        [policy({"literals": ["bomb"], "boundary": "word", "action": "halt"})]
    )
    from streamguard.session import Session

    session = Session(compile_program(policies, known), 1)
    session.reset(0, [PIECES.index(b" bomb")])
    assert session.peek([0], [PIECES.index(b".")])[0] == 0
    session.reset(0, [PIECES.index(b" bo")])
    session.advance([0], [PIECES.index(b"mb")])
    assert session.peek([0], [PIECES.index(b".")])[0] == 1
