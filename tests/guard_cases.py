"""Policies, vocabularies and plain-Python oracles that the engine-free tests share."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from streamguard.compiler.mapping import Mapping, is_word_character
from streamguard.compiler.program import Program, compile_program
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.policy import Policy, PolicySet, Rule
from streamguard.session import Session
from streamguard_kernels.reference import find_matches

BLOCKING = ("mask", "halt", "redirect")
#: Characters that fold to others, to several, to shorter ones, or join and part words.
ODD = "aAbBoOmMsSkK ß İ \u212a ſ ﬁ é ́ - _ . 1 😀 中 бо Σ ς \n"
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


def rule(action: str, *literals: str, case: bool = False, word: bool = False) -> dict[str, Any]:
    """One rule of a policy file."""
    return {
        "action": action,
        "literals": list(dict.fromkeys(literals)),
        "normalize": ["case"] if case else [],
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


def random_rules(
    rng: random.Random, literals: Sequence[str], num_rules: int
) -> list[dict[str, Any]]:
    """Rules with every action and mapping over the given literals."""
    rules = []
    for _ in range(num_rules):
        case = rng.random() < 0.4
        chosen = rng.sample(literals, min(len(literals), rng.randint(1, 4)))
        # A rule refuses literals that are one after its normal forms.
        unique = {(text.casefold() if case else text): text for text in chosen}
        rules.append(
            rule(
                rng.choice([*BLOCKING, "observe"]), *unique.values(),
                case=case, word=rng.random() < 0.4,
            )
        )  # fmt: skip
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
    found = find_matches(
        text,
        [(index, literal) for literal in what.literals],
        map_character=mapping.fold,
        is_word=is_word_character if mapping.wrap else None,
    )
    return [m for m in found if ended or not mapping.wrap or m[0] < len(text)]


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
