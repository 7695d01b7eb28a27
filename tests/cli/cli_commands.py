"""Run the command line, in this process or in one of its own, and say what came of it."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from streamguard.cli import app
from streamguard.commands import environment

POLICY = """\
version: 1
name: example
rules:
  - {id: canary, literals: ["BEGIN RSA"], action: halt}
  - {id: brand, literals: [Acme, Globex], action: mask, normalize: [case], boundary: word}
"""
STRICT = "version: 1\nname: default\nrules: [{id: any, literals: [key], action: observe}]\n"


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
        # A test run in the background has it ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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


def fake_versions(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        key = name.replace("-", "_")
        if key not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[key]

    monkeypatch.setattr(environment, "version", version)
