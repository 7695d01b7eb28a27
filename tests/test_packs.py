"""Rule packs: what they find, and how a policy takes them in."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from guard_cases import program
from pack_cases import CASES
from typer.testing import CliRunner, Result

from streamguard.cli import app
from streamguard.errors import PolicyError
from streamguard.policy import Policy
from streamguard.policy_advice import advice
from streamguard.rule_packs import load_pack, pack_names
from streamguard.scanner import Scanner

RULES = [(pack, rule) for pack, rules in CASES.items() for rule in rules]
OWN = {"id": "own", "action": "mask", "literals": ["Acme"]}


def extending(*packs: str, rules: list[dict[str, Any]] | None = None, **more: Any) -> Policy:
    given = {} if rules is None else {"rules": rules}
    return Policy.from_dict({"version": 1, "extends": list(packs), **given, **more})


@cache
def compiled(pack: str) -> Any:
    return program(extending(pack))


def found(pack: str, text: str) -> set[str]:
    scanner = Scanner(compiled(pack))
    matches = [*scanner.feed(text.encode()), *scanner.finish()]
    return {compiled(pack).rules[match.rule].rule.id for match in matches}


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_every_rule_of_every_pack_has_cases() -> None:
    assert set(CASES) == set(pack_names())
    for pack in pack_names():
        assert list(CASES[pack]) == [rule.id for rule in extending(pack).rules]


@pytest.mark.parametrize(("pack", "rule"), RULES)
def test_a_pack_rule_finds_its_examples_and_passes_near_misses(pack: str, rule: str) -> None:
    matching, passing = CASES[pack][rule]
    assert len(matching) > 1
    assert len(passing) > 1
    for text in matching:
        assert rule in found(pack, text), text
    for text in passing:
        assert not found(pack, text), text


@pytest.mark.parametrize("pack", CASES)
def test_a_pack_is_in_order(pack: str) -> None:
    policy = extending(pack)
    assert advice(policy) == []
    assert load_pack(pack).policy["name"] == pack
    for rule in policy.rules:
        for literal in rule.literals:
            assert rule.id in found(pack, literal)


def test_no_two_packs_have_a_rule_id_in_common() -> None:
    ids = [rule.id for rule in extending(*pack_names()).rules]
    assert len(ids) == len(set(ids))


def test_rules_of_packs_come_after_the_policys_own_with_the_packs_defaults() -> None:
    policy = extending("prompt-leak", "secrets", rules=[OWN], defaults={"normalize": []})
    assert [rule.id for rule in policy.rules] == ["own", *CASES["prompt-leak"], *CASES["secrets"]]
    forms = {rule.id: rule.normalize for rule in policy.rules}
    assert forms["own"] == ()
    assert forms["prompt-announced"] == ("case",)
    folding = extending("secrets", rules=[OWN], defaults={"normalize": ["case"]})
    assert {rule.id: rule.normalize for rule in folding.rules}["private-key"] == ()
    assert policy.packs == ("prompt-leak 1.0", "secrets 1.0")


def test_an_own_rule_takes_the_place_of_the_packs_and_may_read_a_file(tmp_path: Path) -> None:
    (tmp_path / "canaries.txt").write_text("blue-otter\nred-heron\n")
    (tmp_path / "policy.yaml").write_text(
        "version: 1\nextends: [prompt-leak]\nrules:\n"
        "  - {id: prompt-canary, action: redirect, message: No., literals_file: canaries.txt}\n"
    )
    policy = Policy.load(tmp_path / "policy.yaml")
    assert [rule.id for rule in policy.rules] == list(CASES["prompt-leak"])
    assert policy.rules[0].literals == ("blue-otter", "red-heron")
    assert policy.rules[0].action == "redirect"


def test_a_policy_may_be_nothing_but_packs() -> None:
    assert extending("secrets").rules == extending("secrets", rules=[]).rules
    with pytest.raises(PolicyError, match="rules is null"):
        extending()


def test_the_hash_is_that_of_the_rules_wherever_they_are_written() -> None:
    copied = Policy.from_dict({**load_pack("secrets").policy, "name": "default"})
    assert copied.sha256 == extending("secrets").sha256
    assert copied.sha256 != extending("prompt-leak").sha256


def test_more_rules_than_allowed_together_are_refused() -> None:
    rules = [{"id": f"r{i}", "action": "halt", "literals": [f"x{i}"]} for i in range(1023)]
    with pytest.raises(PolicyError, match=r"with secrets 1\.0 the policy has 1026 rules; allowed"):
        extending("secrets", rules=rules)


# ------------------------------------------------------------------------------ command line


def test_packs_are_listed_with_their_versions() -> None:
    lines = run("packs", "list").stdout.splitlines()
    assert lines[0].split()[:4] == ["pack", "version", "rules", "patterns"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["prompt-leak", "1.0", "3"], ["secrets", "1.0", "3"],
    ]  # fmt: skip


def test_a_pack_is_shown_as_it_is_written() -> None:
    assert run("packs", "show", "secrets").stdout == load_pack("secrets").text
    result = run("packs", "show", "secret")
    assert (result.exit_code, result.stdout) == (2, "")
    assert 'PolicyError: no pack is named "secret"; packs: prompt-leak, secrets.' in result.stderr


def test_check_shows_the_versions_of_packs(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\nextends: [secrets]\n")
    result = run("check", path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "default extends secrets 1.0\n" in result.stdout
    assert json.loads(run("check", path, "--json").stdout)["policies"][0]["packs"] == [
        "secrets 1.0"
    ]


@pytest.mark.parametrize("arguments", [("packs",), ("packs", "list"), ("packs", "show")])
def test_commands_explain_themselves(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "--help")
    assert result.exit_code == 0
    assert "streamguard packs" in result.stdout.split("Example:")[1]
