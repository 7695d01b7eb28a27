"""The regexes of a policy as automata: budgets, unions, and who is told of a match.

One automaton for all costs one table read a byte, one for each costs as many as there are regexes:
so regexes share one as far as it stays small (DESIGN section 11).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from streamguard.compiler.regex_bytes import ByteDfa, to_bytes
from streamguard.compiler.regex_checksums import with_checksum
from streamguard.compiler.regex_dfa import TooLargeError, determinise
from streamguard.compiler.regex_nfa import Nfa, RegexError, parse

#: Most states of one automaton, and of all automata of one policy's regexes.
MAX_STATES = 10_000
MAX_POLICY_STATES = 50_000
#: Most states over characters that several regexes share, and how many automata each may try.
MAX_SHARED = 1_000
_TRIED = 3
#: Mapped bytes of a character in a stream: 4 and both marks.
_MOST_BYTES = 6
#: What counts as the longest match of a regex without a limit: all of any prompt.
UNLIMITED = 1 << 40


@dataclass(frozen=True, order=True)
class Regex:
    """One regex as a rule gives it; word = no word character right before or after a match.

    validate  a key of `regex_checksums.CHECKSUMS`, which must hold for the text of a match, or "".
    """

    pattern: str
    ignore_case: bool
    word: bool
    validate: str = ""


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
    """Parse one regex, without its checksum; raises RegexError."""
    return parse(regex.pattern, ignore_case=regex.ignore_case, word=regex.word)


@lru_cache(maxsize=512)
def track_of(regex: Regex) -> RegexTrack:
    """The automaton of one regex: 0.1 s as a rule, a few at most. Raises RegexError."""
    try:
        track = _track((regex,))
    except TooLargeError:
        raise RegexError(_too_large(regex)) from None
    if not any(track.dfa.here) and not any(track.dfa.before):
        because = f"numbers that validate: {regex.validate} never lets pass, " * bool(
            regex.validate
        )
        raise RegexError(
            f"can never match ({because}a class without members, or anchors that exclude each "
            f"other). Correct it."
        )
    return track


def _too_large(regex: Regex) -> str:
    if not regex.validate:
        return (
            f"needs more than {MAX_STATES:,} states: too many unfinished matches can be under way "
            f"at once, since one may begin at any place. Give it a beginning that cannot occur in "
            f"its middle (\\b is one, unless it may hold spaces or punctuation), fewer repetitions "
            f"({{8,}} instead of {{8,500}}, [ -]? only between groups), or narrower classes."
        )
    letters = " [A-Z] or [0-9] for each place that takes both," * (regex.validate == "iban")
    return (
        f"needs more than {MAX_STATES:,} states with validate: {regex.validate}, which sums up every "
        f"number that may have begun. Give it a beginning that cannot occur within the number "
        f"(\\b where no separators are; with them (?:\\A\\D?|\\D\\D)),{letters} one regex "
        f"for each length, or leave validate out."
    )


def tracks_of(
    regexes: Sequence[Regex], on_progress: Callable[[float], None] = lambda share: None
) -> list[RegexTrack]:
    """Few and small automata for all: regexes that need marks apart from the others.

    One with a checksum has an automaton of its own: with others their states would multiply.
    Each regex joins the first of the newest automata that stays small with it; about 0.1 s a regex.
    on_progress is told what share is done. Raises RegexError where `track_of` does.
    """
    alone: dict[Regex, RegexTrack] = {}
    for regex in regexes:
        alone[regex] = track_of(regex)
        on_progress(len(alone) / len(regexes) / 2)
    tracks: list[RegexTrack] = []
    num_joined = 0
    for marks in (False, True):
        groups: list[list[Regex]] = []
        for regex in alone:
            if alone[regex].marks == marks and not regex.validate:
                _join(regex, groups, marks)
        for group in groups:
            try:
                tracks.append(alone[group[0]] if len(group) == 1 else _track(tuple(group)))
            except TooLargeError:  # spelt in bytes it grew
                tracks += [alone[regex] for regex in group]
            num_joined += len(group)
            on_progress(0.5 + num_joined / len(alone) / 2)
    tracks += [alone[regex] for regex in alone if regex.validate]
    if sum(len(track.dfa.goto) for track in tracks) > MAX_POLICY_STATES:
        return list(alone.values())
    return tracks


def _join(regex: Regex, groups: list[list[Regex]], marks: bool) -> None:
    for group in groups[-_TRIED:]:
        try:
            determinise([nfa_of(each) for each in (*group, regex)], marks, MAX_SHARED)
        except TooLargeError:
            continue
        group.append(regex)
        return
    groups.append([regex])


def _track(regexes: tuple[Regex, ...]) -> RegexTrack:
    nfas = [
        with_checksum(nfa_of(regex), regex.validate) if regex.validate else nfa_of(regex)
        for regex in regexes
    ]
    marks = any(nfa.marks for nfa in nfas)
    lengths = [UNLIMITED if nfa.longest is None else _MOST_BYTES * nfa.longest for nfa in nfas]
    return RegexTrack(
        regexes,
        to_bytes(determinise(nfas, marks), marks, MAX_STATES),
        marks,
        any(nfa.starts for nfa in nfas),
        max(lengths),
    )
