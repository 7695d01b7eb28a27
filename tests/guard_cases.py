"""Policies, vocabularies and plain-Python oracles that the engine-free tests share."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import regex

from streamguard.compiler.forms import read_character, readings
from streamguard.compiler.mapping import Mapping, is_word_character
from streamguard.compiler.program import Program, compile_program
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.policy import NORMAL_FORMS, Policy, PolicySet, Rule
from streamguard.session import Session
from streamguard_kernels.reference import find_matches, spellings

BLOCKING = ("mask", "halt", "redirect")
#: Characters that fold to others, to several, to shorter ones, or join and part words.
ODD = "aAbBoOmMsSkK ß İ \u212a ſ ﬁ é ́ - _ . 1 😀 中 бо Σ ς \n\u200b\u00ad0|!ｂⓜоᴍ…—í\U0001d41b"
EVERY_BYTE = tuple(bytes([byte]) for byte in range(256))
#: Vocabulary that most hand-made tests use: every byte, pieces of words, characters cut in two.
PIECES = (
    *EVERY_BYTE,
    *(piece.encode() for piece in "bo mb om bomb Bomb omb bomber _bomb -bomb".split()),
    *(piece.encode() for piece in (" bomb", "bomb ", " bomb.", "b o", " ", "  ", "ss", "straße")),
    *(piece.encode() for piece in "ß İ \u212a ﬁ é e\u0301 \u0301 中文 😀b".split()),
    b"\xf0\x9f", b"\x98\x80", b"\x80bo", b"\xc3", b"\x9fbo", b"mb\xe4", b"b\xff", b"",
)  # fmt: skip
SPECIALS = (b"<s>", b"</s>", b"<bomb>", b"om", b" ")


def rule(
    action: str,
    *literals: str,
    case: bool = False,
    word: bool = False,
    forms: Sequence[str] = (),
    regexes: Sequence[str] = (),
    validate: str = "",
) -> dict[str, Any]:
    """One rule of a policy file."""
    return {
        "action": action,
        **({"literals": list(dict.fromkeys(literals))} if literals else {}),
        **({"regexes": list(dict.fromkeys(regexes))} if regexes else {}),
        **({"validate": validate} if validate else {}),
        "normalize": ["case"] if case else list(forms),
        "boundary": "word" if word else "none",
        **({"message": "no"} if action == "redirect" else {}),
    }


def policy(*rules: dict[str, Any], name: str = "default") -> Policy:
    numbered = [{"id": f"r{i}", **r} for i, r in enumerate(rules)]
    return Policy.from_dict({"version": 1, "name": name, "rules": numbered})


def program(policies: Policy | Iterable[Policy], vocabulary: Vocabulary | None = None) -> Program:
    policies = [policies] if isinstance(policies, Policy) else policies
    return compile_program(PolicySet.from_policies(policies), vocabulary)


def vocabulary(tokens: Sequence[bytes], specials: Sequence[bytes] = SPECIALS) -> Vocabulary:
    """Ordinary tokens, then special ones; the second special one ends a text."""
    flags = np.array([0] * len(tokens) + [1] * len(specials), np.uint8)
    return Vocabulary((*tokens, *specials), flags, (len(tokens) + 1,) if len(specials) > 1 else ())


def distinct(literals: Iterable[str], forms: Sequence[str]) -> list[str]:
    """One literal of each that are one after these normal forms; a rule refuses the others."""
    ordered = tuple(form for form in NORMAL_FORMS if form in forms)
    found = {next(iter(readings(text, ordered)), ""): text for text in literals}
    return [text for read, text in found.items() if read]


#: Sets of normal forms that random rules draw from; each takes time to make tables for.
FORMS: tuple[tuple[str, ...], ...] = (
    *((form,) for form in NORMAL_FORMS), ("case", "confusables"), ("zero-width", "separators"),
    ("case", "leet", "separators"), NORMAL_FORMS,
)  # fmt: skip


def random_forms(rng: random.Random) -> tuple[str, ...]:
    return () if rng.random() < 0.3 else rng.choice(FORMS)


def random_rules(
    rng: random.Random,
    literals: Sequence[str],
    num_rules: int,
    draw_forms: Callable[[random.Random], tuple[str, ...]] | None = None,
) -> list[dict[str, Any]]:
    """Rules with every action and mapping over the given literals."""
    draw_forms = draw_forms or random_forms
    rules = []
    while len(rules) < num_rules:
        forms = draw_forms(rng)
        chosen = distinct(rng.sample(literals, min(len(literals), rng.randint(1, 4))), forms)
        if chosen:
            word = rng.random() < 0.4
            action = rng.choice([*BLOCKING, "observe"])
            rules.append(rule(action, *chosen, forms=forms, word=word))
    return rules


def random_regex_rules(
    rng: random.Random, regexes: Sequence[str], num: int
) -> list[dict[str, Any]]:
    """Rules with every action over the given regexes."""
    return [
        rule(
            rng.choice([*BLOCKING, "observe"]), case=rng.random() < 0.3, word=rng.random() < 0.2,
            regexes=rng.sample(regexes, min(len(regexes), rng.randint(1, 3))),
        )
        for _ in range(num)
    ]  # fmt: skip


def regex_near(rng: random.Random, literal: str) -> str:
    """A regex that matches a literal, mostly, and more."""
    parts = []
    for c in literal:
        plain = re.escape(c)
        forms = [f"{plain}+", f"(?:{plain}|x)", ".", f"[^q{re.escape(rng.choice(literal))}]"]
        forms += [f"{plain}?", r"\w" if is_word_character(c) else r"\W", f"(?:{plain}){{1,3}}"]
        parts.append(plain if rng.random() < 0.7 else rng.choice(forms))
    start, end = rng.choice(["", "", "", r"\b", r"\B"]), rng.choice(["", "", "", r"\b", r"\B"])
    return start + "".join(parts) + end


def random_text(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(1, length)))


def split_bytes(
    rng: random.Random, data: bytes, pieces: set[bytes], longest: int = 6
) -> list[bytes]:
    """Cut `data` at random; every part is a token of `pieces` (which holds every byte)."""
    parts = []
    while data:
        size = rng.randint(1, longest)
        while data[:size] not in pieces:
            size -= 1
        parts.append(data[:size])
        data = data[size:]
    return parts


def decode(data: bytes, final: bool = False) -> str:
    """What a client has read of `data`: unfinished characters are not shown before the end."""
    if not final:
        for size in (1, 2, 3):
            try:
                data[-size:].decode()
            except UnicodeDecodeError as error:
                # Not Python's incremental decoder: it waits for the third byte of a surrogate.
                if error.start == 0 and error.reason == "unexpected end of data":
                    data = data[:-size]
                    break
    return data.decode(errors="replace")


def characters_of(data: bytes) -> list[tuple[str, int]]:
    """The characters that a client reads of `data`, and where in it each ends."""
    found: list[tuple[str, int]] = []
    at = 0
    while at < len(data):
        for size in (1, 2, 3, 4):  # one whole character, or the longest start of one
            try:
                character = data[at : at + size].decode()
                break
            except UnicodeDecodeError as error:
                if error.reason != "unexpected end of data" or size == 4:
                    size = max(error.end - error.start, 1) if size == 1 else size - 1
                    character = "\ufffd"
                    break
                if at + size >= len(data):
                    character = "\ufffd"
                    break
        at = min(at + size, len(data))
        found.append((character, at))
    assert "".join(c for c, _ in found) == data.decode(errors="replace")
    return found


@lru_cache(maxsize=100_000)
def _before_rest(engine: Any, pattern: str, flags: int, rest: int) -> Any:
    """Matches that leave exactly `rest` characters: the engine then tries every way to match."""
    return engine.compile(f"(?:{pattern})(?=(?s:.{{{rest}}})\\Z)", flags)


def luhn_holds(text: str) -> bool:
    """Whether the digits of a text are a number that Luhn's formula accepts, as its patent has it."""
    digits = [int(c) for c in text if c in "0123456789"]
    doubled = [int(c) for digit in digits[-2::-2] for c in str(2 * digit)]
    others = any(c.isdecimal() and not c.isascii() for c in text)
    return bool(digits) and not others and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def iban_holds(text: str) -> bool:
    """Whether the letters and digits of a text are of an IBAN's form and 1 modulo 97."""
    kept = "".join(c for c in text if is_word_character(c) and c != "_")
    if not re.fullmatch("[A-Za-z]{2}[0-9]{2}[A-Za-z0-9]+", kept):
        return False
    return int("".join(str(int(c, 36)) for c in kept[4:] + kept[:4])) % 97 == 1


