"""What the policy file refuses, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from policy_files import LITERALS, in_rule, load_text, one_rule

from streamguard import policy_reader
from streamguard.errors import PolicyError
from streamguard.policy import CATEGORIES, Policy

# name: (file, fragments that the message holds: place, value, allowed, reason or remedy)
BAD_FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "yaml syntax": ("version: 1\nname: a: b\n", ["line 2, column 8", "not valid YAML", "quote"]),
    "yaml tab": ("version: 1\nrules:\n\t- id: a\n", ["line 3, column 1", "not valid YAML"]),
    "yaml control character": (b"version: \x01", ["offset 9", "control characters"]),
    "yaml two documents": ("version: 1\n---\nversion: 1\n", ["line 2", "single document", "Move"]),
    "yaml python object": ("a: !!python/object:os.x {}", ["line 1, column 4", "constructor"]),
    "yaml bad int tag": ("version: !!int x", ["line 1, column 10", '"x" is no valid int']),
    "yaml unhashable key": ("? [a]\n: b", ["line 1", "unhashable key"]),
    "yaml undefined alias": ("name: *x", ["undefined alias", "quote values", "*&"]),
    "yaml deep nesting": ("[" * 1_000_000, ["nested deeper than 32 levels", "Flatten"]),
    "yaml merge key": ("a: &a {b: 1}\nc:\n  <<: *a\n", ["line 3, column 3", '"<<"', "write"]),
    "duplicate key": (
        in_rule("action: mask\n    " + LITERALS),
        ["line 5, column 5", 'key "action" occurs twice', "first on line 4", "Delete one"],
    ),
    "policy not utf-8": (b"version: 1\nname: caf\xe9\n", ["0xe9", "offset 20", "line 2", "iconv"]),
    "empty file": ("", ["holds null", "mapping with the keys version", "Start with version: 1"]),
    "not a mapping": ("- a\n", ["holds a list", "mapping with the keys"]),
    "version missing": ("name: a\n", ["version is missing", "integer 1", "Write version: 1"]),
    "version quoted": ('version: "1"\n', ['version is "1" (a string)', "without quotes"]),
    "version boolean": ("version: true\n", ["version is true (a boolean)", "integer 1"]),
    "version from the future": ("version: 2\n", ["version is 2", "only version that exists"]),
    "unknown policy key": (
        "version: 1\nrulez: []\nrules: [{id: a, action: halt, literals: [x]}]\n",
        ['unknown key "rulez"', "allowed: version, name", 'Did you mean "rules"?'],
    ),
    "extends": (
        "version: 1\nextends: base.yaml\nrules: [{id: a, action: halt, literals: [x]}]\n",
        ['extends is "base.yaml" (a string)', "must be a list", '["base.yaml"]'],
    ),
    "unknown pack": (
        "version: 1\nextends: [secret]\n",
        [
            'extends[0]: no pack is named "secret"',
            "packs: pii, prompt-leak, secrets.",
            'mean "secrets"?',
        ],
    ),
    "pack named twice": (
        "version: 1\nextends: [secrets, secrets]\n",
        ['extends[1] is "secrets", which is named before', "Delete one"],
    ),
    "pack not a name": (
        "version: 1\nextends: [1]\n",
        ["extends[0] is 1 (an integer)", "a string"],
    ),
    "name not a string": ("version: 1\nname: yes\nrules: []\n", ["name is true", "quote it"]),
    "bad name": ("version: 1\nname: a b\nrules: []\n", ['name is "a b"', "1..64", "Rename"]),
    "client_selectable quoted": (
        'version: 1\nclient_selectable: "true"\nrules: []\n',
        ['client_selectable is "true" (a string)', "true or false", "Remove the quotes"],
    ),
    "defaults not a mapping": (
        "version: 1\ndefaults: 3\nrules: []\n",
        ["defaults is 3", "mapping"],
    ),
    "unknown default": (
        "version: 1\ndefaults: {onerror: pass}\nrules: []\n",
        ['unknown key "onerror"', "allowed: on_error, normalize", 'Did you mean "on_error"?'],
    ),
    "default that yaml misreads": (
        "version: 1\ndefaults: {1: pass}\nrules: []\n",
        ["unknown key 1", "allowed: on_error, normalize"],
    ),
    "unknown on_error": (
        "version: 1\ndefaults: {on_error: ignore}\nrules: []\n",
        ['unknown on_error "ignore"', "allowed: block, pass"],
    ),
    "rules missing": ("version: 1\n", ["rules is null", "list of 1..1024 rules"]),
    "rules empty": (
        "version: 1\nrules: []\n",
        ["rules has 0 entries", "guards nothing", "Add one"],
    ),
    "rules a mapping": ("version: 1\nrules: {a: 1}\n", ["rules is a mapping", 'with "- "']),
    "rule a string": ("version: 1\nrules: [abc]\n", ["rules[0]: the rule is", "a mapping"]),
    "rule empty": ("version: 1\nrules: [{}]\n", ["rules[0]", 'key "id" is missing', '"action"']),
    "unknown rule key": (
        in_rule('litterals: ["x"]'),
        ['rules[0] "card-number": unknown key "litterals"', "allowed: id, ", '"literals"?'],
    ),
    "key that yaml misreads": (in_rule(LITERALS + "\n    yes: 1"), ["unknown key true", "allowed"]),
    "bad rule id": (
        "version: 1\nrules: [{id: Card_Number, action: halt, literals: [x]}]\n",
        ['id is "Card_Number"', "1..64 characters of a-z, 0-9 and -", "Rename"],
    ),
    "rule id a number": (
        "version: 1\nrules: [{id: 12, action: halt, literals: [x]}]\n",
        ["rules[0]: id is 12 (an integer)", "string", "quote it"],
    ),
    "duplicate rule id": (
        "version: 1\nrules:\n  - {id: a, action: halt, literals: [x]}\n"
        "  - {id: a, action: mask, literals: [y]}\n",
        ['rules[1] "a"', "that of rules[0]", "must differ", "Rename one"],
    ),
    "unknown action": (
        "version: 1\nrules: [{id: a, action: masc, literals: [x]}]\n",
        ['unknown action "masc"', "allowed: halt, redirect, mask, observe", 'mean "mask"?'],
    ),
    "redact": (
        "version: 1\nrules: [{id: a, action: redact, literals: [x]}]\n",
        ['action "redact" is not supported by this version', "allowed: halt, ", "Use mask"],
    ),
    "unknown category": (
        in_rule(LITERALS + "\n    category: violence"),
        ['unknown category "violence"', *CATEGORIES],
    ),
    "stage prompt": (
        in_rule(LITERALS + "\n    stage: prompt"),
        ['stage "prompt" is not supported by this version', "allowed: output"],
    ),
    "stage both": (in_rule(LITERALS + "\n    stage: both"), ['stage "both" is not supported']),
    "unknown stage": (in_rule(LITERALS + "\n    stage: input"), ['unknown stage "input"']),
    "unknown boundary": (
        in_rule(LITERALS + "\n    boundary: words"),
        ['unknown boundary "words"', "allowed: none, word", 'Did you mean "word"?'],
    ),
    "unknown normal form": (
        in_rule(LITERALS + "\n    normalize: [cases]"),
        ['unknown normalize "cases"', "allowed: case", 'Did you mean "case"?'],
    ),
    "normalize not a list": (
        in_rule(LITERALS + "\n    normalize: case"),
        ['normalize is "case" (a string)', "must be a list", '["case"]'],
    ),
    "regex that is refused": (in_rule("regexes: ['a$']"), ['regexes[0] "a$" asks where', "Use"]),
    "regex read as integer": (in_rule("regexes: [0123]"), ["regexes[0] is 0123 (an integer)"]),
    "no matcher": (in_rule("category: pii"), ["no pattern to match", "needs literals", "Add one"]),
    "empty list of literals": (in_rule("literals: []"), ["no pattern to match", "literals_file"]),
    "literals a string": (
        in_rule("literals: abc"),
        ['literals is "abc" (a string)', "must be a list", '["abc"]'],
    ),
    "literals null": (in_rule("literals:"), ["literals is null", "a list", "delete it"]),
    "literal read as octal": (in_rule("literals: [0123]"), ["pattern 0 is 0123 (an integer)"]),
    "literal read as boolean": (in_rule("literals: [yes]"), ["is yes (a boolean)", "quote it"]),
    "literal read as date": (in_rule("literals: [2024-01-02]"), ["2024-01-02 (a date)", "quote"]),
    "literal read as float": (in_rule("literals: [1e3, 1.50]"), ["is 1.50 (a number)", "quote"]),
    "literal read as null": (in_rule("literals: [a, ~]"), ["pattern 1 is ~ (null)", "quote it"]),
    "literal left out": (in_rule("literals: [a, null]"), ["pattern 1 is null", "a string"]),
    "literal a list": (in_rule("literals: [[a]]"), ["pattern 0 is a list", "a string"]),
    "endless literals": (in_rule("literals: &a [*a]"), ["pattern 0 is a list"]),
    "empty pattern": (
        in_rule('literals: [""]'),
        [
            'policy.yaml: rules[0] "card-number": pattern 0 is empty; patterns need 1..4096 bytes. '
            "An empty pattern would accept at every byte and block all output. "
            "Delete it or give a literal."
        ],
    ),
    "pattern too long": (
        in_rule(f'literals: ["{"é" * 2049}"]'),
        ["is 4098 bytes long", "1..4096", "Keep a distinctive part"],
    ),
    "duplicate pattern": (
        in_rule("literals: [a, b, a]"),
        ['pattern 2 "a" repeats pattern 0', "once in a rule", "Delete one"],
    ),
    "duplicate after case folding": (
        in_rule("literals: [STRASSE, straße]\n    normalize: [case]"),
        ['pattern 1 "straße" repeats pattern 0 after normalize [case]'],
    ),
    "duplicate after separators": (
        in_rule("literals: [a b, a-b]\n    normalize: [leet, separators]"),
        ['pattern 1 "a-b" repeats pattern 0 after normalize [leet, separators]'],
    ),
    "nothing left": (
        in_rule('literals: ["\\u200b"]\n    normalize: [zero-width]'),
        ["is empty after normalize [zero-width]", "block all output", "Delete it"],
    ),
    "replacement character": (
        in_rule('literals: ["caf\ufffd"]'),
        ["U+FFFD", "broken UTF-8", "Write the characters"],
    ),
    "redirect without message": (
        "version: 1\nrules: [{id: a, action: redirect, literals: [x]}]\n",
        ["message is missing", "redirect", "Add message, or use halt"],
    ),
    "message without redirect": (
        in_rule(LITERALS + "\n    message: No."),
        ['message is "No." but action is halt', "Delete it or use redirect"],
    ),
    "message blank": (
        "version: 1\nrules: [{id: a, action: redirect, message: ' ', literals: [x]}]\n",
        ["message is 1 bytes long", "1..4096", "white space"],
    ),
    "message too long": (
        f"version: 1\nrules: [{{id: a, action: redirect, message: {'m' * 4097}, literals: [x]}}]\n",
        ["message is 4097 bytes long", "1..4096"],
    ),
    "literals file missing": (
        in_rule("literals_file: nope.txt"),
        ['"card-number": literals_file "nope.txt": no such file', "looked for /", "relative"],
    ),
    "literals file a folder": (in_rule("literals_file: ."), ["is a folder", "Name one in it"]),
    "literals file with NUL in its name": (in_rule('literals_file: "a\\0b"'), ["cannot be read"]),
    "literals file a list": (in_rule("literals_file: [a]"), ["literals_file is a list", "string"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_with_place_value_allowed_and_remedy(name: str, tmp_path: Path) -> None:
    text, fragments = BAD_FILES[name]
    with pytest.raises(PolicyError) as caught:
        load_text(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'policy.yaml'}: ")
    for fragment in fragments:
        assert fragment in message
    assert "pydantic" not in message
    assert "Traceback" not in message
    assert len(message) < 2000
    # Nothing of the machinery may show when the error is not caught.
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


# name: (content of words.txt, fragments of the message)
BAD_LITERALS_FILES: dict[str, tuple[bytes, list[str]]] = {
    "latin-1": (b"ok\ncaf\xe9\n", ['"words.txt": not UTF-8', "0xe9 at offset 6 (line 2)", "iconv"]),
    "utf-16 with mark": ("word\n".encode("utf-16"), ["not UTF-8: byte 0xff at offset 0 (line 1)"]),
    "utf-16 without mark": ("word\n".encode("utf-16-le"), ["words.txt line 1", "NUL", "UTF-16"]),
    "empty": (b"", ["no pattern to match"]),
    "blank lines only": (b"\n  \r\n\t\n", ["no pattern to match"]),
    "duplicate": (b"a\n\nb\na\n", ['words.txt line 4 "a" repeats words.txt line 1']),
    "duplicate of an inline one": (b"a\ninline\n", ['line 2 "inline" repeats pattern 0']),
    "replacement character": ("a\nb\ufffd\n".encode(), ["words.txt line 2", "U+FFFD"]),
    "too long a line": (b"a\n" + b"x" * 4097, ["words.txt line 2", "4097 bytes", "1..4096"]),
}


@pytest.mark.parametrize("name", BAD_LITERALS_FILES)
def test_bad_literals_file_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    content, fragments = BAD_LITERALS_FILES[name]
    (tmp_path / "words.txt").write_bytes(content)
    inline = "\n    literals: [inline]" if "inline" in name else ""
    with pytest.raises(PolicyError) as caught:
        load_text(tmp_path, in_rule("literals_file: words.txt" + inline))
    for fragment in ['rules[0] "card-number": ', *fragments]:
        assert fragment in str(caught.value)
    assert "more problems" not in str(caught.value)


def test_missing_policy_file_folder_and_unreadable_file_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PolicyError, match=r"absent\.yaml: no such file; looked for /"):
        Policy.load(tmp_path / "absent.yaml")
    with pytest.raises(PolicyError, match="is a folder; a file is needed"):
        Policy.load(tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # By hand, since root may read everything.
    monkeypatch.setattr(policy_reader, "open", refuse, raising=False)
    with pytest.raises(PolicyError, match=r"may not be read by this user.*Grant read permission"):
        Policy.load(tmp_path / "policy.yaml")


def test_lone_surrogate_is_refused_and_shown_escaped() -> None:
    with pytest.raises(PolicyError, match=r'pattern 0 "\\ud800" holds a lone surrogate'):
        Policy.from_dict(one_rule(literals=["\ud800"]))
    with pytest.raises(PolicyError, match=r'message "\\udfff" holds a lone surrogate'):
        Policy.from_dict(one_rule(action="redirect", message="\udfff"))


def test_control_characters_of_a_value_do_not_reach_the_terminal() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.from_dict(one_rule(category="\x1b[2J\x9b"))
    assert r'"\x1b[2J\x9b"' in str(caught.value)


def test_all_problems_of_a_file_are_listed_at_once(tmp_path: Path) -> None:
    text = """
version: 1
name: a b
rules:
  - {id: a, action: stop, literals: [x]}
  - {id: b, action: halt, literals: ["", x, x]}
  - {id: c, action: halt, literals_file: nope.txt}
  - {id: d, action: halt, literals: [5]}
"""
    with pytest.raises(PolicyError) as caught:
        load_text(tmp_path, text)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert all(line.startswith(f"{tmp_path / 'policy.yaml'}: ") for line in lines)
    for line, fragment in zip(
        lines,
        ['name is "a b"', '"stop"', "pattern 0 is empty", "repeats", "nope.txt", "pattern 0 is 5"],
        strict=True,
    ):
        assert fragment in line


def test_more_than_ten_problems_are_counted() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.from_dict(one_rule(literals=[""] * 25), source="p.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "… and 15 more problems in p.yaml."


def test_long_values_are_shortened() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.from_dict(one_rule(category="c" * 10_000))
    assert '"' + "c" * 80 + '…"' in str(caught.value)
