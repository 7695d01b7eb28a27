"""Mappings: what one character of the text stands for in the stream that an automaton reads.

A mapping is a set of normal forms plus, for `boundary: word`, marks around non-word characters.
It works character by character, so it needs no context beyond unfinished UTF-8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import regex

from streamguard_kernels.utf8 import AFTER_NONWORD, BEFORE_NONWORD

# Unicode TR18 \w: Alphabetic, marks, decimal numbers, connector punctuation, join controls. Marks
# count, so that "bomb" in "bomb" + U+0301 is not a word of its own.
_NONWORD = regex.compile(r"\W")
_WORDS = regex.compile(r"\w+")
_BEFORE, _AFTER = bytes([BEFORE_NONWORD]), bytes([AFTER_NONWORD])
#: No character above is changed by case folding (Unicode 16; a test looks at all of them).
_LAST_FOLDED = 0x1FFFF


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
    def is_identity(self) -> bool:
        return not self.normalize and not self.wrap and not self.characters

    def fold(self, text: str) -> str:
        """Apply the normal forms. Full case folding works character by character."""
        return text.casefold() if "case" in self.normalize else text

    def pattern(self, literal: str) -> bytes:
        """The bytes that the automaton must see where `literal` stands in the text."""
        if not self.wrap:
            return self.fold(literal).encode()
        pieces = regex.split(r"(\W)", literal)
        words = [self.fold(piece).encode() for piece in pieces]
        for i in range(1, len(words), 2):
            words[i] = _BEFORE + words[i] + _AFTER
        return _AFTER + b"".join(words) + _BEFORE


@dataclass(frozen=True)
class CharacterTables:
    """`utf8.map_character`'s tables for several sets of normal forms.

    page_of int32[num_forms, 0x1100], entries int32[num_pages * 256], map_offsets int64[], map_data uint8[].
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
def character_tables(forms: tuple[tuple[str, ...], ...]) -> CharacterTables:
    """Tables for the given sets of normal forms, in that order. About 0.2 s, cached."""
    strings = [b""]  # index 0 = the character itself
    page_of = np.zeros((max(len(forms), 1), 0x1100), np.int32)
    pages: dict[bytes, int] = {}
    entries: list[np.ndarray] = []
    for f, form in enumerate(forms):
        table = nonword_flags().copy()
        if "case" in form:
            for code_point in range(_LAST_FOLDED + 1):
                if 0xD800 <= code_point < 0xE000:
                    continue
                character = chr(code_point)
                folded = character.casefold()
                if folded != character:
                    table[code_point] |= len(strings) << 1
                    strings.append(folded.encode())
        for page, row in enumerate(table.reshape(0x1100, 256)):
            key = row.tobytes()
            if key not in pages:
                pages[key] = len(entries)
                entries.append(row)
            page_of[f, page] = pages[key]
    return CharacterTables(
        page_of,
        np.concatenate(entries) if entries else np.zeros(256, np.int32),
        np.cumsum([0] + [len(s) for s in strings]).astype(np.int64),
        np.frombuffer(bytearray(b"".join(strings) or b"\0"), np.uint8),
    )
