"""Rule packs: what they find, and how a policy takes them in."""

from __future__ import annotations

import json
import re
from functools import cache
from ipaddress import ip_address, ip_network
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from guard_cases import EVERY_BYTE, program, vocabulary
from pack_cases import CASES, PROSE
from typer.testing import CliRunner, Result

from streamguard.cli import app
from streamguard.compiler.regexes import MAX_POLICY_STATES, tracks_of
from streamguard.errors import PolicyError
from streamguard.policy import Policy
from streamguard.policy_advice import advice
from streamguard.policy_regexes import regexes_of
from streamguard.rule_packs import load_pack, pack_names
from streamguard.scanner import Scanner
from streamguard.session import Session

RULES = [(pack, rule) for pack, rules in CASES.items() for rule in rules]
OWN = {"id": "own", "action": "mask", "literals": ["Acme"]}


def extending(*packs: str, rules: list[dict[str, Any]] | None = None, **more: Any) -> Policy:
    given = {} if rules is None else {"rules": rules}
    return Policy.from_dict({"version": 1, "extends": list(packs), **given, **more})


@cache
def compiled(pack: str) -> Any:
    return program(extending(pack), vocabulary(EVERY_BYTE))


@cache
def session(pack: str) -> Session:
    return Session(compiled(pack), 1)


def found(pack: str, text: str) -> set[str]:
    scanner = Scanner(compiled(pack))
    matches = [*scanner.feed(text.encode()), *scanner.finish()]
    return {compiled(pack).rules[match.rule].rule.id for match in matches}


def counted(pack: str, text: str) -> set[str]:
    """The same for a response of tokens of one byte, with the token that ends it."""
    one = session(pack)
    end = len(EVERY_BYTE) + 1  # see `vocabulary`
    one.reset(0, end_token_ids=(end,))
    hits: set[str] = set()
    for token in (*text.encode(), end):
        one.advance([0], [token])
        hits |= {one.program.rules[rule].rule.id for _, rule in one.events()}
    return hits


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
    assert len(matching) > 2 or pack == "prompt-leak"
    assert len(passing) > 2 or pack == "prompt-leak"
    for text in matching:
        for whole in (text, f"As asked: {text} (that is all)."):
            assert rule in found(pack, whole), whole
            assert rule in counted(pack, whole), whole
    for text in passing:
        for whole in (text, f"As asked: {text} (that is all)."):
            assert not found(pack, whole), whole
            assert not counted(pack, whole), whole


@pytest.mark.parametrize("pack", CASES)
def test_every_regex_of_a_pack_finds_one_of_its_examples(pack: str) -> None:
    for rule in extending(pack).rules:
        for pattern in rule.regexes:
            assert any(re.search(pattern, text) for text in CASES[pack][rule.id][0]), pattern


@pytest.mark.parametrize("pack", CASES)
def test_a_pack_passes_ordinary_text(pack: str) -> None:
    for paragraph in PROSE.split("\n\n"):
        assert not found(pack, paragraph), paragraph
        assert not counted(pack, paragraph), paragraph


def test_addresses_of_private_networks_are_nobodys() -> None:
    """With all first two numbers; where the first has one digit, the others must have more."""
    reserved = [
        ip_network(network)
        for network in (
            "0.0.0.0/8", "10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
            "192.168.0.0/16", "224.0.0.0/3",
        )
    ]  # fmt: skip
    patterns = [re.compile(p) for r in extending("pii").rules if r.id == "ip-address"
                for p in r.regexes]  # fmt: skip
    for first, second in product(range(256), range(256)):
        address = f"{first}.{second}.33.44"
        expected = first > 9 or second > 9
        if first in (0, 10, 127, 169, 172, 192) or first > 223:
            expected = not any(ip_address(address) in network for network in reserved)
        assert any(p.search(address) for p in patterns) == expected, address
    assert not any(p.search("198.51.256.1") or p.search("300.51.25.1") for p in patterns)


def test_all_packs_together_stay_within_their_budgets() -> None:
    policy = extending(*pack_names())
    tracks = tracks_of([regex for rule in policy.rules for regex in regexes_of(rule)])
    num_states = sum(len(track.dfa.goto) for track in tracks)
    compiled_all = program(policy, vocabulary(EVERY_BYTE))
    size_bytes = compiled_all.size_bytes
    print(f"{policy.num_patterns} patterns, {len(tracks)} regex tracks, {num_states:,} states, "
          f"{size_bytes:,} bytes")  # fmt: skip
    assert num_states < MAX_POLICY_STATES / 2
    assert len(tracks) < 32
    assert size_bytes < 16 << 20


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
    assert policy.packs == ("prompt-leak 1.0", "secrets 2.0")


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
    with pytest.raises(PolicyError, match=r"with secrets 2\.0 the policy has 1038 rules; allowed"):
        extending("secrets", rules=rules)


# ------------------------------------------------------------------------------ command line


def test_packs_are_listed_with_their_versions() -> None:
    lines = run("packs", "list").stdout.splitlines()
    assert lines[0].split()[:4] == ["pack", "version", "rules", "patterns"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["pii", "2.0", "14"], ["prompt-leak", "1.0", "3"], ["secrets", "2.0", "15"],
    ]  # fmt: skip


def test_a_pack_is_shown_as_it_is_written() -> None:
    assert run("packs", "show", "secrets").stdout == load_pack("secrets").text
    result = run("packs", "show", "secret")
    assert (result.exit_code, result.stdout) == (2, "")
    assert (
        'PolicyError: no pack is named "secret"; packs: pii, prompt-leak, secrets.' in result.stderr
    )


def test_check_shows_the_versions_of_packs(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\nextends: [secrets]\n")
    result = run("check", path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "default extends secrets 2.0\n" in result.stdout
    assert json.loads(run("check", path, "--json").stdout)["policies"][0]["packs"] == [
        "secrets 2.0"
    ]


@pytest.mark.parametrize("arguments", [("packs",), ("packs", "list"), ("packs", "show")])
def test_commands_explain_themselves(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "--help")
    assert result.exit_code == 0
    assert "streamguard packs" in result.stdout.split("Example:")[1]
