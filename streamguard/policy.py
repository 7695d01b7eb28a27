"""The policy: loading one file or a folder of files into frozen, resolved rules.

Everything that can be wrong with a policy is found here, before an engine starts; what the rest of
the package gets has defaults applied, literals files read, and is within the limits.
Imports no engine: vLLM's frontend process loads this module.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from streamguard.policy_errors import Problems, found, show, wrong_type
from streamguard.policy_reader import MAX_FILE_BYTES, UnreadableError, parse_yaml, read_text
from streamguard.policy_regexes import check_budget, check_regexes
from streamguard.policy_schema import (
    ACTIONS,
    BOUNDARIES,
    CATEGORIES,
    MAX_MESSAGE_BYTES,
    MAX_PATTERN_BYTES,
    MAX_PATTERNS,
    MAX_REGEXES,
    MAX_RULES,
    NORMAL_FORMS,
    SEVERITY,
    PolicySchema,
    RuleSchema,
    text_fault,
    validate,
)

__all__ = [
    "ACTIONS",
    "BOUNDARIES",
    "CATEGORIES",
    "MAX_FILE_BYTES",
    "MAX_MESSAGE_BYTES",
    "MAX_PATTERNS",
    "MAX_PATTERN_BYTES",
    "MAX_REGEXES",
    "MAX_RULES",
    "NORMAL_FORMS",
    "SEVERITY",
    "Policy",
    "PolicySet",
    "Rule",
]


@dataclass(frozen=True)
class Rule:
    """One rule, resolved: what to look for and what to do when a model would write it."""

    id: str
    category: str
    stage: str
    literals: tuple[str, ...]
    normalize: tuple[str, ...]
    boundary: str
    action: str
    message: str | None
    regexes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """A validated policy. Make one with `Policy.load` or `Policy.from_dict`.

    `source` is the path as given, for messages; it is not part of `sha256`.
    """

    name: str
    client_selectable: bool
    on_error: str
    rules: tuple[Rule, ...]
    source: str

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Load one policy file and the literals files that it names.

        Takes about a second per million literals in a literals file (inline ones are parsed as
        YAML, some twenty times slower). Raises PolicyError that lists every problem in the file.
        """
        source = os.fspath(path)
        problems = Problems(source)
        try:
            data = parse_yaml(read_text(Path(source)))
        except UnreadableError as error:
            problems.stop(str(error))
        return _resolve(data, problems, Path(source).parent)

    @classmethod
    def from_dict(
        cls,
        mapping: Mapping[str, Any],
        *,
        source: str = "<dict>",
        base_dir: str | os.PathLike[str] | None = None,
    ) -> Policy:
        """Build a policy from the objects that its YAML would give; same checks as `load`.

        base_dir    where relative literals_file paths start; the working directory if None.
        """
        return _resolve(mapping, Problems(source), Path(base_dir or "."))

    @property
    def num_patterns(self) -> int:
        """Literals and regexes of all rules together."""
        return sum(len(rule.literals) + len(rule.regexes) for rule in self.rules)

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the resolved content, literals included.

        Does not depend on how, or in which files, the content was written down.
        """
        return _digest(
            {
                "version": 1,
                "name": self.name,
                "client_selectable": self.client_selectable,
                "on_error": self.on_error,
                "rules": [_content(rule) for rule in self.rules],
            }
        )


@dataclass(frozen=True)
class PolicySet:
    """The policies that one server knows, by name, and the name of the one that always applies."""

    policies: dict[str, Policy]
    default: str

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PolicySet:
        """Load a policy file, or a folder of *.yaml and *.yml files in order of their names.

        Files whose name starts with a dot and subfolders are skipped. Raises PolicyError for the
        first file with problems, and where `from_policies` does.
        """
        source = os.fspath(path)
        if not os.path.isdir(source):
            return cls.from_policies([Policy.load(source)], source=source)
        problems = Problems(source)
        try:
            names = sorted(os.listdir(source))
        except OSError as error:
            problems.stop(f"the folder cannot be listed ({error}). Grant read permission.")
        # A dangling link is kept: skipping it would silently drop a policy.
        files = [
            os.path.join(source, name)
            for name in names
            if name.endswith((".yaml", ".yml"))
            and not name.startswith(".")
            and not os.path.isdir(os.path.join(source, name))
        ]
        if not files:
            problems.stop(
                f"the folder holds no policy ({len(names)} entries, none named *.yaml or *.yml); "
                f"at least one is needed, since nothing would be guarded. Add one."
            )
        return cls.from_policies(map(Policy.load, files), source=source)

    @classmethod
    def from_policies(cls, policies: Iterable[Policy], *, source: str = "<policies>") -> PolicySet:
        """Gather policies; the one named "default", or the only one, is the default.

        Raises PolicyError if there is none, two have one name, or no default can be told.
        """
        problems = Problems(source)
        by_name: dict[str, Policy] = {}
        for policy in policies:
            other = by_name.setdefault(policy.name, policy)
            if other is not policy:
                problems.add(
                    f"policy name {show(policy.name)} occurs in {other.source} and in "
                    f'{policy.source}; names must differ (a file without a name is "default"), '
                    f"since requests and metrics go by them. Rename one."
                )
        problems.raise_if_any()
        if not by_name:
            problems.stop("no policy given; at least one is needed. Add one.")
        if len(by_name) > 1 and "default" not in by_name:
            problems.stop(
                f"no policy is named default; found: {', '.join(by_name)}. With several policies "
                f"one must apply to requests that ask for none. Set name: default in one of them."
            )
        return cls(by_name, "default" if len(by_name) > 1 else next(iter(by_name)))

    @cached_property
    def sha256(self) -> str:
        """Hex digest of all policies and of which is the default."""
        digests = {name: policy.sha256 for name, policy in self.policies.items()}
        return _digest({"default": self.default, "policies": digests})


def _content(rule: Rule) -> dict[str, Any]:
    """A rule's fields; one that came later is left out where unused: older digests stay."""
    return {key: value for key, value in vars(rule).items() if key != "regexes" or value}


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _resolve(data: object, problems: Problems, base_dir: Path) -> Policy:
    if not isinstance(data, Mapping):
        problems.stop(
            f"the file holds {found(data)}; a policy is a mapping with the keys "
            f"{', '.join(PolicySchema.model_fields)}. Start with version: 1."
        )
    # A file of another version has another schema: its other problems are not worth telling.
    version = data.get("version")
    if type(version) is not int or version != 1:
        is_or_was = "is missing" if "version" not in data else f"is {found(version)}"
        problems.stop(
            f"version {is_or_was}; it must be the integer 1, the only version that exists. "
            f"Write version: 1, without quotes."
        )
    # After a problem in the header its defaults will do: the rules' problems are told as well.
    header = validate(PolicySchema, data, "", problems) or PolicySchema(version=1)
    rules = data.get("rules")
    if not isinstance(rules, list | tuple):
        problems.stop(wrong_type("rules", rules, f"a list of 1..{MAX_RULES} rules"))
    if not 1 <= len(rules) <= MAX_RULES:
        problems.stop(
            f"rules has {len(rules)} entries; allowed: 1..{MAX_RULES}. "
            + ("A policy without rules guards nothing. Add one." if not rules else "Merge some.")
        )
    resolved: list[Rule] = []
    place_of_id: dict[str, int] = {}
    num_patterns = 0
    for index, entry in enumerate(rules):
        rule_id = entry.get("id") if isinstance(entry, Mapping) else None
        place = f"rules[{index}]: "
        if isinstance(rule_id, str):
            place = f"rules[{index}] {show(rule_id)}: "
            first = place_of_id.setdefault(rule_id, index)
            if first != index:
                problems.add(
                    f"{place}id is that of rules[{first}] too; ids must differ, since verdicts "
                    f"and metrics go by them. Rename one."
                )
        rule = validate(RuleSchema, entry, place, problems)
        if rule is None:
            continue
        own_forms = "normalize" in rule.model_fields_set
        forms = rule.normalize if own_forms else header.defaults.normalize
        _check_message(rule, place, problems)
        room = MAX_PATTERNS - num_patterns
        literals = _patterns(rule, "case" in forms, place, base_dir, room, problems)
        num_patterns += len(literals)
        resolved.append(
            Rule(
                id=rule.id,
                category=rule.category,
                stage=rule.stage,
                literals=literals,
                normalize=tuple(forms),
                boundary=rule.boundary,
                action=rule.action,
                message=rule.message or None,
                regexes=check_regexes(rule.regexes, forms, rule.boundary, place, problems),
            )
        )
    check_budget(resolved, problems)
    problems.raise_if_any()
    return Policy(
        name=header.name,
        client_selectable=header.client_selectable,
        on_error=header.defaults.on_error,
        rules=tuple(resolved),
        source=problems.source,
    )


