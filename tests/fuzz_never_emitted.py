"""Fuzz: whatever a guarded model samples, a client never reads a match.

    python tests/fuzz_never_emitted.py --steps 1000000

Texts are sampled under random policies for three kinds of tokenizers, from random logits that lean
towards spelling the patterns. Half of the rows avoid `Session.forbidden`; half do as the engine
does: `apply_mask`, sample, `peek`, stop on a hit. The oracle knows nothing of automata or token
bytes: it searches the text that vLLM's own detokenizer gives a client, by plain comparison.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from guard_cases import BLOCKING, matches, policy, random_rules, regex_near, rule
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

from streamguard.compiler.program import Program, compile_program
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.errors import PolicyError
from streamguard.holdback import HeldText, WordHold
from streamguard.policy import PolicySet
from streamguard.session import Session

logging.getLogger("vllm.v1.engine.detokenizer").setLevel(logging.ERROR)  # a warning a restart

KINDS = ("byte_level_bpe", "byte_fallback", "unigram")
NUM_ROWS = 64
MOST_TOKENS = 40
#: What patterns are made of beside the tokens' own texts.
UNICODE = "😀 中文 é e\u0301 ß İ \u212a ﬁ б 💣 \u200d ſ - о ｂ 0 … \u200b".split(" ")
#: What an evader puts between letters, and in place of them.
BETWEEN = (" ", ".", "-", "\n", "  ", "\u200b", "\u00ad", "\u0301")
INSTEAD = {
    "a": "4а@",
    "b": "8ｂ",
    "e": "3еé",
    "i": "1l!",
    "l": "1I|",
    "o": "0оⓞ",
    "s": "$5",
    "m": "ᴍ",
}


@dataclass
class Counts:
    """What a run did; `violations` describes each text in which a match was found."""

    steps: int = 0
    texts: int = 0
    characters: int = 0
    policies: int = 0
    patterns: int = 0
    near_misses: int = 0  # the model's choice would have completed a match
    masked: int = 0  # ... and a mask (or `forbidden`) made it choose another token
    halted: int = 0  # ... and the text was ended instead
    stuck: int = 0  # no token was left
    ended: int = 0  # by an end token
    full: int = 0  # by max_tokens
    odd_bytes: int = 0  # texts with broken UTF-8
    resets: int = 0  # texts in which vLLM's detokenizer had to start over
    withheld: int = 0  # texts that ended with a word withheld
    beside_broken: int = 0  # words that a broken run of byte tokens parts from their neighbours
    violations: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, int]]:
        found = [(f.name.replace("_", " "), getattr(self, f.name)) for f in fields(self)]
        return [*found[:-1], ("violations", len(self.violations))]


class Client(FastIncrementalDetokenizer):
    """vLLM's detokenizer as the plugin leaves it: a restart shows that something was lost.

    Where broken bytes follow a character of byte tokens, vLLM's stream loses its place, starts over
    and drops them: "中" FF "b" would read as "中b", a match that nobody sampled.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], params: SamplingParams) -> None:
        request = SimpleNamespace(
            sampling_params=params, request_id="fuzz", prompt_token_ids=prompt
        )
        super().__init__(tokenizer, request)
        self.num_resets = 0

    def _protected_step(self, next_token_id: int) -> str | None:
        before = self.stream
        text = super()._protected_step(next_token_id)
        if self.stream is before:
            return text
        self.num_resets += 1
        return "\ufffd" + (text or "")


@dataclass
class Text:
    """One row of the batch."""

    prompt: list[int]
    ends: tuple[int, ...]
    show_end: bool
    params: SamplingParams
    max_tokens: int
    avoids: bool  # takes `forbidden` tokens out, instead of acting as the engine does
    wish: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    outcome: str = ""
    held: HeldText | None = None


