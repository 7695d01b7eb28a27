"""Checking the probe rules of a policy: what is wrong with each, in the words of the policy file.

Probes are loaded, which takes numpy, for policies that name one only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from streamguard.errors import ProbeError
from streamguard.policy_errors import Problems, did_you_mean, show, wrong_type
from streamguard.policy_schema import RuleSchema, ThresholdSchema, validate

if TYPE_CHECKING:
    from streamguard.probe.artifact import Probe
    from streamguard.probe.rule import ProbeRule

ACTIONS = ("halt", "redirect", "observe")
#: A statistic is a float32; what lies beyond is never reached, or always.
_LARGEST = 3.4e38


class Probes:
    """The probe files that one policy names, each read once and complained of once.

    base_dir  where relative paths start.
    """

    def __init__(self, base_dir: Path) -> None:
        self._base_dir = base_dir
        self._loaded: dict[str, Probe | None] = {}

    def load(self, path: str, place: str, problems: Problems) -> Probe | None:
        """The probe, or None if it is no good: that was noted with the first rule that names it."""
        if path not in self._loaded:
            from streamguard.probe.artifact import Probe

            self._loaded[path] = None
            try:
                self._loaded[path] = Probe.load(self._base_dir / path)
            except ProbeError as error:
                problems.add(f"{place}probe {show(path)}: {error}")
        return self._loaded[path]


def check_probe(
    rule: RuleSchema, place: str, probes: Probes, problems: Problems
) -> ProbeRule | None:
    """Resolve the keys of a rule that belong to its probe; None if it has none, or after a problem."""
    given = rule.model_fields_set
    if "probe" not in given:
        for key in ("threshold", "head", "hysteresis"):
            if key in given:
                problems.add(
                    f"{place}{key} belongs to a probe, and the rule names none. Add probe: "
                    f"FILE.safetensors, or delete {key}."
                )
        return None
    before = problems.total
    _check_others(rule, place, problems)
    if not rule.probe:
        problems.add(f"{place}probe is empty; it must be the path of a .safetensors file. Give it.")
        return None
    probe = probes.load(rule.probe, place, problems)
    if probe is None:
        return None
    if rule.stage != probe.card.stage:
        problems.add(
            f"{place}stage is {rule.stage} but the probe reads {probe.card.stage} tokens (its "
            f"card's stage); scores of others mean nothing. Write stage: {probe.card.stage}, or "
            f"name a probe for {rule.stage}."
        )
    head = _head(rule, probe, place, problems)
    threshold = _threshold(rule, probe, head, place, problems)
    if head is None or threshold is None or problems.total > before:
        return None
    from streamguard.probe.rule import ProbeRule

    value, fpr, confidence = threshold
    return ProbeRule(
        path=rule.probe,
        sha256=probe.sha256,
        head=head,
        column=probe.column(head),
        threshold=value,
        fpr=fpr,
        confidence=confidence,
        hysteresis=float(rule.hysteresis),
        aggregation=probe.aggregation(head),
        stage=rule.stage,
        probe=probe,
    )


def _check_others(rule: RuleSchema, place: str, problems: Problems) -> None:
    """Keys that a probe rule cannot have, and actions that a score cannot take."""
    given = rule.model_fields_set
    patterns = [key for key in ("literals", "literals_file", "regexes") if key in given]
    if patterns:
        problems.add(
            f"{place}the rule has a probe and {' and '.join(patterns)}; a rule has one or the "
            f"other, since their verdicts are told apart by its id. Make two rules of it."
        )
    for name, key in (
        ("validator", "validate"),
        ("normalize", "normalize"),
        ("boundary", "boundary"),
    ):
        if name in given:
            problems.add(
                f"{place}{key} is about how text is read; a probe reads hidden states. Delete it, "
                f"or move it to a rule with patterns."
            )
    if rule.action not in ACTIONS:
        problems.add(
            f"{place}action is {rule.action}; a probe rule allows {', '.join(ACTIONS)}. A score is "
            f"known once a token was read, and says nothing of which tokens to choose or cut out. "
            f"Use halt or redirect."
        )


def _head(rule: RuleSchema, probe: Probe, place: str, problems: Problems) -> str | None:
    heads = probe.heads
    if rule.head in heads:
        return rule.head
    if rule.head:
        hint = did_you_mean(rule.head, heads) or " Choose one of these."
        problems.add(
            f"{place}head is {show(rule.head)}; allowed: {', '.join(heads)}, the heads of "
            f"{rule.probe}.{hint}"
        )
        return None
    if len(heads) > 1:
        problems.add(
            f"{place}head is missing; {rule.probe} has {len(heads)}: {', '.join(heads)}. A rule "
            f"reads one. Add head, and a rule for each other that is to act."
        )
        return None
    return heads[0]


def _threshold(
    rule: RuleSchema, probe: Probe, head: str | None, place: str, problems: Problems
) -> tuple[float, float | None, float] | None:
    """(threshold, fpr or None, confidence), or None after a problem."""
    from streamguard.probe.threshold import DEFAULT_CONFIDENCE

    given = rule.threshold
    if given is None:
        problems.add(
            f"{place}threshold is missing; without one a score decides nothing. Give threshold: "
            f"{{fpr: 0.01}}, the share of benign texts that may be halted, or a number."
        )
        return None
    if not isinstance(given, Mapping):
        if isinstance(given, bool) or not isinstance(given, int | float):
            expected = "a number, or a mapping with the key fpr"
            problems.add(place + wrong_type("threshold", given, expected))
            return None
        if not abs(given) <= _LARGEST:
            problems.add(
                f"{place}threshold is {show(given)}; allowed: a finite number, since no score "
                f"reaches another, or every one does. Give threshold: {{fpr: 0.01}} or a number."
            )
            return None
        statistic = probe.aggregation(head) if head is not None else None
        if statistic is not None and statistic.never_negative and given <= 0:
            problems.add(
                f"{place}threshold is {show(given)}, but the statistic of {rule.probe} ({statistic}) "
                f"is never below 0, so every text would reach it at once. Give threshold: "
                f"{{fpr: 0.01}} or a number above 0."
            )
            return None
        return float(given), None, DEFAULT_CONFIDENCE
    asked = validate(ThresholdSchema, given, f"{place}threshold: ", problems)
    if asked is None or head is None:
        return None
    if asked.fpr is None:
        problems.add(
            f"{place}threshold: fpr is missing; it is the share of benign texts that may be "
            f"halted. Write threshold: {{fpr: 0.01}}."
        )
        return None
    confidence = DEFAULT_CONFIDENCE if asked.confidence is None else asked.confidence
    try:
        value = probe.threshold(head, asked.fpr, confidence)
    except ProbeError as error:
        problems.add(f"{place}threshold: {rule.probe}: {error}")
        return None
    if not abs(value) <= _LARGEST or math.isnan(value):
        problems.add(
            f"{place}threshold: {rule.probe}: its calibration gives {value:g} for an fpr of "
            f"{asked.fpr:g}: too many of its benign texts are shorter than the warm-up, or have "
            f"infinite scores. Calibrate it on longer texts (streamguard probe calibrate --benign "
            f"FILE), or give threshold as a number."
        )
        return None
    return value, asked.fpr, confidence