def _check_message(rule: RuleSchema, place: str, problems: Problems) -> None:
    if rule.action == "redirect" and not rule.message:
        problems.add(
            f"{place}message is missing; action redirect says it in place of the match. "
            f"Add message, or use halt to end without one."
        )
    elif rule.action != "redirect" and rule.message:
        problems.add(
            f"{place}message is {show(rule.message)} but action is {rule.action}; only redirect "
            f"has a message, and no client would ever see this one. Delete it or use redirect."
        )


def _patterns(
    rule: RuleSchema, fold: bool, place: str, base_dir: Path, room: int, problems: Problems
) -> tuple[str, ...]:
    """Merge and check the literals of a rule, of which `room` more fit into the policy."""
    where_of: dict[str, int] = {}
    patterns: list[str] = []
    num_seen = 0
    for where, literal in _literals(rule, place, base_dir, problems):
        num_seen += 1
        if num_seen > room:
            problems.stop(
                f"{place}with {_at(where, rule)} the policy has more than {MAX_PATTERNS:,} "
                f"patterns, the most allowed, since tables grow with them. Shorten the lists."
            )
        if not isinstance(literal, str):
            problems.add(place + wrong_type(_at(where, rule), literal, "a string"))
            continue
        fault = _pattern_fault(literal, in_file=where < 0)
        if fault:
            problems.add(f"{place}{_at(where, rule)} {fault}")
            continue
        first = where_of.setdefault(literal.casefold() if fold else literal, where)
        if first != where:
            after = " after normalize [case]" if fold else ""
            problems.add(
                f"{place}{_at(where, rule)} {show(literal)} repeats {_at(first, rule)}{after}; "
                f"a pattern may occur once in a rule, or it would count twice. Delete one."
            )
            continue
        patterns.append(literal)
    if not num_seen and not rule.regexes:
        problems.add(
            f"{place}no pattern to match; a rule needs literals, a literals_file or regexes with "
            f"at least one entry. Without, it would never act. Add one or delete the rule."
        )
    return tuple(patterns)


