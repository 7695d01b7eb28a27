"""From the text of a regex to its position automaton, or a refusal that says what to write instead.

The standard library parses. What it gives becomes Glushkov's automaton: a state for each place in
the regex that takes a character, no empty moves. Anchors are conditions on the *gap* between two
characters; a gap has a kind, and everything that depends on gaps is kept once per kind:

    2 * before + after    in a text: what stands before and after it (0 = no word character, 1 = one)
    4 + after             the start of the text

Without \\b and \\B only kinds 0 and 4 are used. The end of a text counts as no word character.
"""

from __future__ import annotations

import re
import re._constants as sre
import re._parser as sre_parser
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from streamguard.compiler.regex_classes import LAST, CharSet, category, fold, make, negate

#: Most places that take a character, after repetitions are written out.
MAX_POSITIONS = 4000
#: Kinds of gaps that the start of a match can lie in, that lie within a text.
ALL_GAPS, INNER_GAPS = range(6), range(4)
START = 4
_MANY = 1 << 40
_WORD_START = frozenset({0, 1, 4, 5})  # nothing of a word before
_WORD_END = frozenset({0, 2, 4})  # nothing of a word after
_AT = {
    sre.AT_BEGINNING: frozenset({4, 5}),
    sre.AT_BEGINNING_STRING: frozenset({4, 5}),
    sre.AT_BOUNDARY: frozenset({1, 2, 5}),
    sre.AT_NON_BOUNDARY: frozenset({0, 3, 4}),
}
_REFUSED = {
    "GROUPREF": "a back-reference needs memory of what a group matched",
    "GROUPREF_IGNORE": "a back-reference needs memory of what a group matched",
    "GROUPREF_EXISTS": "a conditional needs memory of which group matched",
    "ASSERT": "look-around reads text outside the match",
    "ASSERT_NOT": "look-around reads text outside the match",
    "FAILURE": "(?!) never matches",
    "ATOMIC_GROUP": "an atomic group drops matches that the text holds",
}
_REMEDY = {
    "GROUPREF": "Write the alternatives out.",
    "GROUPREF_IGNORE": "Write the alternatives out.",
    "GROUPREF_EXISTS": "Write the alternatives out, one regex for each.",
    "ASSERT": "Use \\b, boundary: word, or make what must stand there a part of the match.",
    "ASSERT_NOT": "Use \\b, boundary: word, or a negated class such as [^x].",
    "FAILURE": "Delete it.",
    "ATOMIC_GROUP": "Write (?:…).",
}


class RegexError(ValueError):
    """A regex that cannot be compiled. The message says why and what to write; no place, no regex."""


@dataclass(frozen=True)
class Nfa:
    """The positions of one regex.

    classes  per position the characters that it takes.
    first    per value and gap kind the positions that a match can begin with there, as bits.
    follow   per position, value and inner gap kind, those that may come next.
    last     per inner gap kind those with which a match may end before such a gap.
    marks    whether it depends on what is a word: it reads a stream with marks then.
    starts   whether it depends on where the text starts.
    longest  most characters of a match; None = no limit.
    values   classes that all characters are cut into. The positions that may come next depend on
             which one the next character is in: with a checksum (`regex_checksums`), else not.
    """

    classes: tuple[CharSet, ...]
    first: tuple[tuple[int, ...], ...]
    follow: tuple[tuple[tuple[int, ...], ...], ...]
    last: tuple[int, ...]
    marks: bool
    starts: bool
    longest: int | None
    values: tuple[CharSet, ...] = (((0, LAST),),)


