"""Data files: what is read comes back whole; what is broken is named with its line, never dropped."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from streamguard.errors import ProbeError
from streamguard.probe.data import Data, read
from streamguard.probe.items import prompt_digest

ROWS: list[dict[str, Any]] = [
    {"prompt": "How do I boil an egg?", "response": "Ten minutes in water.", "label": 0},
    {"prompt": "Name a colour.", "response": "Mud, you fool.", "label": 1, "source": "colours"},
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_the_native_form_comes_back_whole(tmp_path: Path) -> None:
    row = {
        "prompt": "Say hello.",
        "response": "Hello, you fool. Bye.",
        "label": "unsafe",
        "source": "greetings",
        "category": "insult",
        "spans": [[11, 15], [7, 12]],
        "refusal": False,
        "licence": "MIT",
        "prompt_id": 7,
        "id": "x1",
        "unknown": [1],
    }
    path = jsonl(tmp_path / "mine.jsonl", [row, *ROWS])
    data = read([path])
    first, second, third = data.items
    assert (first.label, first.source, first.category) == (1, "greetings", "insult")
    assert (first.spans, first.refusal, first.licence) == (((7, 15),), False, "MIT")
    assert first.prompt_id == "7"
    assert second.source == "mine"
    assert second.spans is None
    assert second.prompt_id == prompt_digest("how do i  boil an egg?\n")
    assert third.source == "colours"
    assert data.skipped == ()
    card = data.files[0]
    assert card.name == "mine.jsonl"
    assert card.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (card.items, card.positive, card.role) == (3, 2, "fit")
    assert card.sources == {"colours": 1, "greetings": 1, "mine": 1}
    assert card.licences == {"MIT": 1}


def test_every_kind_of_file_gives_the_same_items(tmp_path: Path) -> None:
    plain = jsonl(tmp_path / "a.jsonl", ROWS)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    array = tmp_path / "c.json"
    array.write_text(json.dumps(ROWS), encoding="utf-8")
    table = tmp_path / "d.csv"
    with open(table, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "response", "label", "source"])
        writer.writeheader()
        writer.writerows(ROWS)
    expected = [(item.prompt, item.response, item.label) for item in read([plain]).items]
    for path in (packed, array, table):
        data = read([path], role="calibration")
        assert [(item.prompt, item.response, item.label) for item in data.items] == expected, path
        assert [item.source for item in data.items] == [path.name[0], "colours"]
        assert data.files[0].role == "calibration"


def test_parquet_gives_the_same_items(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert [item.label for item in read([path]).items] == [0, 1]


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(
        ProbeError, match=r"needs pyarrow, .*pip install 'vllm-streamguard\[probe\]'"
    ):
        read([path])


BROKEN: list[tuple[str, Any, str]] = [
    ("no JSON", "{not json", "no valid JSON (Expecting property name"),
    ("no object", "[1]", "a list; needed: one JSON object a line"),
    ("too deep", "[" * 100_000, "no valid JSON (nested too deeply)"),
    ("label", {**ROWS[0], "label": "maybe"}, 'label is "maybe" (a string); needed: 0 or 1'),
    ("label 2", {**ROWS[0], "label": 2}, "label is 2 (an integer); needed: 0 or 1"),
    ("label null", {**ROWS[0], "label": None}, "label is null; needed: 0 or 1"),
    ("empty response", {**ROWS[0], "response": " \n"}, "response is empty; needed: text"),
    ("no response", {"prompt": "a", "label": 1}, 'no response: the keys are "prompt", "label"'),
    ("prompt", {**ROWS[0], "prompt": 3}, "prompt is 3 (an integer); needed: text"),
    ("half a character", {**ROWS[0], "response": "a\ud800"}, "half a character (U+D800 at 1)"),
    ("no form", {"text": "a"}, 'no known form: the keys are "text"; needed: prompt, response'),
    ("refusal", {**ROWS[0], "refusal": "perhaps"}, "needed: true or false"),
    ("source", {**ROWS[0], "source": ["a"]}, "source is a list; needed: text"),
    ("span", {**ROWS[1], "spans": [[3, 99]]}, "span [3, 99] of a response of 14 characters"),
    ("span order", {**ROWS[1], "spans": [[5, 5]]}, "0 <= start < end <= 14"),
    ("span kind", {**ROWS[1], "spans": [["a", 2]]}, 'span ["a", 2] of a response'),
    ("spans", {**ROWS[1], "spans": 3}, "spans is 3 (an integer); needed: [[start, end]"),
    ("no spans", {**ROWS[1], "spans": []}, "label 1 with an empty list of spans"),
    ("spans of 0", {**ROWS[0], "spans": [[0, 2]]}, "spans in a text with label 0"),
]


@pytest.mark.parametrize(
    ("row", "problem"), [case[1:] for case in BROKEN], ids=[c[0] for c in BROKEN]
)
def test_a_broken_line_is_named_and_skipped_only_if_lenient(
    tmp_path: Path, row: Any, problem: str
) -> None:
    path = jsonl(tmp_path / "data.jsonl", [*ROWS, "", row, ROWS[0] | {"prompt": "Another?"}])
    with pytest.raises(ProbeError) as caught:
        read([path])
    assert str(caught.value).startswith(f"{path}: line 4: ")
    assert problem in str(caught.value)
    assert "read leniently" in str(caught.value)
    data = read([path], lenient=True)
    assert len(data.items) == 3
    assert len(data.skipped) == 1
    assert data.skipped[0].startswith(f"{path}: 1 broken rows (the first is line 4: ")
    assert problem in data.skipped[0]


def test_bytes_that_are_no_utf8_are_a_broken_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", ROWS)
    path.write_bytes(path.read_bytes() + b'{"prompt": "\xff"}\n')
    with pytest.raises(ProbeError, match="line 3: byte 0xff is not UTF-8"):
        read([path])


def test_ten_broken_lines_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "one.jsonl", [ROWS[0], *["{"] * 8])
    two = jsonl(tmp_path / "two.jsonl", [ROWS[1], *["{"] * 1200])
    with pytest.raises(ProbeError) as caught:
        read([one, two])
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[9].startswith(f"{two}: line 3: ")
    assert lines[10] == "… and 1,198 more broken rows."
    skipped = read([one, two], lenient=True).skipped
    assert [line.partition(" (")[0] for line in skipped] == [
        f"{one}: 8 broken rows",
        f"{two}: 1,200 broken rows",
    ]


def test_a_file_of_an_unknown_form_is_refused_at_its_first_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", [{"chosen": "a", "rejected": "b"}] * 3)
    with pytest.raises(ProbeError) as caught:
        read([path])
    assert str(caught.value).count("\n") == 0
    assert 'line 1: no known form: the keys are "chosen", "rejected"' in str(caught.value)
    with pytest.raises(ProbeError, match="not one of 3 rows can be used; the first is line 1"):
        read([path], lenient=True)


def test_one_text_with_two_labels_is_an_error_that_names_both_lines(tmp_path: Path) -> None:
    other = {**ROWS[1], "label": 0}
    one = jsonl(tmp_path / "one.jsonl", ROWS)
    two = jsonl(tmp_path / "two.jsonl", [{**ROWS[0], "prompt": "c"}, other, ROWS[1]])
    with pytest.raises(ProbeError) as caught:
        read([one, two])
    assert (
        f"{two}: line 2: the same text as {one}: line 2, there with label 1 and here with 0"
        in str(caught.value)
    )
    data = read([one, two], lenient=True)
    assert [item.prompt for item in data.items] == [ROWS[0]["prompt"], "c"]
    assert [card.items for card in data.files] == [1, 1]
    assert f"{two}: 3 texts with two labels" in data.skipped


def test_exact_duplicates_are_kept_once_and_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", [*ROWS, ROWS[0], ROWS[0]])
    data = read([path])
    assert len(data.items) == 2
    assert data.skipped == (f"{path}: 2 exact duplicates (each text is kept once)",)


def test_at_stage_prompt_the_response_may_be_missing_and_is_not_read(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "label": 0}, {"prompt": "b", "label": 1, "response": "c"}]
    rows.append({"prompt": "b", "label": 1, "response": "d"})
    data = read([jsonl(tmp_path / "data.jsonl", rows)], stage="prompt")
    assert [(item.prompt, item.response, item.label) for item in data.items] == [
        ("a", "", 0),
        ("b", "", 1),
    ]


CSV_BROKEN = [
    ("prompt,response,label\na,b,1,2\n", "line 2: 4 values; the header has 3 columns."),
    ('prompt,response,label\na,"b,1\nc,d,0\n', "line 2: no valid CSV (unexpected end of data)"),
    ("prompt,prompt,label\na,b,1\n", 'the column "prompt" occurs twice'),
    ("prompt,response,label\na,,1\n", "line 2: response is null; needed: text"),
]


@pytest.mark.parametrize(("text", "problem"), CSV_BROKEN)
def test_a_broken_csv_row_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ProbeError) as caught:
        read([path])
    assert problem in str(caught.value)


def test_a_csv_row_over_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,response,label\n"a\nb",c,1\nd,e,7\n', encoding="utf-8")
    with pytest.raises(ProbeError, match="line 4: label is"):
        read([path])


UNUSABLE = [
    ("data.txt", b"", "unknown kind of file; read are .jsonl"),
    ("data.jsonl", b"", "no rows. Give a file with at least one item."),
    ("data.jsonl", b"\n\n", "no rows."),
    ("data.jsonl.gz", b"no gzip", "Not a gzipped file"),
    ("data.jsonl.gz", gzip.compress(b'{"a": 1}' * 999)[:-20], "the gzip file is cut off"),
    ("data.json", b"{", "no valid JSON (Expecting property name"),
    ("data.json", b"3", "3 (an integer); needed: an array of objects"),
    ("data.json", b'{"rows": 3}', 'an object with the keys "rows"; needed: an array of objects'),
    ("data.json", b"[]", "no rows."),
    ("data.csv", b"prompt,label\n\xff,1\n", "not UTF-8: byte 0xff"),
]


@pytest.mark.parametrize(("name", "content", "problem"), UNUSABLE)
def test_a_file_that_cannot_be_used_says_why(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for lenient in (False, True):
        with pytest.raises(ProbeError) as caught:
            read([path], lenient=lenient)
        assert problem in str(caught.value)
        assert str(path) in str(caught.value)


def test_arguments_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(ProbeError, match="no such file"):
        read([tmp_path / "none.jsonl"])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ProbeError, match="a folder"):
        read([tmp_path / "folder.jsonl"])
    with pytest.raises(ProbeError, match='stage is "both"; it must be output or prompt'):
        read([path], stage="both")  # type: ignore[arg-type]
    with pytest.raises(ProbeError, match='role is "test"; it must be fit or calibration'):
        read([path], role="test")
    with pytest.raises(ProbeError, match="no data file given"):
        read([])
    assert isinstance(read(path), Data)  # type: ignore[arg-type]
