"""Normal forms: what one character is read as. Pattern and text go through the same function.

Every form replaces a character by a string, so forms combine by being applied over and over until
nothing changes: no context, no order to remember. What each form does:

width        NFKD: full-width, ligatures, superscripts, circled letters, mathematical alphabets.
             Letters in brackets, in black circles or boxes and flag letters too, which NFKD keeps.
zero-width   deletes what is not seen: Default_Ignorable_Code_Point (zero-width spaces and joiners,
             bidi marks and overrides, tags, variation selectors, soft hyphen, fillers), other Cf
             but signs that stand before a number, and control characters that are no white space.
marks        NFD without combining marks (\\p{M}).
confusables  the prototype of UTS #39, after NFD; ASCII letters too (m = rn, 1 = I = l, 0 = O).
             Small capitals that UTS #39 keeps are their letters; ь is b.
case         full case folding.
leet         `LEET`; the letters in it have no case (who writes b0mb for BOMB means both).
separators   white space, dashes, connectors, dots and the like are one character, a space.

Data: Python's `unicodedata` (decompositions; Unicode 14 in Python 3.11), `regex` (properties) and
`confusable_homoglyphs` 3.3.1 (UTS #39 confusables.txt). Imports nothing heavy.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from functools import cache
from importlib import resources

import regex

#: What the characters of a run of separators are read as.
SEPARATOR = " "

#: Digits and signs that stand for letters. 1 is i or l, as the evader likes, so those are one.
LEET = {
    "a": "4@", "b": "86", "c": "¢©", "e": "3€", "g": "9", "l": "1!|i£¡", "o": "0", "s": "5$§",
    "t": "7+", "y": "¥", "z": "2",
}  # fmt: skip
_LEET = {
    variant: letter
    for letter, others in LEET.items()
    for character in letter + others
    for variant in (character, character.upper())
}

_MARK = regex.compile(r"\p{M}")
_UNSEEN = regex.compile(
    r"(?V1)[\p{Default_Ignorable_Code_Point}\p{Cf}\p{Cc}--\p{White_Space}"
    r"--\p{Prepended_Concatenation_Mark}]"
)
# Not: | + ! (letters of leet), quotes, brackets, = < > & % and other signs that carry meaning.
_SEPARATOR = regex.compile(r"[\p{White_Space}\p{Pd}\p{Pc}.,:;*/\\~·•‧․…⋅∙⸱・･。｡‣◦●∘⁃−\u2800]")

#: Look-alikes that UTS #39 keeps apart: small capitals, and the soft sign that passes for b.
_LOOK_ALIKES = {
    **dict(zip("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘꞯʀꜱᴛᴜᴠᴡʏᴢ", "abcdefghijklmnopqrstuvwyz", strict=True)),
    "ⱻ": "e", "ь": "b",
}  # fmt: skip


def _enclosed() -> Iterator[tuple[str, str]]:
    letters = [chr(ord("A") + i) for i in range(26)]
    for first in (0x1F150, 0x1F170, 0x1F1E6):  # in black circles, in black boxes, of flags
        yield from ((chr(first + i), letter) for i, letter in enumerate(letters))
    yield from ((chr(0x1F110 + i), letter) for i, letter in enumerate(letters))  # in brackets
    yield from ((chr(0x249C + i), letter.lower()) for i, letter in enumerate(letters))
    digits = "1234567890"
    yield from ((chr(0x2474 + i), digit) for i, digit in enumerate(digits[:9]))
    for first in (0x2776, 0x2780, 0x278A):  # dingbats in circles
        yield from ((chr(first + i), digit) for i, digit in enumerate(digits[:9]))
    yield "\u24ff", "0"


_ENCLOSED = dict(_enclosed())


@cache
def _prototypes() -> dict[str, str]:
    """UTS #39's prototype of each character that has another one, `_LOOK_ALIKES` included."""
    path = resources.files("confusable_homoglyphs") / "confusables.json"
    listed = json.loads(path.read_text(encoding="utf-8"))
    # The library lists pairs in both directions; each class is a star around its prototype.
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        while (above := parent.setdefault(text, text)) != text:
            text = above
        return text

    for text, others in listed.items():
        for other in others:  # U+200E stands around right-to-left characters, for display
            parent[root(text.replace("\u200e", ""))] = root(other["c"].replace("\u200e", ""))
    for text, letter in _LOOK_ALIKES.items():
        parent[root(text)] = root(letter)
    classes: dict[str, list[str]] = {}
    for text in list(parent):
        classes.setdefault(root(text), []).append(text)
    found = {}
    for members in classes.values():
        # A string can only be the target (there is one at most); else ASCII, letters, small ones.
        best = min(members, key=lambda m: (-len(m), not m.isascii(), not m.islower(),
                                           not m.isalpha(), m))  # fmt: skip
        found.update({member: best for member in members if member != best})
    return found


def _plain(character: str, forms: frozenset[str]) -> str:
    """The ASCII letters or digits that a form says a character is, else the character.

    First of all, since forms can lose it to each other: NFKD turns the lunate sigma, which looks
    like c, into one that does not. In order of certainty: ſ is s (case), though it looks like f.
    """
    claims = []
    if "width" in forms:
        claims.append(unicodedata.normalize("NFKD", _ENCLOSED.get(character, character)))
    if "case" in forms:
        claims.append(character.casefold())
    if "leet" in forms:
        claims.append(_LEET.get(character, ""))
    if "confusables" in forms:
        claims.append(_prototypes().get(character, ""))
    return next((text for text in claims if text.isascii() and text.isalnum()), character)


