"""Shortcuts over texts whose tokens cut characters in two: they change nothing but time."""

from __future__ import annotations

import random

import numpy as np
import pytest
from guard_cases import (
    FORMS,
    ODD,
    PIECES,
    decode,
    matches,
    policy,
    program,
    random_rules,
    random_text,
    rule,
    split_bytes,
    vocabulary,
)

from streamguard.compiler import shortcuts
from streamguard.compiler.program import Program
from streamguard.session import Session
from streamguard_kernels.slots import BORROWED, EXCEPTIONS, INSIDE
from streamguard_kernels.tables import STEP_BIT
from streamguard_kernels.utf8 import numbered_prefix

LITERALS = (
    "bomb", "bo mb", "om", "mom bob", "b.o", "ßa", "straße", "Σος", "中文", "é b", "o!", "b", "𐐨o", "😀b",
)  # fmt: skip
#: Those of literals, of all kinds of mappings, from both sides of what has an entry of its own.
CHARACTERS = sorted(
    {*"".join(LITERALS), *ODD, *"ａ．ᴃ𝗯𐐀\u3000\uffff\U0001ffff\U00020000\U000e0062\U0010ffff"}
)
#: Every byte, pieces of words, and all characters cut at all places, alone and beside others.
TOKENS = tuple(
    dict.fromkeys(
        [
            *PIECES, b"\xffb", b"\x80\x80", b"\xc3\xc3", b" b", b" m", b" o", b" z",
            *(
                piece
                for data in (character.encode() for character in CHARACTERS)
                for at in range(1, len(data))
                for piece in (data[:at], data[at:], b" " + data[:at], data[at:] + b"b", b"." + data)
            ),
        ]
    )
)  # fmt: skip
VOCABULARY = vocabulary(TOKENS)
TOKEN = {data: token for token, data in enumerate(TOKENS)}


def random_data(rng: random.Random) -> bytes:
    """Literals between odd characters, with a stray or a missing byte now and then."""
    data = b""
    while len(data) < 60:
        kind = rng.random()
        if kind < 0.4:
            data += rng.choice(LITERALS).encode()
        elif kind < 0.9:
            data += random_text(rng, "".join(CHARACTERS), 4).encode()
        elif kind < 0.95:
            data += bytes([rng.randrange(256)])
        else:
            data = data[:-1]
    return data


def compare(compiled: Program, rng: random.Random) -> tuple[int, int]:
    """Walk texts with and without shortcuts; return how many steps were settled, how many inside."""
    quick, slow = Session(compiled, 1), Session(compiled, 1)
    num_known = num_inside = 0
    what = [each.rule for each in compiled.rules]
    for _ in range(3):
        for one in (quick, slow):
            one.reset(0)
        slow._slots.plain[0] = 0  # any token might end the text: each is walked from the start
        data, read = random_data(rng), b""
        before: set[tuple[int, int]] = set()
        for piece in split_bytes(rng, data, set(TOKENS)):
            tokens, read = [TOKEN[piece]], read + piece
            other = [rng.randrange(len(TOKENS))]
            for last in (None, [True]):
                seen = [one.peek([0], other, last).tolist() for one in (quick, slow)]
                assert seen[0] == seen[1], (read, other, last)
            assert quick.advance([0], tokens).tolist() == slow.advance([0], tokens).tolist(), read
            assert quick.events() == slow.events(), read
            assert slow._slots.synced[0] == -1
            known = int(quick._slots.synced[0])
            # Not by `snapshot`, which writes down what is only noted.
            pending = int(quick._slots.pending[0])
            if known != -1:
                pending = numbered_prefix((known & INSIDE) >> 16)
            assert pending == slow._slots.pending[0], read
            num_known += known != -1
            inside = pending != 0
            num_inside += known != -1 and inside
            assert known == -1 or (known < 0) == (known & EXCEPTIONS != 0), read
            assert known == -1 or (known & INSIDE != 0) == inside, read
            found = {
                (match[0], index)
                for index, each in enumerate(what)
                for match in matches(decode(read), each, index, ended=False)
            }
            assert {rule for _, rule in quick.events()} == {rule for _, rule in found - before}
            before = found
            if rng.random() < 0.2:
                states, unfinished = quick.snapshot(0)
                assert states.tolist() == slow.snapshot(0)[0].tolist(), read
                assert unfinished == pending, read
                assert quick.forbidden(0).tolist() == slow.forbidden(0).tolist(), read
    return num_known, num_inside


