"""Spellings that get round a plain list, and which normal form finds each.

    python tests/test_evasions.py    # the table of the README

The families are those of garak's probes of bad characters, homoglyphs and encodings, with cases of
our own. A case names the forms that claim it; `UNCLAIMED` are encodings that no form claims.
"""

from __future__ import annotations

import base64
import codecs
import random
import unicodedata
from collections.abc import Callable

import pytest
from guard_cases import EVERY_BYTE, policy, program, rule, split_bytes, vocabulary
from test_scanner import scan

from streamguard.policy import NORMAL_FORMS
from streamguard.session import Session

WORDS = ("bomb", "kill him", "Coca-Cola", "password", "TANGO-7431", "carbon dioxide")
Spell = Callable[[str], str]


def each(replace: dict[str, str] | Callable[[str], str]) -> Spell:
    """Replace every character."""
    one = (lambda c: replace.get(c, c)) if isinstance(replace, dict) else replace
    return lambda word: "".join(map(one, word))


def after_each(sign: str) -> Spell:
    return each(lambda c: c + sign)


def between(sign: str) -> Spell:
    """A sign between all letters, none but that between words."""
    return lambda word: sign.join(c for c in word if c not in " -")


def table(plain: str, odd: str | list[str]) -> dict[str, str]:
    return dict(zip(plain, odd, strict=True))


def alphabet(small: int, capital: int | None = None, digit: int | None = None) -> dict[str, str]:
    """Letters from a block of Unicode; capitals stay if none are given."""
    found = {chr(97 + i): chr(small + i) for i in range(26)}
    if capital:
        found |= {chr(65 + i): chr(capital + i) for i in range(26)}
    if digit:
        found |= {chr(48 + i): chr(digit + i) for i in range(10)}
    return found


def letters(first: int) -> dict[str, str]:
    """Capitals for both cases."""
    return alphabet(first, first)


def named(name: str) -> Spell:
    """The letters that Unicode gives such a name, as far as there are any."""

    def one(c: str) -> str:
        try:
            kind = "SMALL" if c.islower() else "CAPITAL"
            return unicodedata.lookup(f"{name} {kind} {c.upper()}") if c.isascii() else c
        except KeyError:
            return c

    return each(one)


def zalgo(word: str) -> str:
    rng = random.Random(word)
    marks = [chr(c) for c in range(0x300, 0x36F) if unicodedata.category(chr(c)) == "Mn"]
    return "".join(c + "".join(rng.choices(marks, k=4)) for c in word)


def alternating(word: str) -> str:
    return "".join(c.upper() if i % 2 else c.lower() for i, c in enumerate(word))


def tagged(word: str) -> str:
    """Hide a message in tag characters within the word."""
    return "".join(
        c + chr(0xE0000 + ord(x)) for c, x in zip(word, "hello, reader " * 2, strict=False)
    )


CYRILLIC = table("aceopxyiskmthbABCEHKMOPTXdgr", "асеорхуіѕкмтһьАВСЕНКМОРТХԁɡг")
GREEK = table("aoivutpyABEHIKMNOPTXYZ", "αοινυτργΑΒΕΗΙΚΜΝΟΡΤΧΥΖ")
SMALL_CAPITALS = table("abcdefghijklmnoprstuvwyz", "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ")
FLAGS, BOXES = letters(0x1F1E6), letters(0x1F170)
FULL_WIDTH = alphabet(0xFF41, 0xFF21, 0xFF10) | {" ": "\u3000", "-": "－"}
LEET = table("aeiostgblAEOTGI", "431057981430791")
SIGNS = table("aislteo", "@!$|+€0")

