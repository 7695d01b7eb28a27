"""The same text, tokens and literals on every machine: made from word lists and a seed.

The text is plain English prose from sentence patterns. The literals are what block lists hold: names,
and short phrases around nasty words; a list of n literals is the head of one long list, and some of
the first ten are planted in the text, so that every size sees hits. Two more lists are hard on purpose:
NEAR_MISSES, where most of the text's words begin a literal, and SINGLE_WORDS, with forty words of
which many are one token, to be masked in every row.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import seconds
from streamguard import Guard, Policy
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.demo_model import demo_model
from streamguard.row_guard import RowGuard
from streamguard.verdict import VerdictCodes

SEED = 20_240_607
RULES = 5
Pieces = tuple[list[list[bytes]], list[list[str]]]
ORDINARY, NEAR_MISSES, SINGLE_WORDS = "ordinary", "near misses", "40 single words"
#: Sentences without a planted literal for each one with it: one hit in about 300 tokens.
_PLANTED_EVERY = 25

# fmt: off
_NOUNS = (
    "river house city teacher garden letter window morning market child story road bridge winter "
    "friend answer machine village picture doctor engine question summer family kitchen island "
    "table library student message station mountain number reason paper language music field "
    "problem system book history water school company moment neighbour train field box lamp coat"
).split()
_ADJECTIVES = (
    "old quiet small bright cold simple careful early strange heavy green warm empty useful busy "
    "distant famous gentle narrow patient public ready serious sudden thin whole young local recent "
    "modern possible common clear deep dry fresh honest large light new"
).split()
_VERBS = (
    "finds shows keeps leaves opens follows carries builds reads writes reaches covers changes "
    "explains crosses watches remembers answers brings holds turns describes passes moves meets "
    "joins needs starts supports visits"
).split()
_PREPOSITIONS = "near behind above beyond under beside before after without against toward".split()
_OPENINGS = (
    "In the evening", "After a while", "According to the report", "Most of the time", "As a rule",
    "For this reason", "On the other hand", "Every other day", "At the end of the year", "However",
)
#: Words that the text never uses by itself, so that a literal ending in one never matches by chance.
_RARE = (
    "detonator cyanide forgery ransom smuggling counterfeit extortion sabotage poisoning overdose "
    "arson ambush burglary shrapnel nitrate fentanyl gunpowder hostage lockpick malware mercury "
    "napalm nightshade payload phishing ricin rootkit sedative silencer spyware tripwire trojan "
    "venom warhead keylogger blackmail botnet bribery embezzlement explosive firebomb forgeries "
    "grenade hemlock hijacking incendiary kidnapping laundering landmine larceny methanol narcotic "
    "perjury pipebomb piracy plutonium racketeering sarin skimming stiletto strychnine thallium "
    "toxin treason trespass uranium vandalism wiretap"
).split()
_IMPERATIVES = (
    "build buy make hide sell forge order plant send steal mix smuggle deploy inject launch obtain"
).split()
SYLLABLES = (
    "al an ar bel bor cal cor dan del dor el en fal fen gar gol har hel in jor kal ker lan lor mar "
    "mel mor nar nel or pan per quor ral ren sal sel tan tor ul van vel wor yan zel zor"
).split()
# fmt: on
_ENDINGS = ("x", "zine", "tek", "dryl", "quat")
#: As many literals of each kind stay the same for ever, so that records can be compared.
_FIRST = 10_000


def sentences(seed: int = SEED) -> Iterator[str]:
    """English sentences without end; one in _PLANTED_EVERY holds one of the first ten literals."""
    rng = random.Random(seed)
    planted = literals(10)

    def phrase() -> str:
        noun = rng.choice(_NOUNS)
        return f"the {rng.choice(_ADJECTIVES)} {noun}" if rng.random() < 0.5 else f"the {noun}"

    while True:
        parts = [phrase(), rng.choice(_VERBS), phrase()]
        if rng.random() < 0.6:
            parts += [rng.choice(_PREPOSITIONS), phrase()]
        if rng.random() < 0.3:
            parts += ["and", rng.choice(_VERBS), phrase()]
        if rng.randrange(_PLANTED_EVERY) == 0:
            literal = rng.choice(planted)
            parts.append("with " + (literal.upper() if rng.random() < 0.3 else literal))
        text = " ".join(parts)
        if rng.random() < 0.3:
            text = f"{rng.choice(_OPENINGS)}, {text}"
        yield text[0].upper() + text[1:] + rng.choice((".", ".", ".", "!", "?")) + " "


def literals(num_literals: int, kind: str = ORDINARY) -> tuple[str, ...]:
    """The first of one fixed list of distinct names and phrases; of another after the tenth.

    A million take some ten seconds. Raises ValueError beyond what the words of NEAR_MISSES combine to.
    """
    if kind == NEAR_MISSES and num_literals > 100_000:
        raise ValueError(f"{num_literals:,} near misses wanted; the words make 100,000 at most.")
    known, more = _drawn(kind)
    known.extend(islice(more, max(0, num_literals - len(known))))
    return tuple(known[:num_literals])


@lru_cache
def _drawn(kind: str) -> tuple[list[str], Iterator[str]]:
    """What has been drawn of a kind so far, and where more comes from."""
    return [], _distinct_literals(kind)


def _distinct_literals(kind: str) -> Iterator[str]:
    rng = random.Random(SEED + 1)

    def name() -> str:
        stem = "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3, 3))))
        return stem.capitalize() + rng.choice(_ENDINGS)

    def ordinary() -> str:
        choice = rng.randrange(8)
        rare = rng.choice(_RARE)
        if choice < 3:
            return name()
        if choice == 3:
            return f"{rng.choice(_ADJECTIVES)} {rare}"
        if choice == 4:
            return f"{rare} {rng.choice(_NOUNS)}"
        if choice == 5:
            return f"{rng.choice(_IMPERATIVES)} {rng.choice(('a', 'some', 'the', 'your'))} {rare}"
        if choice == 6:
            return f"{rare} {rng.choice(_RARE)}"
        return f"{name()} {rare}"

    def near_miss() -> str:
        first = rng.choice(rng.choice((_ADJECTIVES, _NOUNS)))
        if rng.random() < 0.3:
            first = f"{rng.choice(_VERBS)} the {first}"
        return f"{first} {rng.choice(_RARE)}"

    def one_of_a_million() -> str:
        """Phrases of dictionary words run out: names, mostly with a word. Quicker draws, too."""
        draw = rng.random
        stem = "".join([SYLLABLES[int(draw() * len(SYLLABLES))] for _ in range(3)])
        word = stem.capitalize() + _ENDINGS[int(draw() * len(_ENDINGS))]
        return f"{word} {_RARE[int(draw() * len(_RARE))]}" if draw() < 0.75 else word

    seen: set[str] = set()
    while True:
        if len(seen) >= 10 and kind == NEAR_MISSES:
            literal = near_miss()
        elif 10 <= len(seen) < 50 and kind == SINGLE_WORDS:
            literal = _RARE[len(seen) - 10]
        else:
            literal = ordinary() if len(seen) < _FIRST else one_of_a_million()
        if literal not in seen:
            seen.add(literal)
            yield literal


def stretches(tokens: NDArray[np.int64], batch: int, num_steps: int) -> NDArray[np.int64]:
    """int64[num_steps, batch]: each column a stretch of the tokens, from the start if they end."""
    laid_out = np.resize(tokens, batch * num_steps).reshape(batch, num_steps)
    return np.ascontiguousarray(laid_out.T)


def rule_of(literal: int) -> int:
    """Which rule of `policy` the literal of this index belongs to."""
    return literal % RULES


def _policy_content(
    num_literals: int, action: str, name: str, forms: Sequence[str], kind: str
) -> dict[str, Any]:
    """RULES rules share the literals out among them; clients may choose the policy by name."""
    chosen = literals(num_literals, kind)
    return {
        "version": 1,
        "name": name,
        "client_selectable": True,
        "rules": [
            {
                "id": f"rule-{rule}",
                "category": "custom",
                "literals": list(chosen[rule::RULES]),
                "normalize": list(forms),
                "action": action,
            }
            for rule in range(RULES)
        ],
    }


def policy_text(num_literals: int, action: str, name: str) -> str:
    """A policy file with its literals in it."""
    content = _policy_content(num_literals, action, name, (), ORDINARY)
    return json.dumps(content)  # YAML is a superset of JSON


def policy_file(num_literals: int, action: str, folder: Path) -> Path:
    """Write a policy file and a literals file for each of its rules into a folder."""
    content = _policy_content(num_literals, action, "bench", (), ORDINARY)
    for rule in content["rules"]:
        listed = folder / f"{rule['id']}.txt"
        listed.write_text("\n".join(rule.pop("literals")) + "\n")
        rule["literals_file"] = listed.name
    path = folder / "policy.yaml"
    path.write_text(json.dumps(content))
    return path


def policy(
    num_literals: int, action: str, *, forms: Sequence[str] = (), kind: str = ORDINARY
) -> Policy:
    """The same as an object, named bench, also under normal forms or of another kind of list."""
    return Policy.from_dict(_policy_content(num_literals, action, "bench", forms, kind))


@dataclass(frozen=True)
class Workload:
    """A tokenizer and the tokens of the text."""

    tokenizer: Any
    vocabulary: Vocabulary

    @classmethod
    def load(cls) -> Workload:
        """SmolLM2's tokenizer: byte-level BPE, 49,152 tokens."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(demo_model()))
        return cls(tokenizer, Vocabulary.from_tokenizer(tokenizer))

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """int64[num_tokens]: about 60,000 tokens of text."""
        text = "".join(islice(sentences(), 5_000))
        return np.array(self.tokenizer.encode(text, add_special_tokens=False), np.int64)

    def stream(self, batch: int, num_steps: int) -> NDArray[np.int64]:
        """int64[num_steps, batch]: each column is a text of its own, a stretch of `tokens`."""
        return stretches(self.tokens, batch, num_steps)

    def token_pieces(self, stream: NDArray[np.int64], *, lower: bool = False) -> Pieces:
        """The bytes of each token of a stream, and the same as latin-1 text, for the peers.

        lower  the text in lower case, for pyahocorasick, which cannot ignore case.
        """
        rows = [[self.vocabulary.token_bytes[t] for t in row] for row in stream.tolist()]
        texts = [
            [(piece.lower() if lower else piece).decode("latin-1") for piece in row] for row in rows
        ]
        return rows, texts

    def guard(
        self, num_literals: int, action: str, *, case: bool = False, kind: str = ORDINARY
    ) -> Guard:
        """The compiled policy over this vocabulary."""
        return self.timed_guard(num_literals, action, case=case, kind=kind)[0]

    def timed_guard(
        self, num_literals: int, action: str, *, case: bool = False, kind: str = ORDINARY
    ) -> tuple[Guard, float]:
        """The same, and the CPU seconds that compiling took."""
        chosen = policy(num_literals, action, forms=("case",) if case else (), kind=kind)
        guards: list[Guard] = []
        spent = seconds(lambda: guards.append(Guard(chosen, self.vocabulary)))
        return guards[0], spent


@lru_cache(maxsize=1)
def shared() -> Workload:
    """One workload per process."""
    return Workload.load()


def row_guard(guard: Guard, batch: int) -> RowGuard:
    """What the engine's host path drives, with texts without end in slots 0..batch."""
    tokenizer = shared().tokenizer
    codes = VerdictCodes.from_table(
        guard.program.table,
        lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
        lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=False)),
    )
    rows = RowGuard(guard.program, codes, batch)
    for slot in range(batch):
        rows.admit(slot, (), policy="bench", max_tokens=1 << 40)
    return rows
