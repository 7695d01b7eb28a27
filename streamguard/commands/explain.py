"""`streamguard check --explain`: what the normal forms of each rule cost, and what they hit beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from streamguard.commands.terminal import InputError, count, print_table, size

if TYPE_CHECKING:
    from streamguard.compiler.program import Program
    from streamguard.policy import Policy, PolicySet, Rule

#: Names of the columns of hits beside those of single forms.
NO_FORM, NO_CHECKSUM, AS_WRITTEN = "none", "no checksum", "as written"
_BLOCK = 1 << 20


@dataclass
class Explained:
    """One rule: what it looks for, what that takes, and how often it hits given texts.

    patterns   after normal forms, with every spelling; tracks, states, size_bytes: of the rule alone.
    alike      ASCII characters that are read as one, each group a string; "rn m" = a letter is read
               as two.
    others     number of characters beyond ASCII that are read as ASCII letters or digits.
    skipped    number of characters that are read as nothing.
    validate   the checksum that matches of its regexes need, or None.
    hits       matches by set of forms: none, each of the rule's forms alone, all as written; with a
               checksum, all without it as well.
    """

    policy: str
    rule: str
    normalize: tuple[str, ...]
    boundary: str
    literals: int
    patterns: int
    tracks: int
    states: int
    size_bytes: int
    alike: list[str]
    others: int
    skipped: int
    validate: str | None = None
    hits: dict[str, int] = field(default_factory=dict)


def explain(policies: PolicySet, texts: Sequence[Path] = ()) -> list[Explained]:
    """Look at each rule with patterns by itself.

    Compiles it once, and once more for each form if texts are given.
    """
    return [
        _explain(policy, rule, texts)
        for policy in policies.policies.values()
        for rule in policy.rules
        if rule.probe is None
    ]


def _explain(policy: Policy, rule: Rule, texts: Sequence[Path]) -> Explained:
    from streamguard.compiler.forms import changed_characters

    program = _program(policy, rule)
    changed = changed_characters(rule.normalize) if rule.normalize else {}
    alike, readings = _alike(rule.normalize)
    found = Explained(
        policy.name, rule.id, rule.normalize, rule.boundary, len(rule.literals),
        len(program.tables.pattern_rule), program.max_tracks, program.num_states,
        program.tables.trans.nbytes + program.tables.cold.nbytes, alike,
        sum(code > 0x7F and read in readings for code, read in changed.items()),
        sum(not read for read in changed.values()), rule.validate,
    )  # fmt: skip
    if texts:
        columns: dict[str, tuple[str, ...]] = {NO_FORM: (), AS_WRITTEN: rule.normalize}
        if len(rule.normalize) > 1:
            columns |= {form: (form,) for form in rule.normalize}
        found.hits = {
            name: _hits(policy, replace(rule, normalize=forms), texts)
            for name, forms in columns.items()
        }
        if rule.validate:
            found.hits[NO_CHECKSUM] = _hits(policy, replace(rule, validate=None), texts)
    return found


def _program(policy: Policy, rule: Rule) -> Program:
    from streamguard.compiler.program import compile_program
    from streamguard.policy import PolicySet

    return compile_program(PolicySet.from_policies([replace(policy, rules=(rule,))]))


def _alike(forms: tuple[str, ...]) -> tuple[list[str], set[str]]:
    """Groups of visible ASCII characters that are read as one; all that ASCII letters are read as."""
    from streamguard.compiler.forms import read_character

    groups: dict[str, list[str]] = {}
    for character in map(chr, range(0x21, 0x7F)):
        groups.setdefault(read_character(character, forms), []).append(character)
    shown = []
    for read, members in groups.items():
        if len(members) > 1 or members != [read]:
            also = [] if len(read) == 1 else [read]
            shown.append(" ".join([*also, *sorted(members, key=lambda c: (not c.isalpha(), c))]))
    letters = {read for read, members in groups.items() if any(c.isalnum() for c in members)}
    return sorted(shown), letters


def _hits(policy: Policy, rule: Rule, texts: Sequence[Path]) -> int:
    from streamguard.compiler.forms import readings
    from streamguard.scanner import Scanner

    kept = tuple(text for text in rule.literals if readings(text, rule.normalize))
    if not kept and not rule.regexes:
        return 0
    program = _program(policy, replace(rule, literals=kept))
    number = 0
    for path in texts:
        scanner = Scanner(program)
        try:
            with open(path, "rb") as file:
                while data := file.read(_BLOCK):
                    number += sum(1 for _ in scanner.feed(data))
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); --text needs a file of ordinary text, "
                f"in which the rules should not hit. Correct the path."
            ) from None
        number += sum(1 for _ in scanner.finish())
    return number


def show(found: list[Explained]) -> None:
    """Print a row per rule, then what its forms take for one another."""
    if not found:
        print("no rule has patterns to explain")
        return
    several = len({one.policy for one in found}) > 1

    def name(one: Explained) -> str:
        return f"{one.policy}: {one.rule}" if several else one.rule

    checksums = any(one.validate for one in found)
    print_table(
        ("rule", "normal forms", "boundary", *["checksum"] * checksums, "literals", "patterns",
         "tracks", "states", "size"),
        [
            (
                name(one), ", ".join(one.normalize) or "none", one.boundary,
                *[one.validate or "none"] * checksums, f"{one.literals:,}", f"{one.patterns:,}",
                str(one.tracks), f"{one.states:,}", size(one.size_bytes),
            )
            for one in found
        ],
    )  # fmt: skip
    shown: dict[tuple[str, ...], list[Explained]] = {}
    for one in found:
        if one.normalize:
            shown.setdefault(one.normalize, []).append(one)
    for forms, users in shown.items():
        one = users[0]
        print(f"\n{', '.join(forms)} ({', '.join(map(name, users))}):")
        if one.alike:
            print(f"  the same: {'   '.join(one.alike)}")
        print(f"  {count(one.others, 'other character')} read as ASCII letters or digits")
        if one.skipped:
            print(f"  {count(one.skipped, 'character')} skipped")
    if not any(one.hits for one in found):
        return
    from streamguard.policy_schema import NORMAL_FORMS

    used = [form for form in NORMAL_FORMS if any(form in one.hits for one in found)]
    checked = any(NO_CHECKSUM in one.hits for one in found)
    columns = [NO_FORM, *used, *[NO_CHECKSUM] * checked, AS_WRITTEN]
    print("\nhits in the given text, with each form alone and with all that the rule names:")
    print_table(
        ("rule", *columns),
        [(name(one), *(f"{one.hits[c]:,}" if c in one.hits else "" for c in columns)) for one in found],
    )  # fmt: skip