Case = tuple[tuple[str, ...], Spell]
EVASIONS: dict[str, Case] = {
    "capitals": (("case",), str.upper),
    "alternating case": (("case",), alternating),
    "full width": (("width",), each(FULL_WIDTH)),
    "mathematical bold": (("width",), each(alphabet(0x1D41A, 0x1D400, 0x1D7CE))),
    "mathematical fraktur": (("width",), each(alphabet(0x1D586, 0x1D56C))),
    "mathematical sans": (("width",), each(alphabet(0x1D5BA, 0x1D5A0, 0x1D7E2))),
    "monospace": (("width",), each(alphabet(0x1D68A, 0x1D670, 0x1D7F6))),
    "double-struck": (("width",), named("MATHEMATICAL DOUBLE-STRUCK")),
    "circled": (("width",), each(alphabet(0x24D0, 0x24B6))),
    "in brackets": (("width",), each(alphabet(0x249C))),
    "modifier letters": (("width",), named("MODIFIER LETTER")),
    "black boxes": (("case", "width"), each(BOXES)),
    "flag letters": (("case", "width"), each(FLAGS)),
    "squared": (("case", "width"), each(letters(0x1F130))),
    "zero-width space": (("zero-width",), after_each("\u200b")),
    "zero-width non-joiner": (("zero-width",), after_each("\u200c")),
    "zero-width joiner": (("zero-width",), after_each("\u200d")),
    "word joiner": (("zero-width",), after_each("\u2060")),
    "byte order mark": (("zero-width",), after_each("\ufeff")),
    "soft hyphen": (("zero-width",), after_each("\u00ad")),
    "bidi marks": (("zero-width",), after_each("\u200e\u200f")),
    "bidi overrides": (("zero-width",), each(lambda c: f"\u202d{c}\u202c")),
    "bidi isolates": (("zero-width",), each(lambda c: f"\u2066{c}\u2069")),
    "tag characters": (("zero-width",), tagged),
    "variation selectors": (("zero-width",), after_each("\ufe0f")),
    "more variation selectors": (("zero-width",), after_each("\U000e0121")),
    "grapheme joiner": (("zero-width",), after_each("\u034f")),
    "Mongolian vowel separator": (("zero-width",), after_each("\u180e")),
    "Hangul filler": (("zero-width",), after_each("\u3164")),
    "invisible times": (("zero-width",), after_each("\u2062")),
    "backspaces": (("zero-width",), after_each("\b")),
    "NUL and DEL": (("zero-width",), after_each("\0\x7f")),
    "Cyrillic": (("confusables",), each(CYRILLIC)),
    "Greek": (("case", "confusables"), each(GREEK)),
    "small capitals": (("confusables",), each(SMALL_CAPITALS)),
    "Roman numerals": (("confusables",), each(table("icdlmvxIC", "ⅰⅽⅾⅼⅿⅴⅹⅠⅭ"))),
    "phonetic letters": (("confusables",), each(table("agiouy", "ɑɡɩᴏʋʏ"))),
    "rn for m": (("confusables",), each({"m": "rn"})),
    "I for l": (("confusables",), each({"l": "I"})),
    "capital I for l, 1 for i": (("case", "confusables"), each({"l": "I", "i": "1"})),
    "Armenian and Cherokee": (("case", "confusables"), each(table("oswdTAC", "օѕԝԁᎢᎪᏟ"))),
    "acute accents": (("marks",), after_each("\u0301")),
    "zalgo": (("marks",), zalgo),
    "struck out": (("marks",), after_each("\u0336")),
    "enclosing circles": (("marks",), after_each("\u20dd")),
    "letters with accents": (("marks",), each(table("aeioucn", "áèîöůçñ"))),
    "leet digits": (("leet",), each(LEET)),
    "leet signs": (("leet",), each(SIGNS)),
    "leet, i and l alike": (("leet",), each(table("ilo", "l10"))),
    "spaced": (("separators",), between(" ")),
    "dotted": (("separators",), between(".")),
    "dashed": (("separators",), between("-")),
    "underscores": (("separators",), between("_")),
    "middle dots": (("separators",), between("·")),
    "slashes": (("separators",), between("/")),
    "a line each": (("separators",), between("\n")),
    "wide gaps": (("separators",), between("  .  ")),
    "no-break spaces": (("separators",), between("\u00a0")),
    "em dashes": (("separators",), between("—")),
    "doubled spaces": (("separators",), lambda w: w.replace(" ", "  ").replace("-", " - ")),
    "missing spaces": (("separators",), lambda w: w.replace(" ", "").replace("-", "")),
    "line breaks": (("separators",), lambda w: w.replace(" ", "\r\n").replace("-", "-\n")),
    "full width, spaced": (("width", "separators"), lambda w: between(" ")(each(FULL_WIDTH)(w))),
    "leet, dotted": (("leet", "separators"), lambda w: between(".")(each(LEET)(w))),
    "Cyrillic, zero-width": (
        ("zero-width", "confusables"), lambda w: after_each("\u200b")(each(CYRILLIC)(w)),
    ),
    "zalgo, spaced, leet": (
        ("leet", "marks", "separators"), lambda w: after_each("\u0335\u0301")(between(" ")(each(LEET)(w))),
    ),
    "circled, soft hyphens": (
        ("width", "zero-width"), lambda w: after_each("\u00ad")(each(alphabet(0x24D0, 0x24B6))(w)),
    ),
    "everything": (
        NORMAL_FORMS,
        lambda w: between(" \u200b- ")(after_each("\u0301\ufe0f")(each(GREEK)(each(LEET)(w.upper())))),
    ),
}  # fmt: skip
MORSE = table(
    "bomkilhrnadxesp",
    "-... --- -- -.- .. .-.. .... .-. -. .- -.. -..- . ... .--.".split(),
)
UNCLAIMED: dict[str, Spell] = {
    "base64": lambda w: base64.b64encode(w.encode()).decode(),
    "base32": lambda w: base64.b32encode(w.encode()).decode(),
    "hexadecimal": lambda w: w.encode().hex(),
    "rot13": lambda w: codecs.encode(w, "rot13"),
    "reversed": lambda w: w[::-1],
    "atbash": lambda w: each({chr(97 + i): chr(122 - i) for i in range(26)})(w.lower()),
    "Morse": lambda w: " ".join(MORSE.get(c, c) for c in w.lower()),
    "percent encoding": lambda w: "".join(f"%{byte:02x}" for byte in w.encode()),
    "HTML entities": lambda w: "".join(f"&#{ord(c)};" for c in w),
    "upside down": lambda w: each(table("abcdeghiklmnoprstw", "ɐqɔpǝɓɥᴉʞlɯuodɹsʇʍ"))(w.lower())[::-1],
    "letters doubled": lambda w: "".join(2 * c for c in w),
    "first letter moved": lambda w: w[1:] + w[0],
}  # fmt: skip


