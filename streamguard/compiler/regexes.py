"""The regexes of a policy as automata: budgets, unions, and who is told of a match.

One automaton for all costs one table read a byte, one for each costs as many as there are regexes:
so regexes share one as far as it stays small (DESIGN section 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from streamguard.compiler.regex_bytes import ByteDfa, to_bytes
from streamguard.compiler.regex_dfa import TooLargeError, determinise
from streamguard.compiler.regex_nfa import Nfa, RegexError, parse

#: Most states of one automaton, and of all automata of one policy's regexes.
MAX_STATES = 10_000
MAX_POLICY_STATES = 50_000
#: Unions that may turn out too large before the remaining regexes stay alone.
_MAX_FAILURES = 6
#: Mapped bytes of a character in a stream: 4 and both marks.
_MOST_BYTES = 6
#: What counts as the longest match of a regex without a limit: all of any prompt.
UNLIMITED = 1 << 40


@dataclass(frozen=True, order=True)
class Regex:
    """One regex as a rule gives it; word = no word character right before or after a match."""

    pattern: str
    ignore_case: bool
    word: bool


@dataclass(frozen=True)
class RegexTrack:
    """An automaton and the regexes that it finds: bit i of its outputs is regexes[i].

    marks, starts as in `Nfa`; longest = most mapped bytes of a match, at least.
    """

    regexes: tuple[Regex, ...]
    dfa: ByteDfa
    marks: bool
    starts: bool
    longest: int


@lru_cache(maxsize=4096)
def nfa_of(regex: Regex) -> Nfa:
    """Parse one regex; raises RegexError."""
    return parse(regex.pattern, ignore_case=regex.ignore_case, word=regex.word)


@lru_cache(maxsize=512)
def track_of(regex: Regex) -> RegexTrack:
    """The automaton of one regex: 0.1 s as a rule, 1 s at most. Raises RegexError."""
    nfa = nfa_of(regex)
    try:
        track = _track((regex,))
    except TooLargeError:
        raise RegexError(
            f"needs more than {MAX_STATES:,} states: too many unfinished matches can be under way "
            f"at once, since one may begin at any place. Let it begin with \\b or with characters "
            f"that cannot stand in its middle, give fewer repetitions ({{8,}} instead of "
            f"{{8,500}}), or narrow the classes that repeat."
        ) from None
    if not any(track.dfa.here) and not any(track.dfa.before):
        raise RegexError(
            "can never match (a class without members, or anchors that exclude each other). "
            "Correct it."
        )
    assert nfa.classes
    return track


def tracks_of(regexes: Sequence[Regex]) -> list[RegexTrack]:
    """As few automata as stay within the budget; regexes that need marks apart from the others.

    Raises RegexError where `track_of` does.
    """
    alone = {regex: track_of(regex) for regex in regexes}
    tracks: list[RegexTrack] = []
    for marks in (False, True):
        group = tuple(regex for regex in alone if alone[regex].marks == marks)
        tracks += _shared(group, alone, [_MAX_FAILURES])
    if sum(len(track.dfa.goto) for track in tracks) > MAX_POLICY_STATES:
        return list(alone.values())
    return tracks


def _shared(
    group: tuple[Regex, ...], alone: dict[Regex, RegexTrack], failures_left: list[int]
) -> Iterator[RegexTrack]:
    """One automaton for the group, or one for each half of it."""
    if len(group) > 1 and failures_left[0]:
        try:
            yield _track(group)
            return
        except TooLargeError:
            failures_left[0] -= 1
    if len(group) < 2 or not failures_left[0]:
        yield from (alone[regex] for regex in group)
        return
    middle = len(group) // 2
    yield from _shared(group[:middle], alone, failures_left)
    yield from _shared(group[middle:], alone, failures_left)


def _track(regexes: tuple[Regex, ...]) -> RegexTrack:
    nfas = [nfa_of(regex) for regex in regexes]
    marks = any(nfa.marks for nfa in nfas)
    lengths = [UNLIMITED if nfa.longest is None else _MOST_BYTES * nfa.longest for nfa in nfas]
    return RegexTrack(
        regexes,
        to_bytes(determinise(nfas, marks), marks, MAX_STATES),
        marks,
        any(nfa.starts for nfa in nfas),
        max(lengths),
    )