#: Validators of regexes: whether the text of a match counts.
HOLDS: dict[str | None, Callable[[str], bool]] = {"luhn": luhn_holds, "iban": iban_holds}


def regex_ends(
    text: str, pattern: str, *, case: bool = False, word: bool = False, validate: str | None = None
) -> set[int]:
    """Where in a whole text a match of a regex ends, by Python's `re` from every start.

    By `regex` in texts with marks and joiners, which are parts of words to it as they are to us.
    """
    same_words = all(is_word_character(c) == (c.isalnum() or c == "_") for c in text)
    engine = re if same_words else regex
    found = set()
    for end in range(1, len(text) + 1):
        if word and end < len(text) and is_word_character(text[end]):
            continue
        compiled = _before_rest(engine, pattern, re.IGNORECASE if case else 0, len(text) - end)
        one_by_one = word or validate
        for start in range(end) if one_by_one else range(1):
            if word and start > 0 and is_word_character(text[start - 1]):
                continue
            if validate and not HOLDS[validate](text[start:end]):
                continue
            if (compiled.match if one_by_one else compiled.search)(text, start):
                found.add(end)
                break
    return found


def certain_ends(
    text: str, pattern: str, *, case: bool, word: bool, validate: str | None = None
) -> set[int]:
    """The same for a text that may go on: whatever comes next, a match ends there."""
    both = [
        regex_ends(text + c, pattern, case=case, word=word, validate=validate) for c in ("x", " ")
    ]
    return {end for end in both[0] & both[1] if end <= len(text)}