def parse(pattern: str, *, ignore_case: bool = False, word: bool = False) -> Nfa:
    """The position automaton of a regex; word = it needs no word character on either side.

    Takes about a millisecond; the first use of a category 50. Raises RegexError.
    """
    flags = re.IGNORECASE if ignore_case else 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of syntax that may change its meaning one day
            tree = sre_parser.parse(pattern, flags)
        builder = _Builder()
        fragment = builder.sequence(list(tree), tree.state.flags)
    except re.error as error:
        where = "" if error.pos is None else f" at character {error.pos}"
        raise RegexError(
            f"is no valid regex: {error.msg}{where}. Correct it (the syntax is that of "
            f"Python's re)."
        ) from None
    except OverflowError:
        raise RegexError(f"repeats more than {MAX_POSITIONS:,} times. {_SHORTER}") from None
    except RecursionError:
        raise RegexError("is nested too deeply. Remove groups that are not needed.") from None
    if word:
        start, end = _condition(_WORD_START), _condition(_WORD_END)
        fragment = builder.join(start, builder.join(fragment, end))
        builder.marks = True
    if fragment.nullable:
        raise RegexError(
            "matches the empty string, which is everywhere: it would block all output. Let it need "
            "at least one character: + instead of *, or no ? around the whole."
        )
    return Nfa(
        tuple(builder.classes),
        (tuple(fragment.first),),
        tuple((tuple(of_gap),) for of_gap in builder.follow),
        tuple(fragment.last[gap] for gap in INNER_GAPS),
        builder.marks,
        builder.starts,
        None if fragment.longest >= _MANY else fragment.longest,
    )


_SHORTER = "Give fewer repetitions: {8,} guards as well as {8,5000} in most cases."


@dataclass
class _Fragment:
    """A part of a regex: can it be empty in a gap of each kind (bits), how it begins and ends."""

    nullable: int
    first: list[int]
    last: list[int]
    longest: int


def _condition(gaps: frozenset[int]) -> _Fragment:
    return _Fragment(sum(1 << gap for gap in gaps), [0] * 6, [0] * 6, 0)


def _empty() -> _Fragment:
    return _condition(frozenset(ALL_GAPS))


