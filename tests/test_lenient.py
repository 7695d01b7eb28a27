"""Lenient loading: what is left out, what is refused all the same, and who has to agree on it."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from streamguard.cli import app
from streamguard.commands import environment
from streamguard.errors import ConfigurationError, PolicyError
from streamguard.policy import Policy, PolicySet
from streamguard.vllm_plugin import settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("STREAMGUARD_POLICY", "STREAMGUARD_REQUIRED", "STREAMGUARD_LENIENT"):
        monkeypatch.delenv(variable, raising=False)


def written(folder: Path, literals: str = "[good]", words: bytes | None = None) -> Path:
    path = folder / "policy.yaml"
    more = "" if words is None else "\n    literals_file: words.txt"
    if words is not None:
        (folder / "words.txt").write_bytes(words)
    path.write_text(
        f"version: 1\nrules:\n  - id: names\n    action: halt\n    literals: {literals}{more}\n"
    )
    return path


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# name: (inline literals, lines of words.txt or None, fragments of the one warning)
BAD_LITERALS: dict[str, tuple[str, bytes | None, list[str]]] = {
    "empty": ('[good, ""]', None, ["pattern 1 is empty", "Delete it or give a literal."]),
    "too long": ("[good]", b"x" * 4097, ["words.txt line 1", "4097 bytes", "Keep a distinctive"]),
    "replacement": ("[good]", "a\ufffd".encode(), ["words.txt line 1", "U+FFFD", "Write the"]),
    "duplicate": ("[good, good]", None, ['pattern 1 "good" repeats pattern 0', "Delete one."]),
    "duplicate in file": ("[good]", b"\n\r\ngood\r\n", ["words.txt line 3", "repeats pattern 0"]),
    "not utf-8": ("[good]", b"caf\xe9", ["words.txt line 1", "not UTF-8 (byte 0xe9)", "Convert"]),
    "a surrogate in bytes": ("[good]", b"\xed\xa0\x80", ["not UTF-8 (byte 0xed)"]),
    "nul": ("[good]", b"a\0", ["words.txt line 1", "NUL", "iconv"]),
    "no string": ("[good, 012]", None, ["pattern 1 is 012 (an integer)", "quote it"]),
}


@pytest.mark.parametrize("name", BAD_LITERALS)
def test_a_bad_literal_is_skipped_with_place_and_remedy_and_refused_if_strict(
    name: str, tmp_path: Path
) -> None:
    literals, words, fragments = BAD_LITERALS[name]
    path = written(tmp_path, literals, words)
    with pytest.raises(PolicyError):
        Policy.load(path)
    loaded = Policy.load(path, lenient=True)
    assert loaded.rules[0].literals == ("good",)
    (warning,) = loaded.warnings
    assert warning.startswith(f'{path}: rules[0] "names": ')
    assert warning.endswith(" Skipped.")
    for fragment in fragments:
        assert fragment in warning
    clean = tmp_path / "clean"
    clean.mkdir()
    strict = Policy.load(written(clean))
    assert loaded.sha256 == strict.sha256  # the hash is that of the patterns in force
    assert strict.warnings == ()


def test_a_lone_surrogate_from_python_is_skipped_too() -> None:
    rules = [{"id": "names", "action": "halt", "literals": ["good", "\ud800"]}]
    loaded = Policy.from_dict({"version": 1, "rules": rules}, lenient=True)
    assert loaded.rules[0].literals == ("good",)
    assert 'pattern 1 "\\ud800" holds a lone surrogate' in loaded.warnings[0]


def test_a_rule_that_would_lose_all_its_patterns_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, '["", "\ufffd"]', b"\xff\n\xfe\n")
    with pytest.raises(PolicyError, match=r'rules\[0\] "names": no pattern is left: all 4 of its'):
        Policy.load(path, lenient=True)


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nrules: [{id: a, action: halt, literals: [x], literals_file: none.txt}]\n",
        "version: 1\nrules: [{id: a, action: hold, literals: [x]}]\n",
        "version: 1\nrules: [{id: a, action: halt}]\n",
        "version: 1\nrules: [{id: a, action: halt, literals: x}]\n",
        "version: 1\nrulez: []\n",
    ],
)
def test_everything_but_literals_is_refused_as_ever(text: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError) as strict:
        Policy.load(path)
    with pytest.raises(PolicyError) as lenient:
        Policy.load(path, lenient=True)
    assert str(lenient.value) == str(strict.value)


def test_many_bad_literals_are_counted(tmp_path: Path) -> None:
    warnings = Policy.load(written(tmp_path, words=b"good\n" * 500), lenient=True).warnings
    assert len(warnings) == 11
    assert warnings[-1] == f"{tmp_path / 'policy.yaml'}: … and 490 more bad literals skipped."


@pytest.mark.slow
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_one_bad_line_of_a_million_is_named_in_linear_time(ending: bytes, tmp_path: Path) -> None:
    def seconds(num_lines: int) -> float:
        lines = [b"word %d" % i for i in range(num_lines)]
        lines[0] = b"\xef\xbb\xbf" + lines[0]  # a byte order mark
        lines[-2] = b"caf\xe9"
        path = written(tmp_path, "[]", ending.join(lines))
        began = time.process_time()
        with pytest.raises(PolicyError, match=rf"not UTF-8: byte 0xe9 .*\(line {num_lines - 1}\)"):
            Policy.load(path)
        loaded = Policy.load(path, lenient=True)
        took = time.process_time() - began
        assert f"words.txt line {num_lines - 1} " in loaded.warnings[0]
        assert loaded.num_patterns == num_lines - 1
        assert loaded.rules[0].literals[0] == "word 0"
        assert loaded.rules[0].literals[-1] == f"word {num_lines - 1}"
        return took

    few, many = seconds(100_000), seconds(1_000_000)
    assert many < 40 * few  # ten times would be linear; the rest is a busy machine


@pytest.mark.slow
def test_a_million_lines_take_memory_in_proportion(tmp_path: Path) -> None:
    path = written(tmp_path, "[]", b"\n".join(b"word %d" % (i // 2) for i in range(200_000)))
    tracemalloc.start()
    loaded = Policy.load(path, lenient=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loaded.num_patterns == 100_000
    assert len(loaded.warnings) == 11
    assert peak < 500 * 200_000


# ------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("by", ["option", "variable"])
def test_commands_warn_on_stderr_and_go_on(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, words=b"caf\xe9\n")
    (tmp_path / "text").write_text("a good one")
    options = ["--lenient"] if by == "option" else []
    if by == "variable":
        monkeypatch.setenv("STREAMGUARD_LENIENT", "1")
    warning = f'warning: {path}: rules[0] "names": words.txt line 1 "caf\\udce9" is not UTF-8'
    checked = run("check", path, *options)
    assert (checked.exit_code, checked.stderr.count(warning)) == (0, 1)
    assert "1 pattern" in checked.stdout
    as_json = run("check", path, "--json", *options)
    assert as_json.stderr == ""
    assert "not UTF-8" in json.loads(as_json.stdout)["warnings"][0]
    scanned = run("scan", path, tmp_path / "text", *options)
    assert (scanned.exit_code, scanned.stderr.count(warning)) == (0, 1)
    assert json.loads(scanned.stdout)["start"] == 2


def test_commands_refuse_without_the_option(tmp_path: Path) -> None:
    path = written(tmp_path, words=b"caf\xe9\n")
    for command in ("check", "scan"):
        result = run(command, path)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "not UTF-8: byte 0xe9 at offset 3 (line 1)" in result.stderr


@pytest.mark.parametrize(("options", "expected"), [(["--lenient"], "1"), ([], "0")])
def test_serve_tells_the_engine_to_leave_out_the_same(
    options: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda path, argv, env: calls.append(env))
    path = written(tmp_path, "[good, good]" if options else "[good]")
    result = run("serve", "model", "--policy", path, *options)
    assert result.exit_code == 0, result.output
    assert calls[0]["STREAMGUARD_LENIENT"] == expected


# ---------------------------------------------------------------------------------- engine


def config(**entry: Any) -> Any:
    return SimpleNamespace(additional_config={"streamguard": entry} if entry else {})


def test_engine_processes_load_what_the_configuration_says_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(written(tmp_path, "[good, good]"))
    expected = PolicySet.load(path, lenient=True).sha256
    with pytest.raises(PolicyError):
        settings.load_policies(config(policy=path))
    for one in (
        config(policy=path, lenient=True),
        config(policy=path, lenient=True, sha256=expected),
    ):
        loaded = settings.load_policies(one)
        assert loaded is not None
        assert loaded.sha256 == expected
    monkeypatch.setenv("STREAMGUARD_LENIENT", "1")
    assert settings.load_policies(config(policy=path)) == loaded
    with pytest.raises(PolicyError):
        settings.load_policies(config(policy=path, lenient=False))
    monkeypatch.setenv("STREAMGUARD_POLICY", path)
    monkeypatch.setenv("STREAMGUARD_LENIENT", "0")
    assert settings.load_policies(config(lenient=True)) == loaded


def test_settings_that_could_be_meant_either_way_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for entry in (
        {"policy": "a", "lenient": "yes"},
        {"lenient": True},
        {"policy": "a", "strict": 1},
    ):
        with pytest.raises(ConfigurationError, match=r'allowed: \{"policy": "FILE", "lenient"'):
            settings.load_policies(config(**entry))
    monkeypatch.setenv("STREAMGUARD_LENIENT", "yes")
    with pytest.raises(ConfigurationError, match="STREAMGUARD_LENIENT is 'yes'; allowed: 0, 1"):
        settings.load_policies(config(policy="a"))
    monkeypatch.setenv("STREAMGUARD_POLICY", "a")
    assert environment.policy()[0].status == environment.FAIL
