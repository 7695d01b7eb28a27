"""Mappings: what one character of the text stands for in the stream that an automaton reads.

A mapping is a set of normal forms (`forms`) plus, for `boundary: word`, marks around non-word
characters. It works character by character, so it needs no context beyond unfinished UTF-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import regex

from streamguard.compiler.forms import SEPARATOR, changed_characters, read_text, readings
from streamguard_kernels.utf8 import AFTER_NONWORD, BEFORE_NONWORD, SEPARATOR_BYTE

# Unicode TR18 \w: Alphabetic, marks, decimal numbers, connector punctuation, join controls. Marks
# count, so that "bomb" in "bomb" + U+0301 is not a word of its own.
_NONWORD = regex.compile(r"\W")
_WORDS = regex.compile(r"\w+")
_BEFORE, _AFTER = bytes([BEFORE_NONWORD]), bytes([AFTER_NONWORD])
_SEPARATOR = SEPARATOR.encode()
_IS_SEPARATOR = regex.compile(f"{SEPARATOR}+")


def is_word_character(character: str) -> bool:
    """Whether `boundary: word` counts this one character as part of a word."""
    return _NONWORD.fullmatch(character) is None


@dataclass(frozen=True, order=True)
class Mapping:
    """Normal forms and boundary of a rule; rules that share both share an automaton.

    characters: read whole characters even without forms and boundary, so that broken bytes are the
    U+FFFD that a client sees. Regexes need that; no literal can hold one.
    """

    normalize: tuple[str, ...] = ()
    boundary: str = "none"
    characters: bool = False

    @property
    def wrap(self) -> bool:
        return self.boundary == "word"

    @property
    def separators(self) -> bool:
        """Whether a run of separators is one byte, which parts words without marks of its own."""
        return "separators" in self.normalize

    @property
    def deletes(self) -> bool:
        """Whether some characters are read as nothing."""
        return "zero-width" in self.normalize or "marks" in self.normalize

    @property
    def is_identity(self) -> bool:
        return not self.normalize and not self.wrap and not self.characters

    def fold(self, text: str) -> str:
        """Apply the normal forms; runs of separators become one."""
        read = read_text(text, self.normalize)
        return _IS_SEPARATOR.sub(SEPARATOR, read) if self.separators else read

    def readings(self, literal: str) -> tuple[str, ...]:
        """What the literal's spellings are read as; nothing if no character of it is left."""
        return readings(literal, self.normalize)

    def patterns(self, literal: str) -> tuple[bytes, ...]:
        """What the automaton looks for: where one of these ends in the stream, the literal stands.

        With `boundary: word` each begins with the mark that ends a non-word character, for which
        the automaton takes a separator too, and ends with the other mark or with a separator.
        """
        found = []
        for reading in self.readings(literal):
            if not self.wrap:
                found.append(reading.encode())
                continue
            inner = _AFTER + mark(reading, self.separators)
            found.append(inner + _BEFORE)
            if self.separators:
                found.append(inner + _SEPARATOR)
        return tuple(found)

    def all_patterns(self, literals: Sequence[str]) -> tuple[bytes, np.ndarray]:
        """`patterns` of many literals, one behind the other, and the length of each: int64[].

        0.1 µs each for ASCII as it is, which lists of a million are; 4 µs each under normal forms.
        """
        text = "".join(literals)
        if not self.normalize and not self.wrap and text.isascii():
            return text.encode(), np.fromiter(map(len, literals), np.int64, len(literals))
        found = [pattern for literal in literals for pattern in self.patterns(literal)]
        return b"".join(found), np.fromiter(map(len, found), np.int64, len(found))


def mark(read: str, separators: bool = False) -> bytes:
    """The bytes of what was read with marks around each non-word character."""
    pieces = [piece.encode() for piece in regex.split(r"(\W)", read)]
    for i in range(1, len(pieces), 2):
        if not separators or pieces[i] != _SEPARATOR:
            pieces[i] = _BEFORE + pieces[i] + _AFTER
    return b"".join(pieces)


@dataclass(frozen=True)
class CharacterTables:
    """`utf8.map_character`'s tables for several mappings.

    page_of int32[num_mappings, 0x1100], entries int32[num_pages * 256], map_offsets int64[],
    map_data uint8[].
    """

    page_of: np.ndarray
    entries: np.ndarray
    map_offsets: np.ndarray
    map_data: np.ndarray


@cache
def nonword_flags() -> np.ndarray:
    """int32[0x110000]: 1 = not a word character; surrogates count as none."""
    everything = (
        "".join(map(chr, range(0xD800))) + " " * 0x800 + "".join(map(chr, range(0xE000, 0x110000)))
    )
    flags = np.ones(0x110000, np.int32)
    for match in _WORDS.finditer(everything):
        flags[match.start() : match.end()] = 0
    return flags


@cache
def _strings(mapping: Mapping) -> dict[int, bytes]:
    """What is written for each character that does not stand for itself."""
    changed = changed_characters(mapping.normalize)
    if mapping.separators:
        changed = {**changed, SEPARATOR_BYTE: SEPARATOR}  # itself, but without marks
    found = {}
    for code_point, read in changed.items():
        folded = mapping.fold(read)
        found[code_point] = mark(folded, mapping.separators) if mapping.wrap else folded.encode()
    return found


@cache
def character_tables(mappings: tuple[Mapping, ...]) -> CharacterTables:
    """Tables for the given mappings, in that order. Up to a second a set of forms, cached."""
    # What a character is replaced by -> its index; 0 = the character itself.
    index_of: dict[bytes | None, int] = {None: 0}
    strings = [b""]
    page_of = np.zeros((max(len(mappings), 1), 0x1100), np.int32)
    pages: dict[bytes, int] = {}
    entries: list[np.ndarray] = []
    for m, mapping in enumerate(mappings):
        table = nonword_flags().copy() if mapping.wrap else np.zeros(0x110000, np.int32)
        for code_point, string in _strings(mapping).items():
            index = index_of.setdefault(string, len(strings))
            if index == len(strings):
                strings.append(string)
            table[code_point] = index << 1
        for page, row in enumerate(table.reshape(0x1100, 256)):
            key = row.tobytes()
            if key not in pages:
                pages[key] = len(entries)
                entries.append(row)
            page_of[m, page] = pages[key]
    return CharacterTables(
        page_of,
        np.concatenate(entries) if entries else np.zeros(256, np.int32),
        np.cumsum([0] + [len(s) for s in strings]).astype(np.int64),
        np.frombuffer(bytearray(b"".join(strings) or b"\0"), np.uint8),
    )
