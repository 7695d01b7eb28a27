"""Rules that read a probe: what a policy says of them, and what it may not say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guard_cases import vocabulary
from probes import make_probe, save_probe
from typer.testing import CliRunner, Result

from streamguard.cli import app
from streamguard.compiler.artifact import Artifact
from streamguard.compiler.cache import cached_program
from streamguard.compiler.program import compile_program
from streamguard.errors import PolicyError
from streamguard.guard import Guard
from streamguard.policy import Policy, PolicySet
from streamguard.policy_advice import advice
from streamguard.probe.aggregation import Aggregation
from streamguard.row_guard import RowGuard
from streamguard.scanner import Scanner
from streamguard.verdict import VerdictCodes

TWO = {"vcr": Aggregation("ema", weight=0.25), "sxc": Aggregation("cusum", drift=0.5, warmup=3)}


def rule(**changes: Any) -> dict[str, Any]:
    """A valid probe rule with keys changed; None deletes one."""
    base = {"id": "harm", "probe": "p.safetensors", "threshold": 1.5, "action": "halt", **changes}
    return {key: value for key, value in base.items() if value is not None}


def load(folder: Path, *rules: dict[str, Any], **header: Any) -> Policy:
    return Policy.from_dict(
        {"version": 1, **header, "rules": list(rules)}, source="p.yaml", base_dir=folder
    )


def refusal(folder: Path, *rules: dict[str, Any]) -> str:
    with pytest.raises(PolicyError) as caught:
        load(folder, *rules)
    message = str(caught.value)
    assert all(line.startswith("p.yaml: rules[") for line in message.splitlines()), message
    return message


def test_a_probe_rule_is_resolved_with_its_column_and_statistic(tmp_path: Path) -> None:
    probe = save_probe(tmp_path, heads=TWO)
    policy = load(
        tmp_path,
        rule(head="sxc", hysteresis=2, action="observe"),
        defaults={"normalize": ["case"]},
    )
    (found,) = policy.rules
    assert (found.literals, found.regexes, found.normalize) == ((), (), ())
    assert found.probe is not None
    assert found.probe.probe is not None
    assert found.probe.sha256 == found.probe.probe.sha256 == probe.sha256
    assert (found.probe.path, found.probe.head, found.probe.column) == ("p.safetensors", "sxc", 1)
    assert (found.probe.threshold, found.probe.fpr, found.probe.hysteresis) == (1.5, None, 2.0)
    assert (found.probe.aggregation, found.probe.stage) == (TWO["sxc"], "output")
    assert (policy.num_patterns, policy.num_probe_rules) == (0, 1)


def test_a_threshold_may_be_asked_for_by_its_share_of_benign_texts(tmp_path: Path) -> None:
    probe = save_probe(tmp_path, num_benign=500)
    for asked, confidence in (({"fpr": 0.02}, 0.9), ({"fpr": 0.02, "confidence": 0.99}, 0.99)):
        found = load(tmp_path, rule(threshold=asked)).rules[0].probe
        assert found is not None
        assert (found.fpr, found.confidence) == (0.02, confidence)
        assert found.threshold == probe.threshold("harm", 0.02, confidence)
        assert np.float32(found.threshold) == found.threshold
        assert (probe.benign["harm"] >= np.float32(found.threshold)).mean() <= 0.02


@pytest.mark.parametrize(("head", "threshold"), [("vcr", 0), ("sxc", -2.5)])
def test_a_threshold_that_every_text_reaches_at_once_is_refused(
    tmp_path: Path, head: str, threshold: float
) -> None:
    save_probe(tmp_path, heads=TWO)
    said = refusal(tmp_path, rule(head=head, threshold=threshold))
    for part in (f"threshold is {threshold}", "is never below 0", "{fpr: 0.01}", "above 0"):
        assert part in said


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "patterns beside it": (
        rule(literals=["x"], regexes=["y"]),
        ["has a probe and literals and regexes", "Make two rules"],
    ),
    "literals file beside it": (rule(literals_file="w.txt"), ["a probe and literals_file", "two"]),
    "normalize": (rule(normalize=["case"]), ["normalize is about how text is read", "Delete it"]),
    "boundary": (rule(boundary="word"), ["boundary is about how text is read", "Delete it"]),
    "validate": (rule(validate="luhn"), ["validate is about how text is read", "Delete it"]),
    "mask": (rule(action="mask"), ["action is mask", "allows halt, redirect, observe", "Use halt"]),
    "redact": (rule(action="redact"), ['action "redact" is not supported by this version']),
    "redirect without message": (rule(action="redirect"), ["message is missing", "redirect"]),
    "no threshold": (rule(threshold=None), ["threshold is missing", "{fpr: 0.01}", "number"]),
    "threshold a string": (
        rule(threshold="1"),
        ['threshold is "1" (a string)', "a number, or a mapping with the key fpr"],
    ),
    "threshold a boolean": (rule(threshold=True), ["threshold is true (a boolean)", "a number"]),
    "threshold not finite": (rule(threshold=float("nan")), ["threshold is nan", "finite number"]),
    "threshold beyond scores": (rule(threshold=1e39), ["threshold is 1e+39", "finite number"]),
    "threshold of nothing": (rule(threshold={}), ["threshold: fpr is missing", "{fpr: 0.01}"]),
    "threshold of something else": (
        rule(threshold={"fdr": 0.1}),
        ['threshold: unknown key "fdr"', "allowed: fpr, confidence", 'Did you mean "fpr"?'],
    ),
    "fpr a string": (
        rule(threshold={"fpr": "1%"}),
        ['threshold: fpr is "1%" (a string)', "a number, without quotes"],
    ),
    "fpr out of range": (rule(threshold={"fpr": 5}), ["fpr 5 at confidence 0.9", "0 and 1"]),
    "fpr that the calibration cannot show": (
        rule(threshold={"fpr": 0.001}),
        ["500 benign texts cannot show an FPR of 0.001", "at least 2302", "calibrate --benign"],
    ),
    "negative hysteresis": (rule(hysteresis=-1), ["hysteresis is -1", "0 or more"]),
    "endless hysteresis": (rule(hysteresis=float("inf")), ["hysteresis is inf", "0 or more"]),
    "no such head": (
        rule(probe="two.safetensors", head="vcx"),
        ['head is "vcx"', "allowed: vcr, sxc", 'Did you mean "vcr"?'],
    ),
    "head left open": (
        rule(probe="two.safetensors"),
        ["head is missing", "two.safetensors has 2: vcr, sxc", "Add head"],
    ),
    "stage of another probe": (
        rule(stage="prompt"),
        ["stage is prompt but the probe reads output tokens", "Write stage: output"],
    ),
    "both stages": (rule(stage="both"), ["stage is both but the probe reads output tokens"]),
    "stage left out": (
        rule(probe="prompt.safetensors"),
        ["stage is output but the probe reads prompt tokens", "Write stage: prompt"],
    ),
    "no such file": (rule(probe="q.safetensors"), ['probe "q.safetensors"', "no such file"]),
    "file of something else": (rule(probe="junk.safetensors"), ["not a whole safetensors file"]),
    "empty path": (rule(probe=""), ["probe is empty", "Give it"]),
    "path not a string": (rule(probe=3), ["probe is 3 (an integer)", "a string"]),
    "benign texts too short": (
        rule(probe="short.safetensors", threshold={"fpr": 0.1}),
        ["its calibration gives", "shorter than the warm-up", "longer texts"],
    ),
    "threshold without a probe": (
        rule(probe=None, literals=["x"]),
        ["threshold belongs to a probe", "Add probe", "delete threshold"],
    ),
    "head without a probe": (
        rule(probe=None, threshold=None, literals=["x"], head="a"),
        ["head belongs to a probe"],
    ),
    "hysteresis without a probe": (
        rule(probe=None, threshold=None, literals=["x"], hysteresis=1),
        ["hysteresis belongs to a probe"],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With probes of one head and of two, of prompts, too short benign texts, and no probe."""
    path = tmp_path_factory.mktemp("probes")
    save_probe(path)
    save_probe(path, "two.safetensors", heads=TWO)
    save_probe(path, "prompt.safetensors", stage="prompt")
    save_probe(path, "short.safetensors", benign=np.full(100, -np.inf))
    (path / "junk.safetensors").write_bytes(b"junk")
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_a_probe_rule_is_refused_with_what_is_allowed(case: str, folder: Path) -> None:
    entry, fragments = REFUSED[case]
    message = refusal(folder, entry)
    assert message.startswith('p.yaml: rules[0] "harm": ')
    for fragment in fragments:
        assert fragment in message
    assert len(message) < 1000