@pytest.mark.parametrize("word", [False, True], ids=["anywhere", "word"])
@pytest.mark.parametrize("forms", [(), *FORMS], ids="+".join)
def test_a_policy_of_one_mapping_finds_the_same_without_shortcuts(
    forms: tuple[str, ...], word: bool, seed: int
) -> None:
    rng = random.Random(seed)
    known = inside = 0
    for _ in range(3):
        [chosen] = random_rules(rng, LITERALS, 1, lambda _: forms)
        more = program(policy({**chosen, "boundary": "word" if word else "none"}), VOCABULARY)
        counts = compare(more, rng)
        known, inside = known + counts[0], inside + counts[1]
    assert known > 100
    assert inside > 20 or (not forms and not word)  # without a mapping bytes are bytes


def test_policies_of_many_mappings_find_the_same_without_shortcuts(seed: int) -> None:
    rng = random.Random(seed)
    inside = 0
    for _ in range(10):
        rules = random_rules(rng, LITERALS, rng.randint(2, 5))
        compiled = program(policy(*rules), VOCABULARY)
        # In the midst of a character all tracks are where they were before it, or none is.
        forms = compiled.tables.mapping_form[compiled.tables.track_mapping]
        assert (forms >= 0).all() or len(forms) == 1
        inside += compare(compiled, rng)[1]
    assert inside > 50


def test_regexes_beside_literals_find_the_same_without_shortcuts(seed: int) -> None:
    rng = random.Random(seed)
    inside = 0
    for _ in range(4):
        rules = random_rules(rng, LITERALS, 2, lambda _: ())
        found = [rule("halt", regexes=[r"\bo\w", "[中é]b", "b[^o]"]), *rules]
        inside += compare(program(policy(*found), VOCABULARY), rng)[1]
    assert inside > 20


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0], ids=["cut", "mixed", "whole"])
def test_batches_of_cut_characters_find_the_same_without_shortcuts(share: float, seed: int) -> None:
    """Where many rows are inside a character the kernel goes another way than where few are."""
    rng = random.Random(seed)
    num_slots, inside, hits = 48, 0, 0
    for rules in ([rule("halt", *LITERALS, forms=("case",))], random_rules(rng, LITERALS, 4)):
        compiled = program(policy(*rules), VOCABULARY)
        quick, slow = Session(compiled, num_slots), Session(compiled, num_slots)
        for one in (quick, slow):
            for slot in range(num_slots):
                one.reset(slot)
        slow._slots.plain[:] = 0  # any token might end the text: each is walked from the start
        streams = []
        for _ in range(num_slots):
            tokens: list[int] = []
            while len(tokens) < 60:
                data = rng.choice((*LITERALS, *CHARACTERS)).encode()
                cut = rng.random() < share
                pieces = [bytes([b]) for b in data] if cut else split_bytes(rng, data, set(TOKENS))
                tokens += [TOKEN[piece] for piece in pieces]
            streams.append(tokens)
        for at in range(0, 60, 2):  # two tokens of each, in order
            order = rng.sample(range(num_slots), num_slots)
            tokens = [streams[slot][at + k] for k in (0, 1) for slot in order]
            for one in (quick, slow):
                one.peek(order, tokens[:num_slots])
            seen = [one.advance([*order, *order], tokens).tolist() for one in (quick, slow)]
            assert seen[0] == seen[1]
            assert quick.events() == slow.events()
            hits += sum(map(bool, seen[0]))
            known = quick._slots.synced
            inside += int(((known != -1) & (known & INSIDE != 0)).sum())
        for slot in range(num_slots):
            states, pending = quick.snapshot(slot)
            assert states.tolist() == slow.snapshot(slot)[0].tolist()
            assert pending == slow.snapshot(slot)[1]
    assert hits > 100
    assert inside > 2 * 30 * num_slots * share / 5


