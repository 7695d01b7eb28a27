"""The policy file: what it accepts and what it makes of it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from policy_files import LITERALS, in_rule, load_text, one_rule

from streamguard import policy as policy_module
from streamguard import policy_reader
from streamguard.errors import PolicyError, StreamguardError
from streamguard.policy import (
    ACTIONS,
    CATEGORIES,
    MAX_MESSAGE_BYTES,
    MAX_PATTERN_BYTES,
    MAX_RULES,
    SEVERITY,
    Policy,
    PolicySet,
)

EXAMPLES = Path(policy_module.__file__).parent / "examples"
#: Beside the policies lie concept files, which are for probes.
EXAMPLE_POLICIES = [EXAMPLES / f"{name}.yaml" for name in ("default", "demo", "strict")]


def test_literals_file_lines_are_literals_as_they_stand(tmp_path: Path) -> None:
    content = "\ufeff one \r\n\r\n  \ntwo\u2028half\n#three\nfour"
    (tmp_path / "words.txt").write_bytes(content.encode())
    policy = load_text(tmp_path, in_rule("literals: [zero]\n    literals_file: words.txt"))
    assert policy.rules[0].literals == ("zero", " one ", "two\u2028half", "#three", "four")
    assert policy.num_patterns == 5


def test_literals_file_is_relative_to_the_policy_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.txt").write_text("near\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_text(tmp_path, in_rule("literals_file: words.txt")).rules[0].literals == ("near",)
    data = one_rule(literals=None, literals_file="words.txt")
    assert Policy.from_dict(data, base_dir=tmp_path).rules[0].literals == ("near",)
    with pytest.raises(PolicyError, match="no such file"):
        Policy.from_dict(data)


def test_defaults_are_applied_and_a_rule_overrides_them(tmp_path: Path) -> None:
    text = """
version: 1
name: example
client_selectable: true
defaults: {on_error: pass, normalize: [case]}
rules:
  - {id: plain, action: observe, literals: ["0123", "yes", "Straße"]}
  - id: full
    category: brand
    stage: output
    literals: [X]
    normalize: []
    boundary: word
    action: redirect
    message: "Sorry."
"""
    policy = load_text(tmp_path, text)
    assert (policy.name, policy.client_selectable, policy.on_error) == ("example", True, "pass")
    assert policy.source == str(tmp_path / "policy.yaml")
    plain, full = policy.rules
    assert (plain.category, plain.stage, plain.boundary) == ("custom", "output", "none")
    assert (plain.literals, plain.normalize) == (("0123", "yes", "Straße"), ("case",))
    assert plain.message is None
    assert (full.normalize, full.boundary, full.message) == ((), "word", "Sorry.")


def test_policy_without_optional_keys_blocks_on_error_and_is_not_selectable() -> None:
    policy = Policy.from_dict(one_rule())
    assert (policy.name, policy.client_selectable, policy.on_error) == ("default", False, "block")
    assert policy.source == "<dict>"


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_of_this_version_loads(action: str) -> None:
    message = "Sorry." if action == "redirect" else None
    assert Policy.from_dict(one_rule(action=action, message=message)).rules[0].action == action


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_loads(category: str) -> None:
    assert Policy.from_dict(one_rule(category=category)).rules[0].category == category


def test_actions_keep_the_order_of_severity() -> None:
    assert SEVERITY == ("halt", "redirect", "mask", "redact", "observe")
    assert ACTIONS == ("halt", "redirect", "mask", "observe")


def test_patterns_that_differ_only_in_case_may_stand_together_without_normalize() -> None:
    assert Policy.from_dict(one_rule(literals=("a", "A"))).rules[0].literals == ("a", "A")


def test_limits_are_inclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [{"id": f"r{n}", "action": "mask", "literals": ["x"]} for n in range(MAX_RULES)]
    assert len(Policy.from_dict({"version": 1, "rules": rules}).rules) == MAX_RULES
    with pytest.raises(PolicyError, match=r"rules has 1025 entries; allowed: 1\.\.1024"):
        Policy.from_dict({"version": 1, "rules": [*rules, {}]})
    assert Policy.from_dict(one_rule(literals=["x" * MAX_PATTERN_BYTES]))
    assert Policy.from_dict(one_rule(action="redirect", message="m" * MAX_MESSAGE_BYTES))

    monkeypatch.setattr(policy_module, "MAX_PATTERNS", 3)
    two = {"id": "two", "action": "mask", "literals": ["x", "y"]}
    one = {"id": "one", "action": "mask", "literals": ["x"]}
    assert Policy.from_dict({"version": 1, "rules": [two, one]}).num_patterns == 3
    with pytest.raises(PolicyError, match='"three": with pattern 1 the policy has more than 3'):
        Policy.from_dict({"version": 1, "rules": [two, {**two, "id": "three"}]})


def test_files_larger_than_the_limit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = in_rule("literals_file: words.txt")
    words = tmp_path / "words.txt"
    monkeypatch.setattr(policy_reader, "MAX_FILE_BYTES", len(text))
    words.write_bytes(b"x" * len(text))
    assert load_text(tmp_path, text)
    with pytest.raises(PolicyError, match=r"policy\.yaml: the file is larger than"):
        load_text(tmp_path, text + "#")
    words.write_bytes(b"x" * (len(text) + 1))
    with pytest.raises(PolicyError, match=r'"words\.txt": the file is larger than'):
        load_text(tmp_path, text)


def test_sha256_does_not_depend_on_how_the_content_is_written(tmp_path: Path) -> None:
    flow = "{version: 1, rules: [{action: halt, id: a, literals: [x, 'ü']}]}"
    (tmp_path / "words.txt").write_bytes("\ufeffx\r\n\r\nü\r\n".encode())
    block = """