def _literals(
    rule: RuleSchema, place: str, base_dir: Path, problems: Problems
) -> Iterator[tuple[int, object]]:
    """Yield each literal with its place: its index, or minus its line in the literals file.

    A line of the file is a literal as it stands, leading and trailing spaces included; lines of
    white space only are skipped, LF and CRLF both end a line.
    """
    yield from enumerate(rule.literals)
    if rule.literals_file:
        try:
            text = read_text(base_dir / rule.literals_file)
        except UnreadableError as error:
            problems.add(f"{place}literals_file {show(rule.literals_file)}: {error}")
            # Something was named: the rule must not be reported as having no pattern as well.
            yield -1, rule.literals_file
            return
        # Not splitlines(): it also splits at U+2028 and form feeds, which a literal may hold.
        for number, line in enumerate(text.split("\n"), start=1):
            if line and not line.isspace():
                yield -number, line.removesuffix("\r")


def _at(where: int, rule: RuleSchema) -> str:
    return f"pattern {where}" if where >= 0 else f"{rule.literals_file} line {-where}"


def _pattern_fault(pattern: str, in_file: bool) -> str | None:
    size_bytes = len(pattern) if pattern.isascii() else len(pattern.encode(errors="replace"))
    if not size_bytes:
        return (
            f"is empty; patterns need 1..{MAX_PATTERN_BYTES} bytes. An empty pattern would accept "
            f"at every byte and block all output. Delete it or give a literal."
        )
    if size_bytes > MAX_PATTERN_BYTES:
        return (
            f"{show(pattern)} is {size_bytes} bytes long; patterns need 1..{MAX_PATTERN_BYTES} "
            f"bytes, since tables grow with every byte. Keep a distinctive part of it."
        )
    fault = text_fault(pattern)
    if fault:
        return f"{show(pattern)} {fault}. Write the characters that are meant."
    if in_file and "\0" in pattern:
        return (
            f"{show(pattern)} holds a NUL character, a sign of UTF-16 text, which would never "
            f"match. Convert the file: iconv -f UTF-16LE -t UTF-8."
        )
    return None