def test_every_problem_of_probe_rules_is_listed_and_a_broken_file_once(folder: Path) -> None:
    message = refusal(
        folder,
        rule(id="a", literals=["x"], action="mask"),
        rule(id="b", probe="junk.safetensors"),
        rule(id="c", probe="junk.safetensors"),
        rule(id="d", threshold={"fpr": 0.0001}, boundary="none"),
    )
    lines = message.splitlines()
    assert [line.split('"')[1] for line in lines] == ["a", "a", "b", "d", "d"]


def test_patterns_are_not_looked_for_in_prompts_yet(folder: Path) -> None:
    entry = rule(probe=None, threshold=None, literals=["x"], stage="prompt")
    assert 'stage "prompt" is not supported by this version; allowed: output' in refusal(
        folder, entry
    )
    assert load(folder, rule(probe="prompt.safetensors", stage="prompt")).rules[0].stage == "prompt"


def test_sha256_follows_what_a_probe_rule_does_and_not_where_its_file_lies(tmp_path: Path) -> None:
    save_probe(tmp_path, heads=TWO)
    save_probe(tmp_path, "same.safetensors", heads=TWO)
    save_probe(tmp_path, "other.safetensors", heads=TWO, seed=1)
    first = load(tmp_path, rule(head="vcr"))
    assert load(tmp_path, rule(head="vcr", probe="same.safetensors")).sha256 == first.sha256
    changes: list[dict[str, Any]] = [
        {"head": "sxc"}, {"threshold": 1.25}, {"hysteresis": 0.5}, {"probe": "other.safetensors"},
        {"action": "observe"}, {"threshold": {"fpr": 0.1}},
    ]  # fmt: skip
    digests = {load(tmp_path, rule(**{"head": "vcr", **change})).sha256 for change in changes}
    assert len(digests | {first.sha256}) == len(changes) + 1