class Model:
    """A tokenizer with random logits that lean towards spelling what they are told to."""

    def __init__(self, path: Path, rng: random.Random, noise: np.random.Generator) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.vocabulary = Vocabulary.from_tokenizer(self.tokenizer)
        self.rng, self.noise = rng, noise
        self.of_bytes: dict[bytes, list[int]] = {}
        for i, piece in enumerate(self.vocabulary.token_bytes):
            if piece and not self.vocabulary.special[i]:
                self.of_bytes.setdefault(piece, []).append(i)
        self.texts = [piece.decode() for piece in self.of_bytes if _is_whole(piece)]
        self.has_byte_tokens = "<0x00>" in self.tokenizer.get_vocab()
        self.special = np.flatnonzero(self.vocabulary.special).tolist()
        self.longest = max(map(len, self.of_bytes))

    def literals(self) -> list[str]:
        """Patterns that the tokenizer is likely to come close to."""
        rng = self.rng
        made = []
        for _ in range(rng.choice([2, 6, 6, 40])):
            parts = rng.choices(self.texts, k=rng.randint(1, 3))
            if rng.random() < 0.4:
                parts.insert(rng.randrange(len(parts) + 1), rng.choice(UNICODE))
            whole = "".join(parts)
            if len(whole) > 2 and rng.random() < 0.5:
                whole = whole[rng.randint(0, 1) : len(whole) - rng.randint(0, 1)]
            if len(whole) > 1 or rng.random() < 0.1:
                made.append(whole)
        if len(made) > 1 and rng.random() < 0.5:  # overlapping and nested ones
            made += [made[0][-2:] + made[1], made[0] + made[1][:1], made[1][1:]]
        clean = [text for text in dict.fromkeys(made) if text and "\ufffd" not in text]
        return clean or ["bomb"]

    def spell(self, literal: str) -> list[int]:
        """Tokens that spell a literal, or nearly so, cut anywhere."""
        rng = self.rng
        if rng.random() < 0.3:
            literal = rng.choice([literal.upper(), literal.lower(), literal.casefold()])
        if rng.random() < 0.3:
            literal = "".join(
                rng.choice(INSTEAD[c]) if c in INSTEAD and rng.random() < 0.3 else c
                for c in literal
            )
        if rng.random() < 0.3:
            literal = rng.choice(BETWEEN).join(literal)
        if rng.random() < 0.3:
            literal += rng.choice(self.texts)
        if rng.random() < 0.3:
            literal = rng.choice([" ", "-", "é", ""]) + literal + rng.choice([" ", ".", "s", ""])
        data = literal.encode()
        if rng.random() < 0.1:
            at = rng.randrange(len(data) + 1)
            data = data[:at] + bytes([rng.choice(b"\xff\x80\xe4\xf0 ")]) + data[at:]
        tokens = []
        while data:
            size = rng.randint(1, self.longest)
            while size and data[:size] not in self.of_bytes:
                size -= 1
            if size:
                tokens.append(rng.choice(self.of_bytes[data[:size]]))
            data = data[size or 1 :]
            if self.special and rng.random() < 0.05:
                tokens.append(rng.choice(self.special))
        return tokens

    def begin(self, literals: list[str]) -> Text:
        """A new request."""
        rng = self.rng
        eos = self.vocabulary.eos_token_ids
        prompt = [self.special[0]] if self.special else []
        if rng.random() < 0.6 or not prompt:
            head = rng.choice(literals)
            prompt += self.tokenizer.encode(
                rng.choice(self.texts) + head[: rng.randint(0, len(head))], add_special_tokens=False
            )
        hide = rng.random() < 0.6
        return Text(
            prompt=prompt,
            ends=rng.choice([eos, eos, (), (*eos, *rng.sample(range(len(self.vocabulary)), 3))]),
            show_end=rng.random() < 0.3,
            params=SamplingParams(
                skip_special_tokens=hide, spaces_between_special_tokens=rng.random() < 0.8
            ),
            max_tokens=rng.randint(1, MOST_TOKENS),
            avoids=rng.random() < 0.5,
        )

    def logits(self, texts: list[Text], literals: list[str]) -> np.ndarray:
        """float32[len(texts), num_tokens]."""
        logits = self.noise.standard_normal((len(texts), len(self.vocabulary)), np.float32)
        for row, text in enumerate(texts):
            if not text.wish:
                text.wish = self.spell(self.rng.choice(literals))[::-1]
            if text.wish and self.rng.random() < 0.9:
                logits[row, text.wish.pop()] += 20
        return logits

    def read(self, text: Text, counts: Counts) -> tuple[str, str]:
        """What the client had written, and what it reads."""
        client = Client(self.tokenizer, text.prompt, text.params)
        unseen = text.outcome == "ended" and not text.show_end
        shown = text.tokens[: len(text.tokens) - unseen]
        if text.held is not None:  # what the frontend withheld to the end is never shown
            num_held = text.held.feed(shown)
            counts.withheld += num_held > 0
            shown = shown[: len(shown) - num_held]
        for token in shown:
            client.update([token], False)
        counts.resets += client.num_resets > 0
        decode = self.tokenizer._tokenizer.decode
        prompt = decode(text.prompt, skip_special_tokens=text.params.skip_special_tokens)
        return prompt, client.output_text