@cache
def _step(character: str, forms: frozenset[str]) -> str:
    """Apply each form once."""
    text = character if character.isascii() else _plain(character, forms)
    if "width" in forms:
        text = unicodedata.normalize("NFKD", _ENCLOSED.get(text, text))
    elif "marks" in forms or "confusables" in forms:
        text = unicodedata.normalize("NFD", text)
    return "".join([_replace(c, forms) for c in text])


@cache
def _replace(c: str, forms: frozenset[str]) -> str:
    """What the forms make of a character that nothing decomposes any more."""
    if "zero-width" in forms and _UNSEEN.match(c):
        return ""
    if "marks" in forms and _MARK.match(c):
        return ""
    if "separators" in forms and _SEPARATOR.match(c):
        return SEPARATOR  # before look-alikes: a long dash looks like the digit one in Chinese
    if "confusables" in forms:
        c = _prototypes().get(c, c)
    if "case" in forms:
        c = c.casefold()
        if "confusables" in forms:
            c = c.replace("i", "l")  # I looks like l and folds to i: all three are one
    if "leet" in forms:
        c = "".join([_LEET.get(x, x) for x in c])
    return c


@cache
def _read(character: str, forms: frozenset[str]) -> str:
    text = character
    for _ in range(8):  # a test looks at all characters: 5 rounds are the most
        after = "".join(_step(c, forms) for c in text)
        if after == text:
            break
        text = after
    return text


def read_character(character: str, forms: tuple[str, ...]) -> str:
    """What one character is read as under these normal forms; "" = it is skipped."""
    return _read(character, frozenset(forms)) if forms else character


class _Reader(dict[int, str]):
    """What `str.translate` asks; fills itself."""

    def __init__(self, forms: tuple[str, ...]) -> None:
        self._forms = frozenset(forms)

    def __missing__(self, code_point: int) -> str:
        read = self[code_point] = _read(chr(code_point), self._forms)
        return read


@cache
def _reader(forms: tuple[str, ...]) -> _Reader:
    return _Reader(forms)


def read_text(text: str, forms: tuple[str, ...]) -> str:
    """`text` character by character; runs of separators are left as they are."""
    if not forms:
        return text
    if forms == ("case",):
        return text.casefold()  # works character by character, and lists are long
    return text.translate(_reader(forms))


def readings(literal: str, forms: tuple[str, ...]) -> tuple[str, ...]:
    """Every string that stands for a literal in a text that is read under these forms.

    More than one with `separators`: runs as one separator, none at all, and one between all letters
    ("b.o.m.b"). And where case and look-alikes part ways (Ν looks like N, ν like v), as in other
    cases of the same literal. Empty if nothing of the literal is left.
    """
    spellings = [literal]
    if "case" in forms and "confusables" in forms and not literal.isascii():
        spellings += [literal.casefold(), literal.upper(), literal.title()]
    found: list[str] = []
    for spelling in spellings:
        text = read_text(spelling, forms)
        if "separators" not in forms:
            found.append(text)
            continue
        words = text.split(SEPARATOR)
        found.append(SEPARATOR.join(filter(None, words)))
        found.append("".join(words))
        found.append(SEPARATOR.join(_letters(spelling, forms)))
    return tuple(dict.fromkeys(filter(None, found)))


def _letters(literal: str, forms: tuple[str, ...]) -> list[str]:
    """What each character of a literal is read as, marks together with their letter."""
    letters: list[str] = []
    for character in literal:
        read = read_character(character, forms).replace(SEPARATOR, "")
        if letters and _MARK.match(character):
            letters[-1] += read
        else:
            letters.append(read)
    return list(filter(None, letters))


@cache
def _suspects(form: str) -> frozenset[str]:
    """At least all characters that a form changes."""
    everything = "".join([chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000])
    match form:
        case "case":
            return frozenset(c for c in everything[:0x20000] if c.casefold() != c)
        case "width" | "marks" | "confusables":
            parts = {c for c in everything[:0x30000] if unicodedata.decomposition(c)}
            parts.update(map(chr, range(0xAC00, 0xD7A4)))  # Hangul decomposes by rule
            parts.update(_ENCLOSED if form == "width" else ())
            parts.update(_MARK.findall(everything) if form == "marks" else ())
            parts.update(c for c in _prototypes() if form == "confusables" and len(c) == 1)
            return frozenset(parts)
        case "zero-width":
            return frozenset(_UNSEEN.findall(everything))
        case "separators":
            return frozenset(_SEPARATOR.findall(everything))
        case _:
            return frozenset(_LEET)


@cache
def changed_characters(forms: tuple[str, ...]) -> dict[int, str]:
    """Every code point that is not read as itself, with what it is read as. About half a second."""
    suspects = frozenset("Ii").union(*map(_suspects, forms))  # both change under two forms together
    read = {ord(character): read_character(character, forms) for character in suspects}
    return {c: read[c] for c in sorted(read) if read[c] != chr(c)}
