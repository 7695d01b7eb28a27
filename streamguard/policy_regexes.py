"""Checking the `regexes` of a policy: what is wrong with each, in the words of the policy file.

The compiler says what it cannot match; it is loaded only for policies that have regexes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from streamguard.policy_errors import Problems, show, wrong_type
from streamguard.policy_schema import MAX_PATTERN_BYTES, MAX_REGEXES, text_fault

if TYPE_CHECKING:
    from streamguard.compiler.regexes import Regex
    from streamguard.policy import Rule


def regexes_of(rule: Rule) -> list[Regex]:
    """A rule's regexes as the compiler takes them."""
    from streamguard.compiler.regexes import Regex

    return [
        Regex(pattern, "case" in rule.normalize, rule.boundary == "word", rule.validate or "")
        for pattern in rule.regexes
    ]


def needs_next_character(rule: Rule) -> bool:
    """Whether a match of the rule may be certain only with the character behind it."""
    if rule.boundary == "word" or not rule.regexes:
        return rule.boundary == "word"
    from streamguard.compiler.regexes import nfa_of

    return any(nfa_of(regex).marks for regex in regexes_of(rule))


def check_regexes(
    given: Sequence[object],
    forms: Sequence[str],
    boundary: str,
    validate: str,
    place: str,
    problems: Problems,
) -> tuple[str, ...]:
    """Check the regexes of one rule, each compiled once.

    validate  the rule's checksum, or "". About 0.1 s a regex; 1 s, at most some, with a checksum.
    """
    if not given:
        return ()
    if len(given) > MAX_REGEXES:
        problems.stop(f"{place}{_too_many(len(given))}")
    from streamguard.compiler.regexes import Regex, RegexError, track_of

    for form in forms:
        if form != "case":
            problems.add(
                f"{place}normalize holds {show(form)}; regexes read the text with case only. "
                f"Write normalize: [case] (or []) and the other spellings into the regex, or move "
                f"the regexes to a rule of their own."
            )
    kept: dict[str, int] = {}
    for index, pattern in enumerate(given):
        where = f"regexes[{index}]"
        if not isinstance(pattern, str):
            problems.add(place + wrong_type(where, pattern, "a string"))
            continue
        fault = _text_fault(pattern)
        if fault is None and kept.setdefault(pattern, index) != index:
            fault = (
                f"repeats regexes[{kept[pattern]}]; a pattern may occur once in a rule, or it "
                f"would count twice. Delete one."
            )
        if fault is None:
            try:
                track_of(Regex(pattern, "case" in forms, boundary == "word", validate))
            except RegexError as error:
                fault = str(error)
        if fault is not None:
            problems.add(f"{place}{where} {show(pattern)} {fault}")
    return tuple(kept)


def check_budget(rules: Sequence[Rule], problems: Problems) -> None:
    """Check what the regexes of a whole policy need together; not after other problems."""
    every = [regex for rule in rules for regex in rule.regexes]
    if not every or problems.total:
        return
    if len(every) > MAX_REGEXES:
        problems.add(_too_many(len(every)))
        return
    from streamguard.compiler.regexes import MAX_POLICY_STATES, track_of

    sizes = {regex: len(track_of(regex).dfa.goto) for rule in rules for regex in regexes_of(rule)}
    if sum(sizes.values()) > MAX_POLICY_STATES:
        largest = max(sizes, key=lambda regex: sizes[regex])
        problems.add(
            f"the regexes need {sum(sizes.values()):,} states; allowed: {MAX_POLICY_STATES:,} in a "
            f"policy, since every worker keeps them all. The largest, {show(largest.pattern)}, "
            f"needs {sizes[largest]:,}. Give fewer repetitions or narrower classes: [0-9] for \\d."
        )


def _too_many(number: int) -> str:
    return (
        f"{number} regexes; allowed: {MAX_REGEXES} in a policy, since each is an automaton of its "
        f"own. Move plain strings to literals, or join regexes with |."
    )


def _text_fault(pattern: str) -> str | None:
    size_bytes = len(pattern.encode(errors="replace"))
    if not 0 < size_bytes <= MAX_PATTERN_BYTES:
        return f"is {size_bytes} bytes long; allowed: 1..{MAX_PATTERN_BYTES}. Write another one."
    fault = text_fault(pattern)
    return f"{fault}. Write the characters that are meant." if fault else None
