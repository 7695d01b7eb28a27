"""Policies, vocabularies and plain-Python oracles that the engine-free tests share."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

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
    action: str, *literals: str, case: bool = False, word: bool = False, forms: Sequence[str] = ()
) -> dict[str, Any]:
    """One rule of a policy file."""
    return {
        "action": action,
        "literals": list(dict.fromkeys(literals)),
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


def matches(
    text: str, what: Rule, index: int = 0, *, ended: bool = True
) -> list[tuple[int, int, int]]:
    """(end, index, start) of a rule's matches by plain comparison, in characters.

    ended False = more may follow, so a word at the very end of the text is not yet one.
    """
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


class TextOracle:
    """What a session must report, by looking at the whole text again after every token."""

    def __init__(
        self, compiled: Program, policy_index: int, *, prompt: Sequence[int] = (),
        hidden: bool = True, ends: Sequence[int] = (), show_end: bool = False,
    ) -> None:  # fmt: skip
        self.vocabulary = compiled.vocabulary
        name = compiled.policies[policy_index]
        self.rules = [(i, r.rule) for i, r in enumerate(compiled.rules) if r.policy == name]
        self.hidden, self.ends, self.show_end = hidden, set(ends), show_end
        self.prompt = b"".join(self._shown(token) for token in prompt)
        self.output = b""
        self.ended = False
        # A word that stands whole at the prompt's end is not the model's, whatever follows it.
        text = decode(self.prompt, False)
        whole = {("joined", *m) for i, what in self.rules for m in matches(text, what, i)}
        self._known = self._matches() | whole

    def _shown(self, token: int) -> bytes:
        if self.hidden and self.vocabulary.special[token]:
            return b""
        return self.vocabulary.token_bytes[token]

    def _matches(self) -> set[tuple[str, int, int, int]]:
        """Matches of the output read alone, and of prompt and output read as one text."""
        found = set()
        for reading, data in (("alone", self.output), ("joined", self.prompt + self.output)):
            text = decode(data, self.ended)
            for index, what in self.rules:
                found |= {(reading, *m) for m in matches(text, what, index, ended=self.ended)}
        return found

    def feed(self, token: int, *, last: bool = False) -> set[int]:
        """Append a token; return the global indices of the rules that it completes."""
        ends = token in self.ends
        if not ends or self.show_end:
            self.output += self._shown(token)
        self.ended = ends or last
        found = self._matches() - self._known
        self._known |= found
        return {index for _, _, index, _ in found}


def fill(session: Session, slot: int, tokens: Iterable[int]) -> None:
    """Commit tokens one after another."""
    listed = list(tokens)
    session.advance([slot] * len(listed), listed)
