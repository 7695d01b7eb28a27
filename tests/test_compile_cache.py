"""Compiled once, mapped afterwards, and never something else."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from guard_cases import policy, rule, vocabulary

from streamguard.cache_folder import VARIABLE
from streamguard.compiler import cache
from streamguard.compiler.cache import cached_program
from streamguard.compiler.program import Program
from streamguard.policy import PolicySet
from streamguard.session import Session

VOCABULARY = vocabulary([bytes([i]) for i in range(256)])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path / "compiled"


def policies(word: str = "bomb") -> PolicySet:
    return PolicySet.from_policies([policy(rule("mask", word), rule("halt", "gun", word=True))])


def hits(program: Program) -> list[int]:
    session = Session(program, 1)
    session.reset(0)
    return [int(session.advance([0], [token])[0]) for token in b"a bomb, a gun."]


def compile_is_forbidden(*_: object) -> Program:
    raise AssertionError("compiled although a compiled file was there")


def test_a_second_call_maps_what_the_first_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached_program(policies(), VOCABULARY)
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr(cache, "compile_program", compile_is_forbidden)
    again = cached_program(policies(), VOCABULARY)
    assert any(hits(first))
    assert hits(again) == hits(first)
    assert all(
        session.forbidden(0).tolist() == expected.forbidden(0).tolist()
        for session, expected in [(started(again), started(first))]
    )


def started(program: Program) -> Session:
    session = Session(program, 1)
    session.reset(0, list(b"a bom"))
    return session


def test_another_policy_or_other_code_gets_a_file_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_program(policies(), VOCABULARY)
    cached_program(policies("bombs"), VOCABULARY)
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(cache, "FORMAT_VERSION", 99)
    cached_program(policies(), VOCABULARY)
    assert len(list(folder.iterdir())) == 3


def test_a_damaged_file_is_compiled_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = hits(cached_program(policies(), VOCABULARY))
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, cache.logger.name):
        assert hits(cached_program(policies(), VOCABULARY)) == expected
    assert "damaged" in caplog.text
    caplog.clear()
    assert hits(cached_program(policies(), VOCABULARY)) == expected
    assert not caplog.text


def test_a_folder_that_cannot_be_written_stops_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, cache.logger.name):
        assert any(hits(cached_program(policies(), VOCABULARY)))
    assert "is not kept" in caplog.text


def test_a_folder_that_others_can_write_is_not_trusted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cached_program(policies(), VOCABULARY)
    folder.chmod(0o777)
    compiled: list[int] = []
    real = cache.compile_program
    monkeypatch.setattr(cache, "compile_program", lambda *a: compiled.append(1) or real(*a))
    with caplog.at_level(logging.WARNING, cache.logger.name):
        assert any(hits(cached_program(policies(), VOCABULARY)))
    assert compiled
    assert "can be written by others" in caplog.text


def test_folders_made_under_a_loose_umask_are_trusted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "home" / "cache"))
    before = os.umask(0o002)
    try:
        cached_program(policies(), VOCABULARY)
    finally:
        os.umask(before)
    with caplog.at_level(logging.WARNING, cache.logger.name):
        cached_program(policies(), VOCABULARY)
    assert not caplog.records


def test_only_the_newest_files_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_KEPT", 2)
    for word in ("one", "two", "three", "four"):
        cached_program(policies(word), VOCABULARY)
    assert len(list(folder.iterdir())) == 2