def matches(
    text: str, what: Rule, index: int = 0, *, ended: bool = True
) -> list[tuple[int, int, int]]:
    """(end, index, start) of a rule's matches by plain comparison, in characters.

    ended False = more may follow, so a word at the very end of the text is not yet one. start is -1
    where a regex ends.
    """
    ends: set[int] = set()
    for pattern in what.regexes:
        find = regex_ends if ended else certain_ends
        case, word = "case" in what.normalize, what.boundary == "word"
        ends |= find(text, pattern, case=case, word=word, validate=what.validate)
    found = _literal_matches(text, what, index, ended) if what.literals else []
    return [m for m in found if m[0] not in ends] + [(end, index, -1) for end in sorted(ends)]


def _literal_matches(text: str, what: Rule, index: int, ended: bool) -> list[tuple[int, int, int]]:
    mapping = Mapping(what.normalize, what.boundary)
    separators = "separators" in what.normalize
    return find_matches(
        text,
        [(index, read) for literal in what.literals for read in spelled(literal, what.normalize)],
        map_character=lambda c: read_character(c, what.normalize),
        is_word=is_word_character if mapping.wrap else None,
        separator=" " if separators else "",
        ended=ended,
    )


def spelled(literal: str, forms: tuple[str, ...]) -> list[str]:
    """What a literal may be read as, put together here anew from its characters."""
    cases = [literal]
    if {"case", "confusables"} <= set(forms):
        cases += [literal.casefold(), literal.upper(), literal.title()]
    found: list[str] = []
    for case in cases:
        letters: list[str] = []
        for character in case:
            read = read_character(character, forms)
            if letters and unicodedata.category(character)[0] == "M":
                letters[-1] += read
            else:
                letters.append(read)
        found += spellings(letters, " ") if "separators" in forms else ["".join(letters)]
    return list(dict.fromkeys(found))


def _parts(what: Rule) -> list[Rule]:
    literals = [replace(what, regexes=())] if what.literals else []
    return literals + [replace(what, literals=(), regexes=(one,)) for one in what.regexes]


class TextOracle:
    """What a session must report, by looking at the whole text again after every token."""

    def __init__(
        self, compiled: Program, policy_index: int, *, prompt: Sequence[int] = (),
        hidden: bool = True, ends: Sequence[int] = (), show_end: bool = False,
    ) -> None:  # fmt: skip
        self.vocabulary = compiled.vocabulary
        name = compiled.policies[policy_index]
        # Each regex apart: two of one rule may find one end, at different characters.
        self.rules = [
            (number, i, part)
            for i, r in enumerate(compiled.rules)
            if r.policy == name
            for number, part in enumerate(_parts(r.rule))
        ]
        self.hidden, self.ends, self.show_end = hidden, set(ends), show_end
        self.prompt = b"".join(self._shown(token) for token in prompt)
        self.output = b""
        self.ended = False
        # A word that stands whole at the prompt's end is not the model's, whatever follows it.
        # A letter behind it tells of a regex's `\b` what the end of the text does not.
        text = decode(self.prompt, False)
        whole = {
            ("joined", n, *m)
            for n, i, part in self.rules
            for behind in ("", "x")
            for m in matches(text + behind, part, i)
            if m[0] <= len(text)
        }
        self._known = self._matches() | whole

    def _shown(self, token: int) -> bytes:
        if self.hidden and self.vocabulary.special[token]:
            return b""
        return self.vocabulary.token_bytes[token]

    def _matches(self) -> set[tuple[str, int, int, int, int]]:
        """Matches of the output read alone, and of prompt and output read as one text."""
        found = set()
        for reading, data in (("alone", self.output), ("joined", self.prompt + self.output)):
            text = decode(data, self.ended)
            for number, index, part in self.rules:
                new = matches(text, part, index, ended=self.ended)
                found |= {(reading, number, *m) for m in new}
        return found

    def feed(self, token: int, *, last: bool = False) -> set[int]:
        """Append a token; return the global indices of the rules that it completes."""
        ends = token in self.ends
        if not ends or self.show_end:
            self.output += self._shown(token)
        self.ended = ends or last
        found = self._matches() - self._known
        self._known |= found
        return {index for _, _, _, index, _ in found}


def fill(session: Session, slot: int, tokens: Iterable[int]) -> None:
    """Commit tokens one after another."""
    listed = list(tokens)
    session.advance([slot] * len(listed), listed)