def _is_whole(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def regex_rules(rng: random.Random, literals: list[str]) -> list[tuple[dict[str, Any], str]]:
    """Some rules of one regex each, with a text that it matches, mostly."""
    found = []
    for text in rng.sample(literals, min(len(literals), rng.choice([0, 0, 1, 3]))):
        pattern = regex_near(rng, text)
        one = rule(rng.choice(BLOCKING), regexes=[pattern], word=rng.random() < 0.2)
        try:
            policy(one)
        except PolicyError:
            continue
        found.append((one, text))
    return found


def run_policy(model: Model, counts: Counts, *, guarded: bool = True) -> None:
    """Sample a batch of texts under one random policy to their ends, then look at each."""
    literals = model.literals()
    rules = random_rules(model.rng, literals, model.rng.randint(1, 5))
    used = [text for r in rules for text in r["literals"]]
    for one, text in regex_rules(model.rng, literals):
        rules.append(one)
        used.append(text)
    policies = PolicySet.from_policies([policy(*rules)])
    compiled = compile_program(policies, model.vocabulary)
    hold = WordHold(policies, compiled.table)
    counts.policies += 1
    counts.patterns += len(used)
    session = Session(compiled, NUM_ROWS)
    texts = [model.begin(used) for _ in range(NUM_ROWS)]
    for slot, text in enumerate(texts):
        session.reset(
            slot, text.prompt, hide_special_tokens=text.params.skip_special_tokens,
            end_token_ids=text.ends, show_end_token=text.show_end,
        )  # fmt: skip
        if hold.policies:
            text.held = hold.begin(
                "default", text.prompt, hide_special_tokens=text.params.skip_special_tokens,
                end_token_ids=text.ends, show_end_token=text.show_end,
            )  # fmt: skip
    while slots := [slot for slot, text in enumerate(texts) if not text.outcome]:
        logits = model.logits([texts[slot] for slot in slots], used)
        step(model, session, texts, slots, logits, counts, guarded)
    for text in texts:
        counts.texts += 1
        setattr(counts, text.outcome, getattr(counts, text.outcome) + 1)
        look(model, compiled, text, counts)


def step(
    model: Model, session: Session, texts: list[Text], slots: list[int], logits: np.ndarray,
    counts: Counts, guarded: bool,
) -> None:  # fmt: skip
    """Sample one token for each of the slots."""
    counts.steps += len(slots)
    last = [len(texts[slot].tokens) + 1 == texts[slot].max_tokens for slot in slots]
    wished = logits.argmax(1)
    would_hit = blocks(session, slots, wished, last)
    counts.near_misses += int(would_hit.sum())
    if guarded:
        engine_rows = [row for row, slot in enumerate(slots) if not texts[slot].avoids]
        session.apply_mask(
            logits, engine_rows, [slots[r] for r in engine_rows], [last[r] for r in engine_rows]
        )
        for row, slot in enumerate(slots):
            if texts[slot].avoids:
                logits[row, session.forbidden(slot, last=last[row])] = -np.inf
    sampled = logits.argmax(1)
    possible = np.isfinite(logits.max(1))
    counts.masked += int((sampled != wished)[possible].sum())
    stops = blocks(session, slots, sampled, last) if guarded else np.zeros(len(slots), bool)
    fed_slots, fed_tokens = [], []
    for row, slot in enumerate(slots):
        text, token = texts[slot], int(sampled[row])
        if not possible[row]:
            text.outcome = "stuck"
        elif stops[row]:
            text.outcome = "halted"
            if text.avoids:
                counts.violations.append(f"forbidden() let token {token} through: {text}")
        else:
            text.tokens.append(token)
            fed_slots.append(slot)
            fed_tokens.append(token)
            if token in text.ends:
                text.outcome = "ended"
            elif last[row]:
                text.outcome = "full"
    session.advance(fed_slots, fed_tokens)


def blocks(session: Session, slots: list[int], tokens: np.ndarray, last: list[bool]) -> np.ndarray:
    """Which rows would complete a mask, halt or redirect rule."""
    hit = np.zeros(len(slots), bool)
    if session.peek(slots, tokens, last).any():
        for row, index in session.events():
            hit[row] |= session.program.rules[index].rule.action in BLOCKING
    return hit


def look(model: Model, compiled: Program, text: Text, counts: Counts) -> None:
    """The oracle: search what the client reads, alone and together with what it had written."""
    prompt, read = model.read(text, counts)
    counts.characters += len(read)
    counts.odd_bytes += "\ufffd" in read
    for index, one in enumerate(compiled.rules):
        if one.rule.action not in BLOCKING:
            continue
        found = [(read, m) for m in matches(read, one.rule, index)]
        whole = prompt + read
        joined = matches(whole, one.rule, index) if prompt else []
        found += [(whole, m) for m in joined if m[2] < len(prompt) < m[0]]
        if model.has_byte_tokens and (one.rule.boundary == "word" or one.rule.regexes):
            kept = [(where, m) for where, m in found if not _is_beside_broken(where, m)]
            counts.beside_broken += len(found) - len(kept)
            found = kept
        if found:
            counts.violations.append(
                f"{one.rule} in {read!r} after {prompt!r}: {[m for _, m in found]}; {text}; "
                f"{[model.vocabulary.token_bytes[t] for t in text.tokens]}"
            )


def _is_beside_broken(text: str, match: tuple[int, int, int]) -> bool:
    """Whether a U+FFFD bounds the match.

    Decoders with byte fallback show a broken run of byte tokens as U+FFFD throughout, word
    characters included; the guard reads those, and takes what stands beside them for a part of a
    longer word. A regex may take such characters wherever they stand.
    """
    end, _, start = match
    if start < 0:
        return "\ufffd" in text[: end + 1]
    return "\ufffd" in (text[start - 1 : start], text[end : end + 1])


def fuzz(
    models: Mapping[str, Path],
    num_steps: int,
    seed: int,
    *,
    guarded: bool = True,
    progress: Callable[[int], None] = lambda steps: None,
) -> dict[str, Counts]:
    """Take about `num_steps` steps, in equal parts for each kind of tokenizer."""
    all_counts = {}
    for kind, path in models.items():
        model = Model(path, random.Random(f"{seed} {kind}"), np.random.default_rng(seed))
        counts = all_counts[kind] = Counts()
        while counts.steps < num_steps / len(models):
            before = counts.steps
            run_policy(model, counts, guarded=guarded)
            progress(counts.steps - before)
    return all_counts


def main() -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    from rich.table import Table

    from streamguard.tiny_model import tiny_model

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    args = parser.parse_args()
    console = Console()
    console.print(f"seed {args.seed}")
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as bar:
        models = {kind: tiny_model(Path(folder) / kind, kind=kind) for kind in KINDS}
        task = bar.add_task("steps", total=args.steps)
        all_counts = fuzz(models, args.steps, args.seed, progress=lambda n: bar.advance(task, n))
    table = Table("", *KINDS, "all")
    for (name, *_), *values in zip(
        Counts().rows(), *(counts.rows() for counts in all_counts.values()), strict=True
    ):
        numbers = [number for _, number in values]
        table.add_row(name, *(f"{n:,}" for n in numbers), f"{sum(numbers):,}")
    console.print(table)
    violations = [v for counts in all_counts.values() for v in counts.violations]
    for violation in violations[:5]:
        console.print(violation, markup=False)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
