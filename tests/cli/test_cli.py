"""The command line: what it prints, what it refuses, and that nobody ever sees a traceback."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_commands import process, refused, run


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['streamguard', '--help']\n"
        "from streamguard.cli import main\n"
        "try: main()\n"
        "finally: print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("check", "scan", "compile", "serve", "doctor", "demo-model"):
        assert f"\n  {name} " in done.stdout
    heavy = {"numba", "numpy", "torch", "transformers", "vllm", "xgrammar", "prometheus_client"}
    assert not heavy & set(done.stderr.split())


@pytest.mark.parametrize("name", ["check", "scan", "compile", "serve", "doctor", "demo-model"])
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.stdout
    assert "streamguard" in result.stdout.split("Example:")[1]


def test_version_is_that_of_the_package() -> None:
    assert (
        run("--version").stdout == f"streamguard {importlib.metadata.version('vllm-streamguard')}\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [(), ("frobnicate",), ("check",), ("check", "--frobnicate", "x"), ("scan",), ("compile", "x"),
     ("scan", "x", "--chunk", "0"), ("scan", "x", "--chunk", "many"), ("serve", "model")],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.output
    assert "Traceback" not in result.output


def test_errors_of_the_real_command_are_one_line_with_their_class_and_exit_code_2() -> None:
    with process("check", "no-such.yaml") as child:
        out, err = child.communicate()
    assert child.returncode == 2
    assert out == b""
    assert err.startswith(b"PolicyError: no-such.yaml: no such file; looked for /")
    assert err.count(b"\n") == 1


BAD_POLICIES = {
    "unknown key": ("{id: a, literal: [x], action: halt}", ['rules[0] "a"', '"literal"']),
    "wrong type": ("{id: a, literals: foo, action: halt}", ['rules[0] "a"', "foo", "a list"]),
    "empty pattern": ('{id: a, literals: [""], action: halt}', ["pattern 0", "1..4096 bytes"]),
    "duplicate pattern": ("{id: a, literals: [x, x], action: halt}", ["pattern 1", "repeats"]),
    "duplicate rule id": (
        "{id: a, literals: [x], action: halt}, {id: a, literals: [y], action: halt}",
        ["rules[1]", '"a"', "rules[0]"],
    ),
    "unknown action": ("{id: a, literals: [x], action: stop}", ['"stop"', "halt", "mask"]),
    "unknown category": (
        "{id: a, literals: [x], action: halt, category: secrets}",
        ['"secrets"', "secret", "pii"],
    ),
    "missing literals file": (
        "{id: a, literals_file: none.txt, action: halt}",
        ["none.txt", "no such file"],
    ),
    "literals file that is not UTF-8": (
        "{id: a, literals_file: latin.txt, action: halt}",
        ["latin.txt", "not UTF-8", "0xe9", "line 2"],
    ),
    "not of this version": (
        "{id: a, literals: [x], action: redact}",
        ['"redact"', "not supported by this version"],
    ),
    "pattern above the limit": (
        "{id: a, literals: [" + "x" * 4097 + "], action: halt}",
        ["4097 bytes", "1..4096"],
    ),
    "rules above the limit": (
        ", ".join(f"{{id: r{n}, literals: [x], action: halt}}" for n in range(1025)),
        ["1025", "1..1024"],
    ),
    "no YAML": ("{id: [", ["not valid YAML", "line"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_POLICIES)
def test_check_refuses_a_bad_policy_with_file_place_and_what_is_allowed(
    case: str, tmp_path: Path
) -> None:
    rules, fragments = BAD_POLICIES[case]
    path = tmp_path / "bad.yaml"
    path.write_text(f"version: 1\nrules: [{rules}]\n")
    (tmp_path / "latin.txt").write_bytes(b"plain\ncaf\xe9\n")
    refused(run("check", path), "PolicyError: ", str(path), *fragments)


def test_check_refuses_a_folder_without_policies(tmp_path: Path) -> None:
    refused(run("check", tmp_path), "PolicyError: ", "holds no policy")


def test_check_prints_a_row_per_policy(folder: Path) -> None:
    result = run("check", folder)
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == f"{folder}: valid; 2 policies, 3 rules, 4 patterns"
    assert lines[1].split() == ["policy", "default", "selectable", "rules", "patterns", "sha256"]
    assert re.fullmatch(r"example +no +no +1 halt, 1 mask +3 +[0-9a-f]{12}", lines[2])
    assert re.fullmatch(r"default +yes +no +1 observe +1 +[0-9a-f]{12}", lines[3])


def test_check_warns_on_stderr_without_changing_the_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\nrules: [{id: a, literals: [foo], action: halt},"
        " {id: b, literals: [foo bar], action: halt}]\n"
    )
    result = run("check", path)
    assert result.exit_code == 0
    assert result.stderr.startswith(f'warning: {path}: rules[1] "b": ')


def test_check_as_json_says_the_same_and_more(folder: Path) -> None:
    found = json.loads(run("check", folder, "--json").stdout)
    assert found["default"] == "default"
    assert found["compiled"] is None
    assert found["warnings"] == []
    assert [entry["name"] for entry in found["policies"]] == ["example", "default"]
    assert found["policies"][0]["rules"] == {"halt": 1, "mask": 1}
    assert len(found["policies"][0]["sha256"]) == 64


def test_check_with_a_tokenizer_says_what_the_policy_compiles_to(
    policy: Path, tiny_models: Callable[..., Path]
) -> None:
    result = run("check", policy, "--tokenizer", tiny_models(), "--json")
    compiled = json.loads(result.stdout)["compiled"]
    assert compiled["tokens"] == 1000
    assert compiled["states"] > 10
    assert compiled["bytes"] > 1000
    assert compiled["spare_ids"] >= 8
    plain = run("check", policy, "--tokenizer", tiny_models()).stdout
    assert f"{compiled['states']:,} states" in plain
    assert f"{compiled['spare_ids']} spare token ids" in plain


def test_check_explains_what_the_forms_cost_and_take_as_equal(tmp_path: Path) -> None:
    path, text = tmp_path / "policy.yaml", tmp_path / "text.txt"
    path.write_text(
        "version: 1\nrules:\n"
        "  - {id: evasive, literals: [bomb it], action: halt, normalize: [case, leet, separators]}\n"
        "  - {id: exact, literals: [bomb it], action: halt, boundary: word}\n"
    )
    text.write_text("bomb it. Bomb it, 8omb\nit, bomb it")
    result = run("check", path, "--explain", "--text", text)
    assert result.exit_code == 0
    assert "I L i l ! 1 |" in result.stdout
    assert "case, leet, separators (evasive):" in result.stdout
    evasive, exact = json.loads(run("check", path, "--text", text, "--json").stdout)["explained"]
    assert evasive["hits"] == {"none": 2, "as written": 4, "case": 3, "leet": 3, "separators": 2}
    assert (evasive["patterns"], evasive["tracks"]) == (3, 1)
    assert exact["hits"] == {"none": 2, "as written": 2}
    assert (exact["patterns"], exact["tracks"], exact["alike"]) == (1, 2, [])
    refused(
        run("check", path, "--text", tmp_path / "no"), "--text needs a file", "Correct the path"
    )


def test_check_refuses_a_tokenizer_that_cannot_be_loaded(policy: Path, tmp_path: Path) -> None:
    refused(
        run("check", policy, "--tokenizer", tmp_path / "none"), "TokenizerError: ", "tokenizer.json"
    )


def test_compile_writes_an_artifact_and_prints_what_it_took(
    policy: Path, tmp_path: Path, tiny_models: Callable[..., Path]
) -> None:
    from streamguard.compiler.artifact import Artifact

    output = tmp_path / "policy.sga"
    result = run("compile", policy, "--tokenizer", tiny_models(), "-o", output)
    assert result.exit_code == 0
    assert result.stderr == ""
    printed = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    printed["build"] = printed["build"].removeprefix("seconds").strip()
    artifact = Artifact.load(output)
    assert printed["wrote"] == str(output)
    assert int(printed["states"]) == artifact.program.num_states
    assert int(printed["bytes"]) == output.stat().st_size
    assert float(printed["build"]) > 0
    assert re.fullmatch("[0-9a-f]{64}", printed["sha256"])
    assert artifact.policies.policies["example"].num_patterns == 3


def test_compile_does_not_overwrite_unless_forced(
    policy: Path, tmp_path: Path, tiny_models: Callable[..., Path]
) -> None:
    output = tmp_path / "policy.sga"
    output.write_bytes(b"precious")
    arguments = ("compile", policy, "--tokenizer", tiny_models(), "-o", output)
    refused(run(*arguments), "InputError: ", str(output), "exists", "--force")
    assert output.read_bytes() == b"precious"
    assert run(*arguments, "--force").exit_code == 0
    assert output.read_bytes() != b"precious"


@pytest.mark.parametrize(
    ("output", "fragment"),
    [(".", "is a folder"), ("none/policy.sga", "there is no folder"), ("/dev/null", "device")],
)
def test_compile_refuses_what_it_cannot_write_before_it_works(
    policy: Path, tmp_path: Path, output: str, fragment: str
) -> None:
    arguments = ("--tokenizer", "never loaded", "-o", tmp_path / output, "--force")
    refused(run("compile", policy, *arguments), "InputError: ", fragment)


def test_compile_refuses_a_tokenizer_that_cannot_be_loaded(policy: Path, tmp_path: Path) -> None:
    output = tmp_path / "policy.sga"
    refused(
        run("compile", policy, "--tokenizer", tmp_path, "-o", output),
        "TokenizerError: ",
        str(tmp_path),
    )
    assert not output.exists()


def test_demo_model_prints_nothing_but_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def demo_model(folder: Path | None) -> Path:
        asked.append(folder)
        return tmp_path / "model"

    monkeypatch.setattr("streamguard.demo_model.demo_model", demo_model)
    assert run("demo-model").stdout == f"{tmp_path}/model\n"
    assert run("demo-model", tmp_path).stdout == f"{tmp_path}/model\n"
    assert asked == [None, tmp_path]


def test_demo_model_names_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run("demo-model", tmp_path / "file"), "DemoModelError: ", f"{tmp_path}/file")
