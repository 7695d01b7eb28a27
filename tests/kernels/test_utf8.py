"""Streaming UTF-8 and the character map, against Python's own decoder and case folding."""

from __future__ import annotations

import codecs
import itertools
import random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamguard.compiler.forms import changed_characters, read_character
from streamguard.compiler.mapping import Mapping, character_tables, is_word_character
from streamguard.policy import NORMAL_FORMS
from streamguard_kernels.utf8 import (
    AFTER_NONWORD,
    BEFORE_NONWORD,
    CHARACTERS,
    MAX_MAPPED_BYTES,
    NUM_PREFIXES,
    REPLACEMENT,
    map_character,
    map_tokens,
    numbered_prefix,
    prefix_number,
    utf8_step,
)

# Bytes at the edges of what the second byte of a character may be.
EDGES = bytes.fromhex("00 7f 80 8f 90 9f a0 bf c0 c1 c2 df e0 e1 ec ed ee ef f0 f1 f3 f4 f5 fe ff")
STRIDE = 7
FORMS: tuple[tuple[str, ...], ...] = (
    (), *((form,) for form in NORMAL_FORMS), ("case", "confusables"), ("width", "separators"),
    NORMAL_FORMS,
)  # fmt: skip
MAPPINGS = tuple(Mapping(forms, boundary) for forms in FORMS for boundary in ("none", "word"))
CASE_WORD = Mapping(("case",), "word")


def feed_byte(pending: int, byte: int) -> tuple[int, str]:
    pending, broken, code_point = utf8_step.py_func(pending, byte)
    shown = "\ufffd" * broken + (chr(code_point) if code_point >= 0 else "")
    return pending, shown


def assert_reads_like_python(data: bytes) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pending, shown, expected = 0, "", ""
    for byte in data:
        pending, more = feed_byte(pending, byte)
        shown += more
        expected += decoder.decode(bytes([byte]))
        # Python may call a sequence broken one byte later than we do, never with another outcome.
        assert shown.startswith(expected)
    assert shown + "\ufffd" * (pending != 0) == data.decode(errors="replace")


@given(st.binary(max_size=64))
@example(b"\xf0\x80\x80\xed\xa0\x80\xf4\x90\xe0\x9f\xc0\x80")
def test_broken_utf8_reads_as_python_reads_it(data: bytes) -> None:
    assert_reads_like_python(data)


@given(st.lists(st.sampled_from(EDGES), max_size=24).map(bytes))
def test_bytes_at_the_edges_of_ranges_read_as_python_reads_them(data: bytes) -> None:
    assert_reads_like_python(data)


def test_every_sequence_of_three_edge_bytes_reads_as_python_reads_it() -> None:
    for data in itertools.product(EDGES, repeat=3):
        assert_reads_like_python(bytes(data))


@given(st.text(max_size=32))
def test_valid_text_reads_as_itself(text: str) -> None:
    pending, shown = 0, ""
    for byte in text.encode():
        pending, more = feed_byte(pending, byte)
        shown += more
    assert (pending, shown) == (0, text)


def map_text(text: str, mapping: Mapping) -> bytes:
    """`text` through the compiled tables, as one token."""
    tables = character_tables(MAPPINGS)
    data = np.frombuffer(bytearray(text.encode()), np.uint8)
    mapped, _, pending = map_tokens(
        data, np.array([0, len(data)]), int(mapping.separators),
        tables.page_of[MAPPINGS.index(mapping)], tables.entries, tables.map_offsets,
        tables.map_data,
    )  # fmt: skip
    assert not pending.any()
    return mapped.tobytes()


def reference_map(text: str, mapping: Mapping) -> bytes:
    out = b""
    for character in text:
        for read in read_character(character, mapping.normalize):
            piece = read.encode()
            if mapping.separators and read == " ":
                piece = b"" if out.endswith(b" ") else b" "
            elif mapping.wrap and not is_word_character(read):
                piece = bytes([BEFORE_NONWORD]) + piece + bytes([AFTER_NONWORD])
            out += piece
    return out


