"""The look-ahead mask, against trying every token of the vocabulary."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from guard_cases import (
    BLOCKING,
    EVERY_BYTE,
    PIECES,
    distinct,
    policy,
    program,
    random_rules,
    random_text,
    rule,
    split_bytes,
    vocabulary,
)

from streamguard.session import Session
from streamguard_kernels.lookahead import token_order
from streamguard_kernels.reference import completing_tokens

pytestmark = pytest.mark.usefixtures("layout")

VOCABULARY = vocabulary(PIECES)
START, EOS = len(PIECES), len(PIECES) + 1
ALL = np.arange(len(VOCABULARY))
LITERALS = (
    "bomb", "omb", "b", "bob", "o b", "ss", "straße", "k", "ﬁ", "e\u0301", "中文", "😀b", "é",
    "-b", "- -", "\u0301", " ", "bo mb", "b om", "mb b", "sſ", "</s>", "b</s>", "bomber -bomb",
    "kill him", "b.o-m", "1l", "Νο", "m",
)  # fmt: skip
LETTERS = "ab o-ß\u212ak中😀é"
STOPS = ("halt", "redirect")
CUT = (b"\xc3", b"\xe4\xbd", b"\xf0\x9f\x98", b"\xf0", b"b\xed")


def tries(session: Session, slot: int, last: bool) -> tuple[set[int], set[int]]:
    """Tokens that complete a mask rule, and a halt or redirect rule, by peeking at each."""
    size = len(session.program.vocabulary)
    action = [r.rule.action for r in session.program.rules]
    completed: dict[int, set[str]] = {}
    step = 512  # fewer than events are kept for
    for first in range(0, size, step):
        tokens = np.arange(first, min(size, first + step))
        session.peek(np.full(len(tokens), slot), tokens, last=np.full(len(tokens), last))
        for row, index in session.events():
            completed.setdefault(first + row, set()).add(action[index])
    mask = completing_tokens(lambda t: "mask" in completed.get(t, ()), range(size))
    stop = completing_tokens(lambda t: not completed.get(t, set()).isdisjoint(STOPS), range(size))
    return set(mask), set(stop)


def assert_exact(session: Session, slot: int, *, last: bool = False) -> int:
    """Compare `forbidden` and `apply_mask` with trying every token; return how many there are."""
    mask, stop = tries(session, slot, last)
    assert session.forbidden(slot, last=last).tolist() == sorted(mask | stop)
    logits = np.zeros((3, len(session.program.vocabulary) + 5), np.float32)
    session.apply_mask(logits, [2], [slot], [last])
    assert not logits[:2].any()
    assert set(np.flatnonzero(logits[2])) == mask - stop
    assert np.isneginf(logits[2][sorted(mask - stop)]).all()
    return len(mask | stop)


def random_reset(rng: random.Random, session: Session, slot: int) -> None:
    prompt = [*rng.choice(LITERALS)[:3].encode()] if rng.random() < 0.5 else []
    session.reset(
        slot,
        prompt,
        hide_special_tokens=rng.random() < 0.6,
        end_token_ids=rng.choice([(), (EOS,), (EOS, 260, ord("b")), (EOS, START)]),
        show_end_token=rng.random() < 0.5,
    )


def random_bytes(rng: random.Random, texts: Sequence[str]) -> bytes:
    """Something that ends within a pattern more often than not, or within a character."""
    literal = rng.choice(texts).encode()
    data = random_text(rng, LETTERS, 2).encode() + literal[: rng.randint(0, len(literal))]
    return data + (rng.choice(CUT) if rng.random() < 0.3 else b"")


def test_forbidden_tokens_are_those_that_would_hit(seed: int) -> None:
    rng = random.Random(seed)
    num_forbidden = 0
    for _ in range(60):
        rules = random_rules(rng, LITERALS, rng.randint(1, 5))
        session = Session(program(policy(*rules), VOCABULARY), 3)
        for _ in range(6):
            random_reset(rng, session, 1)
            data = random_bytes(rng, [text for r in rules for text in r["literals"]])
            session.advance([1] * len(data), list(data))
            for last in (False, True):
                num_forbidden += assert_exact(session, 1, last=last)
    assert num_forbidden > 1000


@pytest.mark.parametrize("num_patterns", [10, 300, 10_000, 100_000])
def test_forbidden_tokens_are_exact_for_many_patterns(num_patterns: int, seed: int) -> None:
    rng = random.Random(f"{seed} {num_patterns}")
    words = [random_text(rng, LETTERS, 3) for _ in range(200)]
    tokens = [*EVERY_BYTE, *(w.encode() for w in words), *(f" {w}".encode() for w in words)]
    tokens += ["".join(rng.choices(words, k=2)).encode()[: rng.randint(1, 9)] for _ in range(200)]
    pieces = [*words, " "]
    literals = ["".join(rng.choices(pieces, k=rng.randint(2, 6))) for _ in range(num_patterns)]
    separated = ("zero-width", "separators")
    kinds: list[tuple[str, tuple[str, ...], bool]] = [
        ("mask", (), False),
        ("halt", ("case",), False),
    ]
    kinds += [("mask", (), True), ("redirect", ("case",), True)]
    kinds += [("mask", separated, False), ("halt", separated, True)]
    rules = []
    for i, (action, forms, word) in enumerate(kinds):
        if unique := distinct(literals[i :: len(kinds)], forms):
            rules.append(rule(action, *unique, forms=forms, word=word))
    session = Session(program(policy(*rules), vocabulary(tokens)), 1)
    known = set(tokens)
    for trial in range(8 if num_patterns > 1000 else 20):
        session.reset(0, hide_special_tokens=trial % 2 == 0)
        data = random_bytes(rng, literals) + random_bytes(rng, literals)
        fed = [tokens.index(p) for p in split_bytes(rng, data, known)]
        session.advance([0] * len(fed), fed)
        assert_exact(session, 0, last=trial % 5 == 4)


def test_a_caller_that_avoids_forbidden_tokens_never_gets_a_hit(seed: int) -> None:
    rng = random.Random(seed)
    num_avoided = 0
    for _ in range(30):
        rules = random_rules(rng, LITERALS, rng.randint(1, 5))
        session = Session(program(policy(*rules), VOCABULARY), 1)
        random_reset(rng, session, 0)
        num_steps = rng.randint(1, 40)
        for step in range(num_steps):
            last = step == num_steps - 1
            forbidden = set(session.forbidden(0, last=last).tolist())
            allowed = [t for t in ALL.tolist() if t not in forbidden]
            if not allowed:
                break
            wished = rng.choice(sorted(forbidden)) if forbidden and rng.random() < 0.7 else None
            num_avoided += wished is not None
            token = rng.choice(allowed)
            session.peek([0], [token], last=[last])
            hits = {session.program.rules[index].rule.action for _, index in session.events()}
            assert not hits & set(BLOCKING)
            session.advance([0], [token])
            if token in session._slots.end_tokens[0]:
                break
    assert num_avoided > 50


def test_end_tokens_are_forbidden_where_the_end_would_close_a_word() -> None:
    session = Session(program(policy(rule("mask", "bomb", word=True)), VOCABULARY), 1)
    session.reset(0, end_token_ids=[EOS, ord("e")])
    session.advance([0] * 4, list(b"bomb"))
    forbidden = set(session.forbidden(0).tolist())
    assert {EOS, ord("e"), ord(" "), ord(".")} <= forbidden
    assert not {ord("f"), START, PIECES.index("\u0301".encode()), 0xC3} & forbidden
    # The last token ends the text whatever it is, and an unfinished character ends a word.
    assert {EOS, ord(" "), START, 0xC3} <= set(session.forbidden(0, last=True).tolist())
    assert ord("f") not in session.forbidden(0, last=True)


def test_a_hidden_special_end_token_is_not_read_even_if_the_end_token_is_shown() -> None:
    # The mask once read an end token's text where `advance` skipped it as a hidden special one.
    session = Session(program(policy(rule("halt", "b</s>")), VOCABULARY), 1)
    for hidden, forbidden in ((True, []), (False, [EOS])):
        session.reset(
            0, list(b"b"), hide_special_tokens=hidden, end_token_ids=[EOS], show_end_token=True
        )
        assert session.forbidden(0).tolist() == forbidden


def test_an_unseen_ordinary_end_token_stays_possible() -> None:
    # The quick way of the mask once took no notice of ordinary tokens that end a text unseen.
    session = Session(program(policy(rule("mask", "bomb")), VOCABULARY), 1)
    session.reset(0, list(b"bom"), end_token_ids=[ord("b")])
    assert ord("b") not in session.forbidden(0)
    logits = np.zeros((1, len(VOCABULARY)), np.float32)
    session.apply_mask(logits, [0], [0], [False])
    assert logits[0, ord("b")] == 0
    assert np.isneginf(logits[0, PIECES.index(b"bo")])


def test_a_token_full_of_observed_matches_is_not_taken_for_a_forbidden_one() -> None:
    # Walked tokens once counted as forbidden when they completed more matches than a buffer held.
    tokens = (*EVERY_BYTE, b"a" * 200)
    one = policy(rule("observe", "a"), rule("mask", "ab"))
    session = Session(program(one, vocabulary(tokens)), 1)
    session.reset(0)
    assert session.forbidden(0, last=True).tolist() == []


def test_tokens_that_complete_something_more_severe_too_are_left_to_it() -> None:
    rules = [rule("mask", "bo"), rule("halt", "bom"), rule("observe", "b")]
    session = Session(program(policy(*rules), VOCABULARY), 1)
    session.reset(0, list(b"b"))
    logits = np.zeros((1, len(VOCABULARY)), np.float32)
    session.apply_mask(logits, [0], [0], [False])
    assert logits[0, ord("o")] == -np.inf
    assert logits[0, PIECES.index(b"om")] == 0
    assert {ord("o"), PIECES.index(b"om")} <= set(session.forbidden(0).tolist())


def test_masks_of_many_rows_equal_those_of_each_row(seed: int) -> None:
    rng = random.Random(seed)
    policies = [
        policy(rule("mask", "bomb", "ss", "é")),
        policy(rule("mask", "bomb", word=True), rule("observe", "b"), name="word"),
        policy(rule("mask", "omb", case=True), rule("halt", "bomb"), name="halt"),
        policy(rule("halt", "b"), name="no-mask"),
    ]
    session = Session(program(policies, VOCABULARY), 40)
    slots = rng.sample(range(40), 24)
    for slot in slots[:-2]:  # two are not guarded
        session.reset(
            slot, policy=policies[slot % 4].name, hide_special_tokens=rng.random() < 0.8,
            end_token_ids=rng.choice([(EOS,), (ord("b"), EOS)]),
        )  # fmt: skip
        data = random_bytes(rng, LITERALS)
        session.advance([slot] * len(data), list(data))
    last = [rng.random() < 0.3 for _ in slots]
    rows = rng.sample(range(30), 24)
    together = np.zeros((30, len(VOCABULARY)), np.float32)
    session.apply_mask(together, rows, slots, last)
    for row, slot, is_last in zip(rows, slots, last, strict=True):
        alone = np.zeros((30, len(VOCABULARY)), np.float32)
        session.apply_mask(alone, [row], [slot], [is_last])
        assert np.array_equal(alone[row], together[row])
        assert not np.delete(alone, row, axis=0).any()
    assert not np.delete(together, rows, axis=0).any()


def test_tokens_are_sorted_by_their_bytes_without_empty_and_special_ones(seed: int) -> None:
    rng = random.Random(seed)
    for size in (0, 1, 2, 3, 100, 1000):
        tokens = [rng.randbytes(rng.randint(0, 3)) for _ in range(size)]
        skip = np.array([rng.random() < 0.1 for _ in tokens], np.uint8)
        data = np.frombuffer(bytearray(b"".join(tokens)), np.uint8)
        offsets = np.cumsum([0, *map(len, tokens)]).astype(np.int64)
        order = token_order(offsets, data, skip).tolist()
        wanted = [i for i in range(size) if tokens[i] and not skip[i]]
        assert order == sorted(wanted, key=lambda i: (tokens[i], i))