class _Builder:
    def __init__(self) -> None:
        self.classes: list[CharSet] = []
        self.follow: list[list[int]] = []
        self.marks = False
        self.starts = False

    def sequence(self, items: Sequence[Any], flags: int) -> _Fragment:
        # From the end: a long row of optional parts then links each to the rest in one step.
        whole = _empty()
        for op, argument in reversed(items):
            whole = self.join(self.item(op, argument, flags), whole)
        return whole

    def join(self, head: _Fragment, tail: _Fragment) -> _Fragment:
        for gap in INNER_GAPS:
            self._link(head.last[gap], tail.first[gap], gap)
        return _Fragment(
            head.nullable & tail.nullable,
            [head.first[g] | (tail.first[g] if head.nullable >> g & 1 else 0) for g in ALL_GAPS],
            [tail.last[g] | (head.last[g] if tail.nullable >> g & 1 else 0) for g in ALL_GAPS],
            head.longest + tail.longest,
        )

    def _link(self, ends: int, starts: int, gap: int) -> None:
        if starts:
            for position in bits(ends):
                self.follow[position][gap] |= starts

    def item(self, op: Any, argument: Any, flags: int) -> _Fragment:
        ascii_only = bool(flags & re.ASCII)
        if op is sre.LITERAL:
            return self._characters(((argument, argument),), flags)
        if op is sre.NOT_LITERAL:
            return self._characters(((argument, argument),), flags, negated=True)
        if op is sre.ANY:
            nothing_or_newline: CharSet = () if flags & re.DOTALL else ((10, 10),)
            return self._characters(nothing_or_newline, flags & ~re.IGNORECASE, negated=True)
        if op is sre.IN:
            ranges: list[tuple[int, int]] = []
            categories: list[tuple[int, int]] = []
            for kind, value in argument:
                if kind is sre.LITERAL:
                    ranges.append((value, value))
                elif kind is sre.RANGE:
                    ranges.append(value)
                elif kind is sre.CATEGORY:
                    categories += category(str(value), ascii_only)
            negated = any(kind is sre.NEGATE for kind, _ in argument)
            return self._characters(make(ranges), flags, negated, tuple(categories))
        if op is sre.BRANCH:
            parts = [self.sequence(list(branch), flags) for branch in argument[1]]
            return _Fragment(
                _union(part.nullable for part in parts),
                [_union(part.first[g] for part in parts) for g in ALL_GAPS],
                [_union(part.last[g] for part in parts) for g in ALL_GAPS],
                max(part.longest for part in parts),
            )
        if op is sre.SUBPATTERN:
            _, add, remove, inner = argument
            return self.sequence(list(inner), (flags | add) & ~remove)
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            low, high, inner = argument
            return self._repeat(low, high, inner, flags)
        if op is sre.AT:
            return self._anchor(argument, flags)
        name = str(op)
        reason = _REFUSED.get(name, f"{name} is not supported")
        raise RegexError(
            f"cannot be matched as the text streams: {reason}. {_REMEDY.get(name, '')}"
        )

    def _characters(
        self, chars: CharSet, flags: int, negated: bool = False, caseless: CharSet = ()
    ) -> _Fragment:
        if len(self.classes) == MAX_POSITIONS:
            raise RegexError(
                f"needs more than {MAX_POSITIONS:,} places that take a character. {_SHORTER}"
            )
        if flags & re.IGNORECASE:
            chars = fold(chars, bool(flags & re.ASCII))
        chars = make((*chars, *caseless))
        self.classes.append(negate(chars) if negated else chars)
        self.follow.append([0] * 4)
        bit = 1 << len(self.classes) - 1
        return _Fragment(0, [bit] * 6, [bit] * 6, 1)

    def _repeat(self, low: int, high: Any, inner: Any, flags: int) -> _Fragment:
        unlimited = high is sre.MAXREPEAT
        copies = low if unlimited else int(high)
        if copies * max(1, _size(inner)) > MAX_POSITIONS:
            raise RegexError(
                f"repeats to more than {MAX_POSITIONS:,} places that take a character. {_SHORTER}"
            )
        items = list(inner)
        if unlimited:  # X{m,} = m - 1 times X, then X+ (or X* for m = 0)
            whole = self.sequence(items, flags)
            for gap in INNER_GAPS:
                self._link(whole.last[gap], whole.first[gap], gap)
            if whole.longest:
                whole.longest = _MANY
            if low == 0:
                whole.nullable = _empty().nullable
            low -= 1
        else:  # X{m,n} = m times X, then (X(X(X)?)?)?
            whole = _empty()
            for _ in range(copies - low):
                whole = self.join(self.sequence(items, flags), whole)
                whole.nullable = _empty().nullable
        for _ in range(low):
            whole = self.join(self.sequence(items, flags), whole)
        return whole

    def _anchor(self, where: Any, flags: int) -> _Fragment:
        if where in (sre.AT_END, sre.AT_END_STRING):
            raise RegexError(
                "asks where the text ends ($ or \\Z): that is known only when the match has been "
                "written. Use \\b, or delete it."
            )
        if where is sre.AT_BEGINNING and flags & re.MULTILINE:
            raise RegexError("uses ^ with the flag m. Write (?:\\A|\\n) for the start of a line.")
        if where in (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
            if flags & re.ASCII:
                raise RegexError(
                    "uses \\b or \\B with the flag a, but words are told apart by Unicode here. "
                    "Limit the flag to the classes that need it: (?a:\\d)."
                )
            self.marks = True
        else:
            self.starts = True
        return _condition(_AT[where])


def _union(masks: Any) -> int:
    whole = 0
    for mask in masks:
        whole |= mask
    return whole


def _size(tree: Any) -> int:
    """Places that take a character, at most MAX_POSITIONS + 1."""
    total = 0
    for op, argument in tree:
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            low, high, inner = argument
            copies = max(1, low if high is sre.MAXREPEAT else int(high))
            total += copies * _size(inner)
        elif op is sre.BRANCH:
            total += sum(map(_size, argument[1]))
        elif op is sre.SUBPATTERN:
            total += _size(argument[3])
        else:
            total += 1
    return min(total, MAX_POSITIONS + 1)


def bits(mask: int) -> Iterator[int]:
    """The places of the bits that are set, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