PIECES = [b"bo", b"mb", b" ", b"no", "é".encode()[:1], "é".encode()[1:]]
SPECIALS = (b"<s>", b"</s>", *(f"<reserved {i}>".encode() for i in range(8)))
SPARE = tuple(range(len(PIECES) + 2, len(PIECES) + len(SPECIALS)))


def words() -> Any:
    made = vocabulary(PIECES, SPECIALS)
    return type(made)(made.token_bytes, made.special, made.eos_token_ids, SPARE)


@pytest.fixture
def only_probes(folder: Path) -> PolicySet:
    """A policy without any pattern, beside one with patterns."""
    return PolicySet.from_policies(
        [
            load(folder, rule(), rule(id="no", action="redirect", message="no")),
            load(
                folder,
                {"id": "bomb", "literals": ["bomb"], "action": "mask"},
                rule(id="see", action="observe"),
                name="mixed",
            ),
        ]
    )


@pytest.mark.parametrize("alone", [True, False])
def test_a_policy_of_probe_rules_only_works_everywhere(
    alone: bool, only_probes: PolicySet, layout: str
) -> None:
    first = only_probes.policies["default"]
    policies = PolicySet.from_policies([first]) if alone else only_probes
    assert advice(first) == []
    guard = Guard(policies, words())
    stream = guard.text_stream("default")
    assert stream.feed("a bomb é") + stream.finish() == "a bomb é"
    assert (stream.verdict, stream.counts) == (None, {})
    session = guard.session(2)
    session.reset(0, (0, 1), policy="default")
    assert session.advance([0, 0, 0, 0], [0, 1, 4, 5]).tolist() == [0, 0, 0, 0]
    assert session.forbidden(0).tolist() == session.forbidden(0, last=True).tolist() == []
    assert not session.needs_mask([0])[0]
    scanner = Scanner(guard.program, 0)
    assert [*scanner.feed(b"a bomb"), *scanner.finish()] == []
    codes = VerdictCodes.from_table(guard.program.table, lambda _: [3], lambda _: "no")
    assert codes.scripts[0] == (SPARE[2],)
    rows = RowGuard(guard.program, codes, 2)
    rows.warm_up()
    rows.admit(0, (0, 1), policy="default", max_tokens=5, end_token_ids=(7,))
    rows.commit([0], [1])
    sampled = np.array([1])
    assert rows.decide([0], sampled) == []
    assert sampled.tolist() == [1]