# a comment
version: 1
name: default
defaults: {normalize: [case]}
rules:
  - id: a
    category: custom
    literals_file: words.txt
    normalize: []
    action: halt
"""
    first = load_text(tmp_path, flow).sha256
    second = load_text(tmp_path, block).sha256
    assert first == second
    # A fixed value: other processes and releases must come to the same digest.
    assert first == "4b1984bcae66d23d65f0649868f8aca1c2aa025b75d794de07da91525feeaaa0"


@pytest.mark.parametrize(
    "change",
    [
        {"literals": ["y"]},
        {"literals": ["x", "y"]},
        {"id": "s"},
        {"action": "mask"},
        {"category": "pii"},
        {"normalize": ["case"]},
        {"boundary": "word"},
    ],
)
def test_sha256_depends_on_every_key_of_a_rule(change: dict[str, Any]) -> None:
    assert Policy.from_dict(one_rule(**change)).sha256 != Policy.from_dict(one_rule()).sha256


def test_sha256_depends_on_every_key_of_the_policy_but_not_on_its_path() -> None:
    base = Policy.from_dict(one_rule())
    for change in ({"name": "n"}, {"client_selectable": True}, {"defaults": {"on_error": "pass"}}):
        assert Policy.from_dict({**one_rule(), **change}).sha256 != base.sha256
    assert Policy.from_dict(one_rule(), source="elsewhere").sha256 == base.sha256


def test_policies_survive_pickling_to_a_worker() -> None:
    policies = PolicySet.from_policies([Policy.load(path) for path in EXAMPLE_POLICIES])
    copy = pickle.loads(pickle.dumps(policies))
    assert copy == policies
    assert copy.sha256 == policies.sha256


def write_policies(folder: Path, **names: str) -> None:
    for stem, name in names.items():
        text = in_rule(LITERALS) + (f"name: {name}\n" if name else "")
        (folder / f"{stem}.yaml").write_text(text)


def test_folder_gives_all_policies_and_the_one_named_default_is_the_default(tmp_path: Path) -> None:
    write_policies(tmp_path, b="default", a="strict")
    (tmp_path / "c.yml").write_text(in_rule(LITERALS) + "name: loose\n")
    (tmp_path / ".hidden.yaml").write_text("broken: [")
    (tmp_path / "notes.txt").write_text("no policy")
    (tmp_path / "sub.yaml").mkdir()
    policies = PolicySet.load(tmp_path)
    assert list(policies.policies) == ["strict", "default", "loose"]
    assert policies.default == "default"


def test_only_policy_of_a_folder_or_a_file_is_the_default_whatever_its_name(tmp_path: Path) -> None:
    write_policies(tmp_path, a="strict")
    from_folder, from_file = PolicySet.load(tmp_path), PolicySet.load(tmp_path / "a.yaml")
    assert from_folder.default == from_file.default == "strict"
    assert from_folder.sha256 == from_file.sha256


def test_folder_sha256_depends_on_each_policy(tmp_path: Path) -> None:
    write_policies(tmp_path, a="default", b="strict")
    before = PolicySet.load(tmp_path).sha256
    (tmp_path / "b.yaml").write_text(in_rule('literals: ["y"]') + "name: strict\n")
    assert PolicySet.load(tmp_path).sha256 != before


def test_folder_without_a_default_is_refused_with_the_names(tmp_path: Path) -> None:
    write_policies(tmp_path, a="one", b="two")
    with pytest.raises(PolicyError, match=r"found: one, two\. .* Set name: default"):
        PolicySet.load(tmp_path)


def test_folder_with_one_name_twice_is_refused_with_both_files(tmp_path: Path) -> None:
    write_policies(tmp_path, a="", b="default")
    with pytest.raises(PolicyError, match=r'"default" occurs in .*a\.yaml and in .*b\.yaml'):
        PolicySet.load(tmp_path)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text("{}")
    with pytest.raises(PolicyError, match=r"no policy \(1 entries.*nothing would be guarded"):
        PolicySet.load(tmp_path)
    with pytest.raises(PolicyError, match="no policy given"):
        PolicySet.from_policies([])


def test_folder_with_a_broken_or_dangling_policy_is_refused(tmp_path: Path) -> None:
    write_policies(tmp_path, a="default")
    (tmp_path / "z.yaml").symlink_to(tmp_path / "gone.yaml")
    with pytest.raises(PolicyError, match=r"z\.yaml: no such file"):
        PolicySet.load(tmp_path)


def test_missing_path_of_a_policy_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="absent: no such file"):
        PolicySet.load(tmp_path / "absent")


def test_example_policies_load_and_show_every_action() -> None:
    policies = PolicySet.from_policies([Policy.load(path) for path in EXAMPLE_POLICIES])
    assert policies.default == "default"
    assert {rule.action for rule in policies.policies["default"].rules} == set(ACTIONS)
    assert not policies.policies["default"].client_selectable
    assert policies.policies["strict"].client_selectable


def test_policy_error_is_a_value_error_of_streamguard() -> None:
    assert issubclass(PolicyError, StreamguardError)
    assert issubclass(PolicyError, ValueError)


def test_yaml_is_refused_alike_without_libyaml(tmp_path: Path) -> None:
    # PyYAML may lack its C extension: the pure parser must give the same objects and refusals.
    (tmp_path / "good.yaml").write_text((EXAMPLES / "default.yaml").read_text())
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    (tmp_path / "control.yaml").write_bytes(b"version: \x01")
    code = (
        "import sys, yaml; del yaml.CSafeLoader\n"
        "from streamguard.policy import Policy, PolicySet\n"
        "from streamguard.errors import PolicyError\n"
        "print(Policy.load('good.yaml').sha256)\n"
        "for name in ('deep.yaml', 'control.yaml'):\n"
        "    try: Policy.load(name)\n"
        "    except PolicyError as error: print(error)\n"
    )
    done = run_python(code, tmp_path)
    digest, deep, control = done.splitlines()
    assert digest == Policy.load(EXAMPLES / "default.yaml").sha256
    assert "nested deeper than 32 levels" in deep
    assert "not valid YAML" in control


def test_policy_imports_no_engine(tmp_path: Path) -> None:
    code = (
        "import sys, streamguard.policy, streamguard.errors\n"
        "heavy = {'torch', 'numba', 'vllm', 'numpy', 'transformers', 'triton', 'xgrammar'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    assert run_python(code, tmp_path).strip() == "[]"


def run_python(code: str, folder: Path) -> str:
    root = Path(policy_module.__file__).parents[1]
    start = f"import sys; sys.path.insert(0, {str(root)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
