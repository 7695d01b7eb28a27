"""`streamguard scan`: what it finds, where it says it is, and how it ends."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import ahocorasick
import pytest
from cli_commands import matches, process, refused, run


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