def test_probe_rules_come_back_from_an_artefact_without_their_weights(
    only_probes: PolicySet, tmp_path: Path
) -> None:
    program = compile_program(only_probes, words())
    path = tmp_path / "policy.sga"
    Artifact(only_probes, program).save(path)
    assert b"safetensors" in path.read_bytes()
    loaded = Artifact.load(path, policy_sha256=only_probes.sha256)
    assert loaded.policies.sha256 == only_probes.sha256
    assert loaded.program.rules == program.rules
    assert [r.rule.probe.probe for r in loaded.program.rules if r.rule.probe] == [None] * 3
    kept = Artifact.load(path, policies=only_probes).program.rules
    assert [r.rule.probe.probe for r in kept if r.rule.probe] == [
        r.rule.probe.probe for r in program.rules if r.rule.probe
    ]
    assert kept == program.rules
    swapped = PolicySet(dict(reversed(only_probes.policies.items())), only_probes.default)
    assert Artifact.load(path, policies=swapped).program.policies == program.policies


def test_the_compile_cache_keeps_the_probes_of_the_policy(
    only_probes: PolicySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMGUARD_CACHE", str(tmp_path / "cache"))
    for _ in range(2):  # compiled, then mapped
        program = cached_program(only_probes, words())
        assert [r.rule.probe.probe is None for r in program.rules if r.rule.probe] == [False] * 3
    assert (program.mask_ranges.whole, program.compile_seconds)[1] == 0


def test_a_probe_is_equal_by_its_content() -> None:
    assert make_probe(seed=3).sha256 == make_probe(seed=3).sha256 != make_probe(seed=4).sha256


def run(*arguments: object, stdin: bytes = b"") -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == 0, result.output
    return result


def test_check_and_scan_say_which_rules_act_inside_the_engine_only(folder: Path) -> None:
    path = folder / "policy.yaml"
    first = "version: 1\nrules:\n  - {id: harm, probe: p.safetensors, threshold: 1, action: halt}\n"
    path.write_text(first)
    note = "1 probe rule acts inside the engine only"
    checked = run("check", path, "--explain").stdout
    assert "1 policy, 1 rule, 0 patterns" in checked
    assert note in checked
    assert "no rule has patterns to explain" in checked
    assert json.loads(run("check", path, "--json").stdout)["policies"][0]["probe_rules"] == 1
    scanned = run("scan", path, stdin=b"a bomb")
    assert scanned.stdout == ""
    assert scanned.stderr == f"note: {note}; a scan reads text alone\n"
    path.write_text(
        first
        + "  - {id: see, probe: p.safetensors, threshold: 1, action: observe}\n"
        + "  - {id: bomb, literals: [bomb], action: halt}\n"
    )
    scanned = run("scan", path, stdin=b"a bomb")
    assert json.loads(scanned.stdout)["rule"] == "bomb"
    assert "2 probe rules act inside" in scanned.stderr
    explained = json.loads(run("check", path, "--explain", "--json").stdout)["explained"]
    assert [one["rule"] for one in explained] == ["bomb"]


def test_a_policy_of_probe_rules_only_is_compiled_to_a_file(
    folder: Path, tmp_path: Path, tiny_models: Callable[..., Path]
) -> None:
    path, output = tmp_path / "policy.yaml", tmp_path / "policy.sga"
    save_probe(tmp_path)
    path.write_text(
        "version: 1\nrules: [{id: harm, probe: p.safetensors, threshold: 1, action: halt}]\n"
    )
    run("compile", path, "--tokenizer", tiny_models(), "-o", output)
    assert Artifact.load(output).policies.sha256 == PolicySet.load(path).sha256
    assert "1 states" in run("check", path, "--tokenizer", tiny_models()).stdout
