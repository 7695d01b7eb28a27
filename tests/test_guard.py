"""The public way in: a policy and a tokenizer make a guard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from guard_cases import policy, rule
from transformers import AutoTokenizer

from streamguard import Guard, PolicySet
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.errors import TokenizerError

BOMB = policy(rule("observe", "zzz"), rule("halt", "bomb", case=True))


@pytest.mark.parametrize("form", ["tokenizer", "folder", "vocabulary", "policy set"])
def test_a_guard_finds_and_foresees_a_match(form: str, tiny_models: Callable[..., Path]) -> None:
    folder = tiny_models("byte_level_bpe")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = {"folder": str(folder), "vocabulary": Vocabulary.from_tokenizer(tokenizer)}
    policies = PolicySet.from_policies([BOMB]) if form == "policy set" else BOMB
    session = Guard(policies, given.get(form, tokenizer)).session(num_slots=4)
    session.reset(3, tokenizer.encode("A BO", add_special_tokens=False))
    (m,), (b,) = (tokenizer.encode(letter, add_special_tokens=False) for letter in "mb")
    assert session.advance([3], [m]).tolist() == [0]
    assert b in session.forbidden(3)
    assert session.advance([3], [b]).tolist() == [2]  # index of the rule, plus 1
    assert b not in session.forbidden(3)


def test_a_guard_needs_a_tokenizer_that_fits_the_model(tiny_models: Callable[..., Path]) -> None:
    with pytest.raises(TokenizerError, match="the model only 10 logits"):
        Guard(BOMB, tiny_models("unigram"), vocab_size=10)