@pytest.mark.parametrize("shallow", [shortcuts.SHALLOW_BYTES, 0], ids=["", "few rows"])
def test_what_rows_and_characters_promise_is_what_a_walk_gives(
    shallow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shortcuts, "SHALLOW_BYTES", shallow)
    compiled = program(policy(rule("halt", *LITERALS, forms=("case", "separators"))), VOCABULARY)
    t = compiled.tables
    one = Session(compiled, 1)
    num_classes, shift = int(t.track_classes[0]), int(t.calm_shape[0, 3])
    states = np.arange(t.track_base[0], t.track_limit[0], num_classes)
    entries = t.calm_rows[(states - t.track_base[0]) >> shift]
    own = (entries >= 0) & (entries & EXCEPTIONS == 0)
    assert (t.calm[(entries[own] >> 32) + t.calm_shape[0, 0]] == states[own]).all()
    assert own.all() if shallow else own.sum() > 10
    assert shallow or (entries[~own] >= 0).sum() > 10
    rng = random.Random(1)
    data = [character.encode() for character in CHARACTERS]
    cut = [(each[:at], each[at:]) for each in data for at in range(1, len(each))]
    for state, entry in zip(states[entries >= 0], entries[entries >= 0].tolist(), strict=True):
        for pieces in [*rng.sample(cut, 12), *((piece,) for piece in rng.sample(TOKENS, 12))]:
            ways = []
            for known in (entry | int(BORROWED) if entry & EXCEPTIONS else entry, -1):
                one.reset(0)
                one._slots.state[0, 0] = state
                one._slots.synced[0], one._slots.plain[0] = known, known != -1
                hits = [one.advance([0], [TOKEN[piece]]).tolist() for piece in pieces]
                behind, pending = one.snapshot(0)
                ways.append((hits, behind.tolist(), pending))
            assert ways[0] == ways[1], (state, pieces)


def test_with_separators_a_row_says_where_a_space_and_a_letter_lead() -> None:
    """Behind "b" the token " o" continues "bo mb", so the bits alone would have it walked."""
    kinds = []
    for forms in (("case",), ("case", "separators")):
        compiled = program(policy(rule("halt", *LITERALS, forms=forms)), VOCABULARY)
        entries = compiled.tables.token_sync[0, [TOKEN[piece] for piece in (b" o", b" z")]]
        kinds.append([bool(entry & STEP_BIT) for entry in entries.tolist() if entry >= 0])
    assert kinds == [[False, False], [True, True]]


def test_borrowed_rows_change_nothing_but_time(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts, "SHALLOW_BYTES", 0)
    rng = random.Random(seed)
    num_borrowed = 0
    for forms in [(), *FORMS]:
        rules = random_rules(rng, LITERALS, 1, lambda _, forms=forms: forms)  # type: ignore[misc]
        compiled = program(policy(*rules), VOCABULARY)
        compare(compiled, rng)
        rows = compiled.tables.calm_rows
        num_borrowed += int(((rows >= 0) & (rows & EXCEPTIONS != 0)).sum())
    assert num_borrowed > 20


def test_the_same_tokens_cut_or_whole_leave_the_same_state() -> None:
    compiled = program(policy(rule("halt", "bomb", forms=("case", "marks"))), VOCABULARY)
    one = Session(compiled, 2)
    for character in "é中😀ａ\u0301":
        data = character.encode()
        for slot in (0, 1):
            one.reset(slot)
        one.advance([0, 0, 0], [TOKEN[b"bo"], TOKEN[data[:1]], TOKEN[data[1:]]])
        one.advance([1] * (1 + len(data)), [TOKEN[b"bo"], *(TOKEN[bytes([b])] for b in data)])
        assert np.array_equal(one.snapshot(0)[0], one.snapshot(1)[0])
        assert one.snapshot(0)[1] == one.snapshot(1)[1] == 0
