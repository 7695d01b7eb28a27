"""What a valid policy may still not mean: rules that never act, messages that break the policy.

Advice only: nothing here makes a policy invalid.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from streamguard.compiler.mapping import Mapping, mark
from streamguard.policy import SEVERITY, Policy, Rule
from streamguard.policy_errors import show

#: Above this the patterns are not compared with each other (it would take seconds).
MAX_COMPARED_BYTES = 2_000_000
_BLOCKING = ("halt", "redirect", "mask")


class _Owner(NamedTuple):
    rule: int
    literal: str


class _Index:
    """Finds the patterns that occur in a string, with nothing but sorted order.

    All patterns that a string begins with are prefixes of its predecessor in sorted order, so one
    bisection and a chain of "longest pattern that is a prefix of me" links finds them. Costs about
    1 µs per byte of text, and no automaton has to be compiled.
    """

    def __init__(self, owners: Iterable[tuple[bytes, _Owner]]) -> None:
        self._owners: dict[bytes, list[_Owner]] = {}
        for pattern, owner in owners:
            self._owners.setdefault(pattern, []).append(owner)
        self._sorted = sorted(self._owners)
        self._longest = max(map(len, self._sorted), default=0)
        self._prefix: list[int] = []
        chain: list[int] = []
        for index, pattern in enumerate(self._sorted):
            while chain and not pattern.startswith(self._sorted[chain[-1]]):
                chain.pop()
            self._prefix.append(chain[-1] if chain else -1)
            chain.append(index)

    def occurrences(self, text: bytes) -> Iterator[tuple[int, _Owner]]:
        """Where each pattern in `text` ends, and whose it is."""
        for start in range(len(text)):
            rest = text[start : start + self._longest]
            index = bisect_right(self._sorted, rest) - 1
            while index >= 0:
                pattern = self._sorted[index]
                if rest.startswith(pattern):
                    for owner in self._owners[pattern]:
                        yield start + len(pattern), owner
                index = self._prefix[index]


def advice(policy: Policy) -> list[str]:
    """Say, one sentence a line, what the author of a valid policy should know about it.

    At most a few lines per rule; takes about 1 µs per byte of patterns.
    """
    lines = []
    if policy.on_error == "pass":
        lines.append(
            "defaults: on_error is pass; if the guard fails at run time, text goes out unguarded."
        )
    for index, rule in enumerate(policy.rules):
        lines += _too_short(index, rule)
    num_bytes = sum(len(literal) for rule in policy.rules for literal in rule.literals)
    if num_bytes > MAX_COMPARED_BYTES:
        lines.append(
            f"{policy.num_patterns:,} patterns are too many to compare with each other here; "
            f"rules that never act because of another one are not reported."
        )
        return lines
    indexes = _indexes(policy)
    for index, rule in enumerate(policy.rules):
        lines += _shadowed(policy, index, rule, indexes)
        lines += _own_message(policy, index, rule, indexes)
    return lines


def _place(index: int, rule: Rule) -> str:
    return f"rules[{index}] {show(rule.id)}: "


def _too_short(index: int, rule: Rule) -> list[str]:
    short = [text for text in rule.literals if len(text) == 1 or text.isspace()]
    if not short or rule.action not in _BLOCKING:
        return []
    return [
        f"{_place(index, rule)}pattern {show(short[0])} is a single character or white space; "
        f"with {rule.action} it concerns nearly every response. Try it with observe first."
    ]


def _mapping(rule: Rule) -> Mapping:
    return Mapping(rule.normalize, rule.boundary)


def _marked(mapping: Mapping, read: str) -> bytes:
    """What was read as bytes; with marks as if it stood between non-word characters.

    Marks stand around separators too: a word within a phrase then looks like that word alone.
    """
    return b"\xfe" + mark(read) + b"\xff" if mapping.wrap else read.encode()


def _indexes(policy: Policy) -> dict[Mapping, _Index]:
    by_mapping: dict[Mapping, list[tuple[bytes, _Owner]]] = {}
    for index, rule in enumerate(policy.rules):
        mapping = _mapping(rule)
        entries = by_mapping.setdefault(mapping, [])
        for text in rule.literals:
            owner = _Owner(index, text)
            entries += [(_marked(mapping, read), owner) for read in mapping.readings(text)]
    return {mapping: _Index(entries) for mapping, entries in by_mapping.items()}


def _shadowed(
    policy: Policy, index: int, rule: Rule, indexes: dict[Mapping, _Index]
) -> Iterator[str]:
    """Patterns of a rule that hold a pattern of another one, which therefore acts first."""
    own = _mapping(rule)
    hits: dict[tuple[int, bool], list[tuple[str, str]]] = {}
    for literal in rule.literals:
        found = list(_before(policy, index, literal, own, indexes))
        if found:
            owner, always = max(found, key=lambda hit: hit[1])
            hits.setdefault((owner.rule, always), []).append((literal, owner.literal))
    for (other_index, always), pairs in hits.items():
        other = policy.rules[other_index]
        literal, inner = pairs[0]
        how_many = "its pattern" if len(rule.literals) == 1 else f"pattern {show(literal)}"
        if len(pairs) > 1:
            every = "all" if len(pairs) == len(rule.literals) else f"{len(pairs):,} of its"
            how_many = f"{every} {len(rule.literals):,} patterns, such as {show(literal)},"
        plural = len(pairs) > 1
        verb = "never act" if plural else "never acts"
        if not always:
            verb = ("act" if plural else "acts") + " only where one token completes both"
        yield (
            f"{_place(index, rule)}{how_many} {verb}: {show(literal)} contains {show(inner)} of "
            f"rule {show(other.id)} ({other.action}), which acts first. "
            f"Delete {'them' if plural else 'it'}, or narrow rule {show(other.id)}."
        )


def _before(
    policy: Policy, index: int, literal: str, own: Mapping, indexes: dict[Mapping, _Index]
) -> Iterator[tuple[_Owner, bool]]:
    """Patterns of other rules that every text with `literal` holds and that end the matter first.

    The second value is whether `literal` never acts, or only when both complete in one token.
    """

    def rank(at: int) -> tuple[int, int]:
        return SEVERITY.index(policy.rules[at].action), at

    for mapping, patterns in indexes.items():
        if not set(own.normalize) <= set(mapping.normalize):
            continue  # other spellings of the literal do not hold the pattern
        spellings = mapping.readings(literal) if own.normalize else (mapping.fold(literal),)
        found: list[dict[_Owner, bool]] = []
        for read in spellings:
            text = _marked(mapping, read)
            if mapping.wrap and not own.wrap:
                text = text[1:-1]  # nothing is known of the characters around it
            before: dict[_Owner, bool] = {}
            for end, owner in patterns.occurrences(text):
                other = policy.rules[owner.rule]
                if owner.rule == index or other.action not in _BLOCKING:
                    continue
                together = end == len(text) and mapping.wrap == own.wrap
                wins = rank(owner.rule) < rank(index)
                if wins or not together:
                    before[owner] = wins
            found.append(before)
        for owner in found[0] if found else ():
            if all(owner in other for other in found):
                yield owner, found[0][owner]


def _own_message(
    policy: Policy, index: int, rule: Rule, indexes: dict[Mapping, _Index]
) -> Iterator[str]:
    for mapping, patterns in indexes.items() if rule.message else ():
        for _, owner in patterns.occurrences(_marked(mapping, mapping.fold(rule.message or ""))):
            other = policy.rules[owner.rule]
            yield (
                f"{_place(index, rule)}its message contains {show(owner.literal)} of rule "
                f"{show(other.id)} ({other.action}), so the response would hold what the policy "
                f"is there to stop. Reword the message."
            )
            return