@pytest.mark.parametrize("boundary", ["none", "word"])
@pytest.mark.parametrize("normalize", FORMS)
def test_every_code_point_maps_as_the_mapping_says(
    normalize: tuple[str, ...], boundary: str
) -> None:
    mapping = Mapping(normalize, boundary)
    # Those that change, and a sample of all others.
    changed = [*changed_characters(normalize)][:: 1 + (len(normalize) > 1)]
    points = [*changed, *range(0, 0xD800, STRIDE), *range(0xE000, 0x110000, 8 * STRIDE)]
    text = "".join(map(chr, points))
    for at in range(0, len(text), 4096):
        part = text[at : at + 4096]
        assert map_text(part, mapping) == reference_map(part, mapping)


@given(st.text(max_size=32), st.sampled_from(MAPPINGS))
def test_texts_map_as_the_mapping_says(text: str, mapping: Mapping) -> None:
    assert map_text(text, mapping) == reference_map(text, mapping)


def test_no_character_maps_to_more_bytes_than_the_buffer_holds() -> None:
    longest = int(np.diff(character_tables(MAPPINGS).map_offsets).max())
    assert 6 < longest <= MAX_MAPPED_BYTES


def test_one_character_maps_alone_as_within_a_token() -> None:
    tables = character_tables((CASE_WORD,))
    out = np.empty(MAX_MAPPED_BYTES, np.uint8)
    for character in "aÄßİ-\n 中😀\u0301ﬃ":
        count = map_character(
            ord(character), tables.page_of[0], tables.entries, tables.map_offsets,
            tables.map_data, out,
        )  # fmt: skip
        assert out[:count].tobytes() == reference_map(character, CASE_WORD)


def test_tokens_map_each_on_its_own_with_their_unfinished_character(seed: int) -> None:
    rng = random.Random(seed)
    tables = character_tables((CASE_WORD,))
    tokens = [rng.randbytes(rng.randint(0, 6)) for _ in range(400)]
    tokens += ["ßİ-".encode()[: rng.randint(0, 5)] + bytes([rng.choice(EDGES)]) for _ in range(400)]
    offsets = np.cumsum([0, *map(len, tokens)]).astype(np.int64)
    mapped, mapped_offsets, pending = map_tokens(
        np.frombuffer(bytearray(b"".join(tokens)), np.uint8), offsets, 0, tables.page_of[0],
        tables.entries, tables.map_offsets, tables.map_data,
    )  # fmt: skip
    for i, token in enumerate(tokens):
        state, shown = 0, ""
        for byte in token:
            state, more = feed_byte(state, byte)
            shown += more
        expected = reference_map(shown, CASE_WORD)
        assert mapped[mapped_offsets[i] : mapped_offsets[i + 1]].tobytes() == expected, token
        assert pending[i] == state


def test_replacement_is_what_python_puts_for_broken_bytes() -> None:
    assert chr(REPLACEMENT) == b"\xff".decode(errors="replace")


def test_every_beginning_of_a_character_has_a_number_of_its_own() -> None:
    numbers: dict[bytes, int] = {}
    for code_point in range(0x80, 0x110000, 61):
        if 0xD800 <= code_point < 0xE000:
            continue
        data, pending = chr(code_point).encode(), 0
        for i, byte in enumerate(data[:-1]):
            pending = utf8_step.py_func(pending, byte)[0]
            number = prefix_number.py_func(pending)
            assert numbers.setdefault(data[: i + 1], number) == number >= 0
            if number < NUM_PREFIXES:
                assert numbered_prefix.py_func(number + 1) == pending
        assert (number < NUM_PREFIXES) == (code_point < CHARACTERS)
    assert numbered_prefix.py_func(0) == 0
    known = [number for number in numbers.values() if number < NUM_PREFIXES]
    assert len(set(known)) == len(known) > 2_000