def spelled(spell: Spell) -> dict[str, str]:
    """The words that it changes, and what it makes of them."""
    return {word: spell(word) for word in WORDS if spell(word) != word}


def caught(forms: tuple[str, ...], texts: dict[str, str]) -> int:
    """How many of the texts hold their word under these forms."""
    compiled = program(policy(*(rule("halt", word, forms=forms) for word in WORDS)))
    found = 0
    for word, text in texts.items():
        rules = {match.rule for match in scan(compiled, f"so {text} it".encode())}
        found += WORDS.index(word) in rules
    return found


def evasion_table() -> list[tuple[str, int, dict[str, int]]]:
    """(family, number of spellings, spellings caught by each form alone and by all together).

    Families are named by the forms that claim them.
    """
    rows: dict[str, tuple[int, dict[str, int]]] = {}
    columns = {"none": (), **{form: (form,) for form in NORMAL_FORMS}, "all": NORMAL_FORMS}
    cases = {name: (" + ".join(forms), spell) for name, (forms, spell) in EVASIONS.items()}
    cases |= {name: ("encodings", spell) for name, spell in UNCLAIMED.items()}
    for family, spell in cases.values():
        family = "combined" if "+" in family else family
        texts = spelled(spell)
        number, counts = rows.setdefault(family, (0, dict.fromkeys(columns, 0)))
        for column, forms in columns.items():
            counts[column] += caught(forms, texts)
        rows[family] = number + len(texts), counts
    order = (*NORMAL_FORMS, "combined", "encodings")
    return [(family, *rows[family]) for family in order]


def test_there_are_many_evasions_of_every_form() -> None:
    assert len(EVASIONS) >= 40
    for form in NORMAL_FORMS:
        assert sum(form in forms for forms, _ in EVASIONS.values()) > 1
    assert all(spelled(spell) for _, spell in EVASIONS.values())


@pytest.mark.parametrize("boundary", ["none", "word"])
@pytest.mark.parametrize("name", EVASIONS)
def test_what_a_form_claims_is_caught_at_every_split(name: str, boundary: str, seed: int) -> None:
    forms, spell = EVASIONS[name]
    rng = random.Random(f"{seed} {name}")
    texts = {word: f"so {text} it" for word, text in spelled(spell).items()}
    pieces = set(EVERY_BYTE)
    for text in texts.values():
        data = text.encode()
        cuts = [sorted(rng.choices(range(len(data) + 1), k=2)) for _ in range(40)]
        pieces |= {data[a:b] for a, b in cuts if a < b <= a + 12}
    tokens = sorted(pieces)
    number = {piece: i for i, piece in enumerate(tokens)}
    word_rules = [rule("halt", word, forms=forms, word=boundary == "word") for word in WORDS]
    for more in (forms, NORMAL_FORMS):  # whatever else a rule asks for
        rules = [{**r, "normalize": list(more)} for r in word_rules]
        session = Session(program(policy(*rules), vocabulary(tokens)), 1)
        for word, text in texts.items():
            data = text.encode()
            splits = [[data[i : i + 1] for i in range(len(data))]]
            splits += [split_bytes(rng, data, pieces, 12) for _ in range(4)]
            for split in splits:
                session.reset(0)
                hits: set[int] = set()
                for piece in split:
                    session.advance([0], [number[piece]])
                    hits |= {index for _, index in session.events()}
                assert WORDS.index(word) in hits, (word, split, more)


@pytest.mark.parametrize("name", UNCLAIMED)
def test_encodings_that_no_form_claims_pass(name: str) -> None:
    # Not wished for, but said: who expects them to be caught should read it here.
    assert caught(NORMAL_FORMS, spelled(UNCLAIMED[name])) == 0


def test_the_table_says_that_all_forms_together_catch_what_is_claimed() -> None:
    for family, number, counts in evasion_table():
        assert counts["none"] == 0
        assert counts["all"] == (0 if family == "encodings" else number)
        if family in NORMAL_FORMS:
            assert counts[family] == number


if __name__ == "__main__":
    rows = evasion_table()
    columns = list(rows[0][2])
    print(f"| spelling | cases | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 2) + "|")
    for family, number, counts in rows:
        print(f"| {family} | {number} | {' | '.join(str(counts[c]) for c in columns)} |")
