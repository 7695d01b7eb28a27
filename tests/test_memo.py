"""Walks of many tracks that are remembered: they change nothing but time."""

from __future__ import annotations

import random

import pytest
from guard_cases import FORMS, policy, program, random_rules, rule, split_bytes
from test_shortcuts import LITERALS, TOKEN, TOKENS, VOCABULARY, random_data

from streamguard import session as sessions
from streamguard.compiler import automaton
from streamguard.compiler.program import Program
from streamguard.session import Session
from streamguard_kernels.slots import EXCEPTIONS, KEPT

REGEXES = (r"\bo\w", "[中é]b", "b[^o]", r"\b\d{2,4}-\d{2}\b", r"(?:1\d?[b.]){2}")


def programs(rng: random.Random) -> list[Program]:
    """Policies of several tracks: of many forms, and of regexes."""
    forms = iter(rng.sample(FORMS, 3))
    of_forms = random_rules(rng, LITERALS, 3, lambda _: next(forms))
    found = [policy(*of_forms), policy(rule("halt", regexes=list(REGEXES)), rule("mask", "bomb"))]
    return [one for one in (program(each, VOCABULARY) for each in found) if one.max_tracks > 2]


@pytest.mark.parametrize("kept", [4096, 8], ids=["", "soon full"])
def test_what_is_remembered_is_what_a_walk_gives(
    kept: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    num_kept = num_forgotten = num_inside = 0
    for compiled in [each for _ in range(4) for each in programs(rng)]:
        monkeypatch.setattr(sessions, "_KEPT", kept)
        quick, slow = Session(compiled, 3), Session(compiled, 3)
        numbers = "12-1b1.12 14-25 é1 110 1b".encode()
        texts = [random_data(rng) + numbers[rng.randrange(20) :] for _ in range(4)]
        before = 0
        for _ in range(6):  # the same few texts again, cut elsewhere
            read = [split_bytes(rng, rng.choice(texts), set(TOKENS)) for _ in range(3)]
            for slot in range(3):
                for one in (quick, slow):
                    one.reset(slot)
                slow._slots.plain[slot] = 0
            for pieces in zip(*read, strict=False):
                tokens = [TOKEN[piece] for piece in pieces]
                others = [rng.randrange(len(TOKENS)) for _ in range(3)]
                slots = rng.sample(range(3), 3)
                assert quick.peek(slots, others).tolist() == slow.peek(slots, others).tolist()
                assert quick.advance(slots, tokens).tolist() == slow.advance(slots, tokens).tolist()
                assert quick.events() == slow.events()
                if rng.random() < 0.2:
                    assert quick.forbidden(1).tolist() == slow.forbidden(1).tolist()
                known = [
                    k for k in quick._slots.synced.tolist() if k != -1 and k & EXCEPTIONS == KEPT
                ]
                num_kept += len(known)
                num_inside += sum(k >> 16 & 0xFFF != 0 for k in known)
                num_forgotten += int(quick._slots.num_memo[0]) < before
                before = int(quick._slots.num_memo[0])
            for slot in range(3):
                (states, pending), (expected, unfinished) = (
                    quick.snapshot(slot),
                    slow.snapshot(slot),
                )
                assert states.tolist() == expected.tolist()
                assert pending == unfinished
    assert num_kept > 100
    assert num_inside > 10
    assert (num_forgotten > 5) == (kept == 8)


def test_a_slot_that_is_free_is_left_alone_when_the_memo_is_emptied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "_KEPT", 2)
    one = Session(program(policy(rule("halt", regexes=list(REGEXES))), VOCABULARY), 2)
    for text in (b"12-1", b"1b1", b"o1", b"14-2", b"1b", b"110-1") * 3:
        one.reset(0)
        one.reset(1)
        for byte in text:
            one.advance([0, 1], [TOKEN[bytes([byte])]] * 2)
        one._slots.policy[1] = -1
        states, _ = one.snapshot(0)
        slow = Session(one.program, 1)
        slow.reset(0)
        slow._slots.plain[0] = 0
        slow.advance([0] * len(text), [TOKEN[bytes([byte])] for byte in text])
        assert states.tolist() == slow.snapshot(0)[0].tolist()


def test_a_policy_of_one_track_keeps_nothing() -> None:
    one = Session(program(policy(rule("halt", "bomb")), VOCABULARY), 1)
    assert one._slots.memo_walks.size == 0


def test_states_of_one_policy_are_not_taken_for_those_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cold states count on behind a track's rows, so a long track's are called like the next one's."""
    monkeypatch.setattr(automaton, "DENSE_BYTES", 0)
    monkeypatch.setattr(automaton, "HOT_BYTES", 0)
    rng = random.Random(0)
    forms: tuple[tuple[str, ...], ...] = ((), ("case",), ("zero-width",))
    short, long = "fedcba" * 3 + "x", "abcdefx" + "".join(rng.choice("abcdef") for _ in range(200))

    def both(literal: str) -> Program:
        found = [
            policy(*(rule("halt", text, forms=each) for each in forms), name=name)
            for text, name in ((literal, "default"), (short, "other"))
        ]
        return program(found, VOCABULARY)

    deep = 3  # characters of the short one; the long one ends where its state has that one's name
    tables = both(long[:60] + "x").tables
    apart = int(tables.track_base[tables.policy_tracks[1]] - tables.track_base[0])
    compiled = both(long[: apart + deep] + short[deep])
    text = [TOKEN[bytes([byte])] for byte in (long[: apart + deep] + short[deep]).encode()]
    other = [TOKEN[bytes([byte])] for byte in short[: deep + 1].encode()]
    one = Session(compiled, 2)
    one.reset(0, policy="other")
    one.reset(1)
    one.advance([0] * len(other), other)
    assert not one.advance([1] * (len(text) - 1), text[:-1]).any()
    slow = Session(compiled, 2)
    slow.reset(1)
    slow._slots.plain[1] = 0
    slow.advance([1] * (len(text) - 1), text[:-1])
    names = [each.snapshot(slot)[0].tolist() for each, slot in ((one, 0), (one, 1), (slow, 1))]
    assert names[1] == names[2]
    assert one.advance([1], [text[-1]]).tolist() == [1]
    one.reset(0, policy="other")
    one.advance([0] * deep, other[:-1])
    assert one.snapshot(0)[0].tolist() == names[1]  # or this tests nothing
