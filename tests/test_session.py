"""A session's hits, against a plain search of the whole text after every token."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from guard_cases import (
    ODD,
    PIECES,
    SPECIALS,
    TextOracle,
    distinct,
    fill,
    policy,
    program,
    random_rules,
    random_text,
    rule,
    split_bytes,
    vocabulary,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamguard.compiler.program import Program
from streamguard.errors import ShapeError
from streamguard.session import Session

pytestmark = pytest.mark.usefixtures("layout")

VOCABULARY = vocabulary(PIECES)
TOKENS = {piece: i for i, piece in enumerate(PIECES)}
START, EOS, SHOWN_BOMB, SHOWN_OM, SHOWN_SPACE = range(len(PIECES), len(VOCABULARY))
KELVIN = "\u212a"  # three bytes that fold to one
LITERALS = (
    "bomb", "omb", "b", "bob", "Bomb", "o b", "ss", "straße", "i\u0307", "k", "\u212a", "ﬁ",
    "e\u0301", "é", "kill him", "b o", "b.o-m", "1l", "vіа", "Νο", "m",
    "中文", "😀b", "-b", "b-", "- -", "_b", "\u0301", " ", "bo mb", "fi", "S", "ombomb", "1.0",
)  # fmt: skip
MIXED = [
    rule("halt", "bomb", "中文", "ss"),
    rule("mask", "Bomb", "straße", "é", case=True),
    rule("redirect", "bomb", "- b", "😀b", word=True),
    rule("observe", "k", "İ", "o b", "ﬁ", case=True, word=True),
    rule("observe", "bo mb", "o b", forms=("zero-width", "marks", "separators"), word=True),
]
PROGRAM = program(policy(*MIXED))


def tokens_of(*pieces: str | bytes) -> list[int]:
    return [TOKENS[p.encode() if isinstance(p, str) else p] for p in pieces]


def spell(text: str | bytes) -> list[int]:
    """One token a byte."""
    return list(text.encode() if isinstance(text, str) else text)


def session(*rules: dict[str, Any], num_slots: int = 4) -> Session:
    return Session(program(policy(*rules), VOCABULARY), num_slots)


def hits_per_token(one: Session, slot: int, tokens: list[int]) -> list[set[int]]:
    """The rules that each token completes, by `advance`, `events` and `peek` alike."""
    hits = []
    rank = [r.rank for r in one.program.rules]
    for token in tokens:
        peeked = one.peek([slot], [token])
        peeked_events = one.events()
        advanced = one.advance([slot], [token])
        assert np.array_equal(peeked, advanced)
        assert peeked_events == one.events()
        rules = {index for _, index in one.events()}
        best = min(rules, key=lambda index: rank[index], default=-1)
        assert advanced.tolist() == [best + 1]
        hits.append(rules)
    return hits


def random_stream(rng: random.Random, length: int = 24) -> bytes:
    """Text of odd characters and literals, partly broken."""
    data = b""
    while len(data) < length:
        kind = rng.random()
        if kind < 0.5:
            data += rng.choice(LITERALS).encode()
        elif kind < 0.9:
            data += random_text(rng, ODD, 3).encode()
        else:
            data += bytes(rng.choices(b"\xc3\xe4\xf0\x9f\x80\xff\xed\xbfb", k=2))
    return data


def random_tokens(rng: random.Random, length: int = 24) -> list[int]:
    tokens = [TOKENS[p] for p in split_bytes(rng, random_stream(rng, length), set(TOKENS))]
    for _ in range(rng.choice([0, 0, 1, 3])):
        special = rng.choice([START, SHOWN_BOMB, SHOWN_OM, SHOWN_SPACE, TOKENS[b""]])
        tokens.insert(rng.randrange(len(tokens) + 1), special)
    return tokens


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("word", [False, True])
@pytest.mark.parametrize("case", [False, True])
def test_hits_equal_a_plain_search_after_every_token(
    case: bool, word: bool, hidden: bool, seed: int
) -> None:
    rng = random.Random(f"{seed} {case} {word} {hidden}")
    num_hits = 0
    for _ in range(40):
        drawn = rng.sample(LITERALS, 8)
        unique = distinct(drawn, ["case"] if case else [])
        compiled = program(policy(rule("halt", *unique, case=case, word=word)), VOCABULARY)
        num_hits += check_against_oracle(compiled, rng, hidden=hidden)
    assert num_hits


def check_against_oracle(compiled: Program, rng: random.Random, *, hidden: bool) -> int:
    """Feed a random text to a session and to the oracle; return the number of hits."""
    one = Session(compiled, 2)
    show_end = rng.random() < 0.5
    ends = rng.choice([(), (EOS,), (EOS, TOKENS[b"mb"])])
    one.reset(1, hide_special_tokens=hidden, end_token_ids=ends, show_end_token=show_end)
    oracle = TextOracle(compiled, 0, hidden=hidden, ends=ends, show_end=show_end)
    tokens = [t for t in random_tokens(rng) if t not in ends]
    tokens += ends[-1:]
    expected = [oracle.feed(token) for token in tokens]
    assert hits_per_token(one, 1, tokens) == expected, oracle.output
    return sum(map(len, expected))


def test_hits_equal_a_plain_search_when_rules_mix_mappings(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(80):
        compiled = program(policy(*random_rules(rng, LITERALS, rng.randint(1, 5))), VOCABULARY)
        check_against_oracle(compiled, rng, hidden=rng.random() < 0.5)


@given(st.binary(max_size=40), st.randoms(use_true_random=False))
def test_verdict_does_not_depend_on_where_tokens_split(data: bytes, rng: random.Random) -> None:
    one = session(*MIXED)
    text = "bomb Straße " + data.decode("latin-1") + "- b 中文"
    stream = text.encode()[: rng.randint(1, 99)] + data + "bomb é".encode()

    def found(tokens: list[int]) -> list[tuple[int, int]]:
        """(bytes read, rule) of every match, to the end of the text."""
        one.reset(0, end_token_ids=[EOS])
        size, hits = 0, []
        for token, rules in zip(tokens, hits_per_token(one, 0, tokens), strict=True):
            size += len(VOCABULARY.token_bytes[token]) if token != EOS else 0
            hits += [(size, index) for index in sorted(rules)]
        return hits

    whole = found([*stream, EOS])
    tokens = [TOKENS[p] for p in split_bytes(rng, stream, set(TOKENS))]
    ends = list(itertools.accumulate(len(VOCABULARY.token_bytes[t]) for t in tokens))
    # A match is reported with the token that holds the byte which made it certain.
    rounded = sorted({(next(e for e in ends if e >= at), index) for at, index in whole})
    assert sorted(set(found([*tokens, EOS]))) == rounded


def test_verdict_does_not_depend_on_batch_order(seed: int) -> None:
    rng = random.Random(seed)
    num_slots = 8
    one = session(*MIXED, num_slots=num_slots)
    texts = [random_tokens(rng) for _ in range(num_slots)]
    outcomes = []
    for _ in range(3):
        queues = {slot: list(text) for slot, text in enumerate(texts)}
        hits: dict[int, list[int]] = {slot: [] for slot in queues}
        for slot in queues:
            one.reset(slot, hide_special_tokens=slot % 2 == 0)
        while any(queues.values()):
            ready = [slot for slot in queues if queues[slot]]
            rows = rng.sample(ready, rng.randint(1, len(ready)))
            # A slot may come several times in one batch; its tokens are then fed in order.
            rows += [s for s in rng.sample(rows, rng.randint(0, len(rows))) if len(queues[s]) > 1]
            batch = [queues[slot].pop(0) for slot in rows]
            for slot, hit in zip(rows, one.advance(rows, batch).tolist(), strict=True):
                hits[slot].append(hit)
        outcomes.append(hits)
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_recycled_slot_inherits_no_state_from_previous_request(seed: int) -> None:
    rng = random.Random(seed)
    first = policy(*MIXED)
    second = policy(rule("halt", "omb", word=True), rule("mask", "ss", case=True), name="second")
    compiled = program([first, second], VOCABULARY)
    used = Session(compiled, 1)
    for _ in range(60):
        settings = {
            "policy": rng.choice(["default", "second"]),
            "hide_special_tokens": rng.random() < 0.5,
            "end_token_ids": rng.choice([(), (EOS,), range(200, 230)]),
            "show_end_token": rng.random() < 0.5,
        }
        prompt = random_tokens(rng, 8) if rng.random() < 0.5 else []
        tokens = random_tokens(rng)
        if rng.random() < 0.2:
            used.release(0)
        fresh = Session(compiled, 1)
        for one in (used, fresh):
            one.reset(0, prompt, **settings)
        assert used.forbidden(0).tolist() == fresh.forbidden(0).tolist()
        assert hits_per_token(used, 0, tokens) == hits_per_token(fresh, 0, tokens)
        assert used.forbidden(0).tolist() == fresh.forbidden(0).tolist()


def test_rows_of_one_batch_follow_their_own_policies(seed: int) -> None:
    rng = random.Random(seed)
    policies = [
        policy(*random_rules(rng, LITERALS, rng.randint(1, 4)), name=name)
        for name in ("default", "a", "b", "c")
    ]
    compiled = program(policies, VOCABULARY)
    together = Session(compiled, 5)
    texts = [random_tokens(rng) for _ in range(4)]
    expected = []
    for slot, (one, text) in enumerate(zip(policies, texts, strict=True)):
        together.reset(slot, policy=one.name)
        alone = Session(program(one, VOCABULARY), 1)
        alone.reset(0)
        first = next(i for i, r in enumerate(compiled.rules) if r.policy == one.name)
        expected.append([{first + i for i in hit} for hit in hits_per_token(alone, 0, text)])
    for step in range(max(map(len, texts))):
        rows = [slot for slot in range(4) if step < len(texts[slot])]
        together.advance([*rows, 4], [*(texts[slot][step] for slot in rows), TOKENS[b"bomb"]])
        got: dict[int, set[int]] = {row: set() for row in range(len(rows) + 1)}
        for row, index in together.events():
            got[row].add(index)
        assert got.pop(len(rows)) == set(), "an unguarded slot hit"
        assert [got[row] for row in range(len(rows))] == [expected[slot][step] for slot in rows]


def test_pattern_split_over_the_prompt_boundary_is_found() -> None:
    one = session(rule("halt", "bomb"), rule("mask", "straße", case=True), rule("halt", "中文"))
    one.reset(0, tokens_of("bo"))
    assert hits_per_token(one, 0, tokens_of("mb")) == [{0}]
    one.reset(0, spell("STRA"))
    assert hits_per_token(one, 0, tokens_of("ß", "e")) == [set(), {1}]
    one.reset(0, spell("中文".encode()[:4]))
    assert hits_per_token(one, 0, spell("中文".encode()[4:])) == [set(), {2}]


def test_matches_that_lie_in_the_prompt_are_not_reported() -> None:
    one = session(rule("halt", "bomb"), rule("mask", "omb", word=True))
    one.reset(0, spell("a bomb omb, b"))
    assert one.events() == []
    assert hits_per_token(one, 0, spell(" om")) == [set()] * 3
    assert one.forbidden(0).tolist() != []


def test_word_rules_read_the_output_alone_and_as_going_on_from_the_prompt() -> None:
    one = session(rule("halt", "bomb", word=True))
    for prompt, output, hits in [
        ("a", "bomb ", True),  # the output alone begins with the word
        ("bo", "mb ", True),  # the word begins in the prompt
        ("abo", "mb ", False),
        ("a ", "bomb ", True),
        ("xbo", "mb bomb ", True),
        ("bo", "mber ", False),
        ("a", "bomber ", False),
    ]:
        one.reset(0, spell(prompt))
        assert hits_per_token(one, 0, spell(output))[-1] == ({0} if hits else set()), prompt


def test_a_word_that_the_prompt_holds_whole_is_silent_and_longer_ones_go_on() -> None:
    # The tracks once forgot such a prompt, and with it every longer pattern that begins in it.
    one = session(rule("halt", "bomb", "bomb squad", "--", word=True))
    for prompt, output, hits in [
        ("a bomb", ". ", [set(), set()]),
        ("a bomb", " squad.", [set()] * 6 + [{0}]),
        ("a bomb", " bomb.", [set()] * 5 + [{0}]),
        ("a --", "a", [set()]),
        ("a --", "- ", [set(), {0}]),
        ("a --", " -- ", [set()] * 3 + [{0}]),
    ]:
        one.reset(0, spell(prompt))
        brute = [t for t in range(len(one.program.vocabulary)) if one.peek([0], [t])[0]]
        assert one.forbidden(0).tolist() == brute
        assert hits_per_token(one, 0, spell(output)) == hits, (prompt, output)


def test_prompt_and_output_are_read_as_the_oracle_reads_them(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        compiled = program(policy(*random_rules(rng, LITERALS, rng.randint(1, 4))), VOCABULARY)
        one = Session(compiled, 1)
        hidden = rng.random() < 0.5
        prompt = [START, *spell(rng.choice(LITERALS)), *spell(rng.choice(LITERALS)[:2])]
        one.reset(0, prompt, hide_special_tokens=hidden)
        ends = VOCABULARY.eos_token_ids
        oracle = TextOracle(compiled, 0, prompt=prompt, hidden=hidden, ends=ends)
        output = [*random_tokens(rng), EOS]
        expected = [oracle.feed(token) for token in output]
        assert hits_per_token(one, 0, output) == expected, (oracle.prompt, oracle.output)


def assert_alike(one: Session, slot: int, other: int, tracks: NDArray[np.bool_]) -> None:
    """Two slots are in the same state, as far as some tracks go."""
    (states, pending), (others, other_pending) = one.snapshot(slot), one.snapshot(other)
    assert states[tracks].tolist() == others[tracks].tolist()
    assert pending == other_pending


def test_long_prompt_gives_the_state_of_feeding_all_of_it(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        literals = [*LITERALS, "中文" * 20, "😀" * 9, KELVIN * 20]
        one = session(*random_rules(rng, literals, rng.randint(1, 4)))
        prompt = [t for _ in range(12) for t in random_tokens(rng, 40)]
        prompt += spell(rng.choice(["中文", "😀", KELVIN, "bomb"]) * rng.randint(1, 25))
        if rng.random() < 0.5:
            prompt += [rng.choice([START, TOKENS[b"\xc3"], TOKENS[b"\xf0\x9f"]])] * 100
        prompt += spell("q")  # tokens that are fed do not become quiet at the prompt's very end
        for slot, hidden in ((0, True), (1, True), (2, False), (3, False)):
            one.reset(slot, prompt if slot % 2 else (), hide_special_tokens=hidden)
        for slot in (0, 2):
            fill(one, slot, (t for t in prompt if t != EOS))
        output = random_tokens(rng)
        twins = one.program.tables.track_twin[: one.program.max_tracks].astype(bool)
        for fed, seeded in ((0, 1), (2, 3)):
            # The output's own reading starts anew: leave it out of the comparison.
            assert_alike(one, fed, seeded, ~twins)
            fill(one, fed, output)
            fill(one, seeded, output)
            assert_alike(one, fed, seeded, ~twins)


def test_long_prompt_of_characters_in_many_tokens_keeps_its_whole_tail() -> None:
    # The tail was once measured in mapped bytes of lone tokens, where each byte of a split
    # character counts as a broken one of 3 bytes: it came out too short for this pattern.
    one = session(rule("halt", "😀" * 12 + "b", case=True), rule("mask", "k" * 30 + "z", case=True))
    one.reset(0, spell("x" * 500 + "😀" * 12))
    assert hits_per_token(one, 0, tokens_of(b"b")) == [{0}]
    one.reset(0, spell("x" * 500 + KELVIN * 30))
    assert hits_per_token(one, 0, tokens_of(b"z")) == [{1}]


def test_hidden_special_tokens_join_what_stands_around_them() -> None:
    one = session(rule("halt", "bomb", "<bomb>"))
    one.reset(0, hide_special_tokens=True)
    assert hits_per_token(one, 0, [*tokens_of("bo"), SHOWN_BOMB, *tokens_of("mb")])[-1] == {0}
    one.reset(0, hide_special_tokens=False)
    hits = hits_per_token(one, 0, [*tokens_of("bo"), SHOWN_BOMB, *tokens_of("mb")])
    assert hits == [set(), {0}, set()]


def test_end_of_text_closes_a_word_and_shows_its_token_only_if_asked() -> None:
    one = session(rule("halt", "bomb", word=True), rule("mask", "b</s>"))
    one.reset(0, end_token_ids=[EOS, *tokens_of("b")])
    assert hits_per_token(one, 0, [*tokens_of("bomb"), EOS])[-1] == {0}
    # "bom" and an unseen "b": nothing is completed.
    one.reset(0, end_token_ids=[EOS, *tokens_of("b")])
    assert hits_per_token(one, 0, tokens_of("b", "om", "b")) == [set()] * 3
    one.reset(0, end_token_ids=tokens_of("mb"), show_end_token=True)
    assert hits_per_token(one, 0, tokens_of("bo", "mb"))[-1] == {0}
    one.reset(0, end_token_ids=[EOS], show_end_token=True, hide_special_tokens=False)
    assert hits_per_token(one, 0, [*tokens_of("b"), EOS])[-1] == {1}


def test_last_token_of_a_text_closes_a_word() -> None:
    one = session(rule("halt", "bomb", word=True), rule("mask", "é", word=True))
    one.reset(0)
    fill(one, 0, tokens_of("bo"))
    peeked = one.peek([0, 0, 0], [*tokens_of("mb", "mb"), SHOWN_OM], last=[False, True, True])
    assert peeked.tolist() == [0, 1, 0]
    fill(one, 0, tokens_of("mb", "-", "é"))
    assert one.peek([0, 0], [*tokens_of(b"\xc3"), START], last=[True, True]).tolist() == [2, 2]


def test_peek_commits_nothing(seed: int) -> None:
    rng = random.Random(seed)
    one = session(*MIXED)
    one.reset(0)
    for token in random_tokens(rng, 60):
        states, pending = one.snapshot(0)
        others = rng.choices(range(len(VOCABULARY)), k=20)
        one.peek([0] * 20, others, last=[rng.random() < 0.5 for _ in others])
        assert np.array_equal(states, one.snapshot(0)[0])
        assert pending == one.snapshot(0)[1]
        one.advance([0], [token])


def test_a_released_slot_never_hits() -> None:
    one = session(rule("halt", "bomb"))
    one.reset(0)
    one.release(0)
    assert one.advance([0, 1], tokens_of("bomb", "bomb")).tolist() == [0, 0]
    assert one.forbidden(0).tolist() == []
    logits = np.zeros((2, len(VOCABULARY)), np.float32)
    one.apply_mask(logits, [0, 1], [0, 1], [False, True])
    assert not logits.any()


def test_most_severe_rule_is_returned_and_all_are_events() -> None:
    one = session(
        rule("observe", "b"), rule("mask", "mb"), rule("redirect", "omb"), rule("halt", "bomb"),
        rule("halt", "bomb", case=True),
    )  # fmt: skip
    one.reset(0)
    assert one.advance([0], tokens_of("bomb")).tolist() == [4]
    assert one.events() == [(0, index) for index in range(5)]


def test_events_are_complete_however_many_there_are() -> None:
    # Events beyond 4,096 were once dropped, and with them the rows' verdicts.
    tokens = vocabulary((*PIECES, b"a" * 60))
    rules = [rule("observe", *("a" * n for n in range(1, 60))), rule("halt", "a" * 60)]
    one = Session(program(policy(*rules), tokens), 8)
    for slot in range(8):
        one.reset(slot)
    rows, long = list(range(8)), [len(PIECES)] * 8
    assert one.peek(rows, long).tolist() == [2] * 8
    assert one.events() == [(row, index) for row in rows for index in (0, 1)]
    one = Session(one.program, 8)
    for slot in range(8):
        one.reset(slot)
    assert one.advance(rows, long).tolist() == [2] * 8
    assert one.events() == [(row, index) for row in rows for index in (0, 1)]
    one.advance(rows, [PIECES.index(b"b")] * 8)
    assert one.advance(rows, [PIECES.index(b"a")] * 8).tolist() == [1] * 8


def test_events_of_a_prompt_are_not_left_for_the_caller() -> None:
    one = session(rule("halt", "bomb"))
    one.reset(0, tokens_of("bomb"))
    assert one.events() == []


LOGITS = np.zeros((1, 512), np.float32)
BAD_CALLS = {
    "slot below 0": (lambda s: s.advance([-1], [0]), "slots range over -1"),
    "slot too large": (lambda s: s.advance([4], [0]), "allowed: 0..3"),
    "token below 0": (lambda s: s.advance([0], [-1]), "token ids range over -1"),
    "token too large": (lambda s: s.peek([0], [10**6]), "token ids range over 1000000"),
    "lengths differ": (lambda s: s.advance([0, 1], [0]), "same length"),
    "two dimensions": (lambda s: s.advance([[0]], [[0]]), "one dimension"),
    "last too short": (lambda s: s.peek([0, 0], [0, 0], last=[True]), r"last has shape \(1,\)"),
    "unknown policy": (lambda s: s.reset(0, policy="x"), "policy 'x' is not in this session"),
    "end token": (lambda s: s.reset(0, end_token_ids=[10**6]), "token ids range"),
    "prompt token": (lambda s: s.reset(0, [0, -1], hide_special_tokens=False), "token ids range"),
    "mask slot": (lambda s: s.apply_mask(LOGITS, [0], [9], [False]), "slots range over 9"),
    "mask row": (lambda s: s.apply_mask(LOGITS, [7], [0], [False]), "rows range over 7"),
    "narrow logits": (lambda s: s.apply_mask(LOGITS[:, :2], [0], [0], [False]), "columns at least"),
    "forbidden slot": (lambda s: s.forbidden(9), "slots range over 9"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_says_what_is_wrong_and_changes_nothing(name: str) -> None:
    call, message = BAD_CALLS[name]
    one = session(*MIXED)
    one.reset(0, tokens_of("bo"), end_token_ids=[EOS])
    before = [
        x.copy()
        for x in (one._slots.state, one._slots.pending, one._slots.policy, one._slots.hidden)
    ]
    with pytest.raises(ShapeError, match=message):
        call(one)
    after = (one._slots.state, one._slots.pending, one._slots.policy, one._slots.hidden)
    assert all(map(np.array_equal, before, after))
    assert one.advance([0], tokens_of("mb")).tolist() == [1]


def test_a_session_needs_a_slot() -> None:
    with pytest.raises(ShapeError, match="at least 1 slot"):
        Session(PROGRAM, 0)


def test_empty_batches_are_fine() -> None:
    one = session(*MIXED)
    assert one.advance([], []).tolist() == []
    assert one.peek([], [], last=[]).tolist() == []
    one.apply_mask(np.zeros((0, len(VOCABULARY)), np.float32), [], [], [])


def test_special_tokens_of_the_cases_are_where_the_tests_expect_them() -> None:
    shown = [VOCABULARY.token_bytes[i] for i in (START, EOS, SHOWN_BOMB, SHOWN_OM, SHOWN_SPACE)]
    assert tuple(shown) == SPECIALS


def test_the_joint_shortcut_changes_nothing_but_time(seed: int) -> None:
    # One session takes it; the other has no row in `calm` for any token, and walks.
    rng = random.Random(seed)
    num_taken = 0
    for _ in range(25):
        rules = random_rules(rng, LITERALS, rng.randint(1, 5))
        quick, slow = (program(policy(*rules), VOCABULARY) for _ in range(2))
        slow.tables.token_sync[:] = slow.tables.calm_rows[:] = -1
        one, other = Session(quick, 3), Session(slow, 3)
        for slot in range(3):
            prompt, hidden = random_tokens(rng, 8)[: rng.randint(0, 6)], rng.random() < 0.7
            for each in (one, other):
                each.reset(slot, prompt, hide_special_tokens=hidden)
        streams = [random_tokens(rng, 40) for _ in range(3)]
        for step in zip(*streams, strict=False):
            others = [rng.choice(tokens) for tokens in streams]
            assert one.peek([0, 1, 2], others).tolist() == other.peek([0, 1, 2], others).tolist()
            assert one.advance([0, 1, 2], step).tolist() == other.advance([0, 1, 2], step).tolist()
            assert one.events() == other.events()
            num_taken += int((one._slots.synced >= 0).sum())
            if rng.random() < 0.3:
                assert one.would_close([0, 1, 2]).tolist() == other.would_close([0, 1, 2]).tolist()
            if rng.random() < 0.3:
                slot = rng.randrange(3)
                assert one.forbidden(slot).tolist() == other.forbidden(slot).tolist()
                assert one.snapshot(slot)[0].tolist() == other.snapshot(slot)[0].tolist()
    assert num_taken > 300


def test_a_word_of_one_letter_begins_at_separators_and_at_no_other_letter() -> None:
    # No pattern of such a list holds a separator, which then shared a class with unknown letters.
    one = session(rule("halt", "b", forms=("separators",), word=True))
    vocabulary_of = {bytes([byte]): TOKENS[bytes([byte])] for byte in b"zb ."}
    for text, found in ((b"zb ", False), (b" b ", True), (b"z.b.", True), (b"b", False)):
        one.reset(0)
        tokens = [vocabulary_of[bytes([byte])] for byte in text]
        assert one.advance([0] * len(tokens), tokens).any() == found, text
