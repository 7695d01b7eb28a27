"""From a data file to its rows, one at a time, each with its place: "line 7", "item 3".

Lines are streamed. Only .json has to be parsed as a whole, since an array has no lines.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from streamguard.errors import ProbeError
from streamguard.policy_errors import found, show

FORMATS = ".jsonl, .jsonl.gz, .json, .csv, .parquet"
#: csv's own limit is 128 KiB a field; a jailbreak prompt with its answer can be longer.
_MAX_CSV_FIELD = 64 * 1024 * 1024


@dataclass(frozen=True)
class Row:
    """One row as the file has it. `behavior_id` is added to rows of HarmBench's nested files."""

    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Broken:
    """A place where no row could be read: what was found and what is needed."""

    place: str
    problem: str


def file_stem(path: Path) -> str:
    """The name without folder and endings: `train.jsonl.gz` -> `train`."""
    name = path.name.removesuffix(".gz")
    return name.rpartition(".")[0] or name


def rows_of(path: Path) -> Iterator[Row | Broken]:
    """Read a file row by row, by the ending of its name.

    Raises ProbeError when the file as a whole cannot be used: missing, unreadable, of another
    format, cut off, or Parquet without pyarrow.
    """
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    ending = plain[plain.rfind(".") :] if "." in plain else ""
    try:
        if ending == ".parquet" and plain == name:
            yield from _parquet_rows(path)
            return
        reader = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}.get(ending)
        if reader is None:
            raise ProbeError(
                f"{path}: unknown kind of file; read are {FORMATS} (.gz of the text kinds too). "
                f"Convert it, or correct the ending of its name."
            )
        with gzip.open(path, "rb") if plain != name else open(path, "rb") as file:
            yield from reader(path, file)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise ProbeError(f"{path}: no such file. Correct the path.") from None
    except IsADirectoryError:
        raise ProbeError(f"{path}: a folder; name the data files in it.") from None
    except PermissionError:
        raise ProbeError(f"{path}: may not be read by this user. Grant read permission.") from None
    except EOFError:
        raise ProbeError(f"{path}: the gzip file is cut off. Copy or download it again.") from None
    except OSError as error:
        raise ProbeError(f"{path}: cannot be read ({error}). Copy or download it again.") from None
    except UnicodeDecodeError as error:
        raise ProbeError(
            f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start} "
            f"of what was read. Convert it: iconv -f ITS-ENCODING -t UTF-8."
        ) from None


def _jsonl_rows(_path: Path, file: IO[bytes]) -> Iterator[Row | Broken]:
    for number, line in enumerate(file, start=1):
        place = f"line {number}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except UnicodeDecodeError as error:
            byte = line[error.start]
            yield Broken(place, f"byte 0x{byte:02x} is not UTF-8; needed: JSON in UTF-8.")
        except (ValueError, RecursionError) as error:
            yield Broken(
                place, f"no valid JSON ({_json_reason(error)}); needed: one object a line."
            )
        else:
            if isinstance(values, dict):
                yield Row(place, values)
            else:
                yield Broken(place, f"{found(values)}; needed: one JSON object a line.")


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _json_rows(path: Path, file: IO[bytes]) -> Iterator[Row | Broken]:
    try:
        values = json.load(io.TextIOWrapper(file, encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        remedy = "If it has one object a line, name it .jsonl."
        raise ProbeError(f"{path}: no valid JSON ({_json_reason(error)}). {remedy}") from None
    if isinstance(values, dict):
        yield from _nested_rows(path, values)
        return
    if not isinstance(values, list):
        raise ProbeError(f"{path}: {found(values)}; needed: an array of objects.")
    for number, value in enumerate(values, start=1):
        place = f"item {number}"
        if isinstance(value, dict):
            yield Row(place, value)
        else:
            yield Broken(place, f"{found(value)}; needed: an object.")


def _nested_rows(path: Path, values: dict[str, Any]) -> Iterator[Row | Broken]:
    """HarmBench's completions and validation sets: {behaviour id: [generation, ...]}."""
    if not values or not all(isinstance(value, list) for value in values.values()):
        raise ProbeError(
            f"{path}: an object with the keys {keys_shown(values)}; needed: an array of objects, or "
            f"HarmBench's {{behavior id: [{{test_case, generation, ...}}]}}."
        )
    for behavior_id, generations in values.items():
        for number, value in enumerate(generations, start=1):
            place = f"{show(behavior_id)} item {number}"
            if isinstance(value, dict):
                yield Row(place, {"behavior_id": behavior_id, **value})
            else:
                yield Broken(place, f"{found(value)}; needed: an object.")


def _csv_rows(path: Path, file: IO[bytes]) -> Iterator[Row | Broken]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    csv.field_size_limit(max(_MAX_CSV_FIELD, csv.field_size_limit()))
    # strict: a quote that is never closed would otherwise swallow the rest of the file in silence.
    reader = csv.reader(text, strict=True)
    header: list[str] | None = None
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if header is None:
                raise ProbeError(f"{path}: {place}: no valid CSV header ({error}).") from None
            yield Broken(
                place, f"no valid CSV ({error}); needed: quotes closed, and doubled in text."
            )
            continue
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise ProbeError(f"{path}: the column {show(twice[0])} occurs twice. Rename one.")
        elif len(fields) != len(header):
            yield Broken(place, f"{len(fields)} values; the header has {len(header)} columns.")
        else:
            # An empty cell is how CSV writes null.
            yield Row(place, {k: v or None for k, v in zip(header, fields, strict=True)})


def _parquet_rows(path: Path) -> Iterator[Row | Broken]:
    os.stat(path)
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ProbeError(
            f"{path}: reading Parquet needs pyarrow, which is not installed. Install it "
            f"(pip install 'vllm-streamguard[probe]') or convert the file to .jsonl."
        ) from None
    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", values)
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise ProbeError(f"{path}: no valid Parquet ({error}). Download it again.") from None


def keys_shown(values: dict[str, Any], most: int = 12) -> str:
    """The keys of a row for a message, the first dozen."""
    names = [show(str(key)) for key in values]
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return (", ".join(names[:most]) or "(none)") + more
