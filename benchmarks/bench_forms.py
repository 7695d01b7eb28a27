"""What do normal forms cost when a token is followed?

One list of 1,000 literals, compiled plain and under ever more normal forms, over the same tokens in the
same rounds: `Session.advance` at batch 256. Three texts: English prose in ASCII; the same with one
word in twelve respelt beyond ASCII (accents, full width, typographic quotes, emoji, look-alikes of
Cyrillic), so that tokens cut characters in two, a text made to hurt as the near misses of `advance` are;
and Chinese words, where this vocabulary cuts most characters. One planted literal in three is
disguised, so that forms find what plain does not.

Before anything is timed, what `advance` reports of every text is compared with `streamguard.scanner`,
another kernel that reads the text itself, byte by byte; and whatever plain finds, each form must find.
No peer knows these forms: the ratio is to our own plain rules.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.measure import Contestant, Ratio, Timing, interleave
from benchmarks.peers import Hit, assert_same, fresh_session, session_hits
from benchmarks.report import Bar, Cell, Results
from benchmarks.workload import literals, policy, sentences, shared, stretches
from streamguard import Guard
from streamguard.scanner import Scanner

ROOM = "forms"
NUM_LITERALS, BATCH, STEPS = 1_000, 256, 400
#: Texts that the scanner reads too.
_CHECKED_ROWS = 48
PLAIN = "plain"
_SIX = ("case", "width", "zero-width", "confusables", "leet", "marks")
FORMS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "case": ("case",),
    "six forms": _SIX,
    "six forms and separators": (*_SIX, "separators"),
}
ASCII, MIXED, CHINESE = "ASCII", "one word in 12 beyond ASCII", "Chinese"
TEXTS = (ASCII, MIXED, CHINESE)
#: Common words of two characters; what they say together is nothing.
_CHINESE = (
    "我们 他们 时间 问题 工作 生活 社会 中国 世界 学生 老师 朋友 孩子 学校 公司 城市 国家 经济 文化 历史 "
    "开始 现在 今天 明天 昨天 已经 可以 应该 需要 希望 认为 知道 喜欢 觉得 发现 使用 研究 发展 提高 解决 "
    "但是 因为 所以 如果 虽然 而且 或者 非常 特别 一起 这个 那个 什么 怎么 为了 通过 关于 对于 没有 不同"
).split()
_REQUIRED = 1.3
_LEET = str.maketrans("aeiost", "@31057")
_CYRILLIC = str.maketrans("aceopx", "асеорх")
_FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


def disguised(word: str, rng: random.Random, *, ascii_only: bool) -> str:
    """The word in a spelling that the forms undo, or one of them does."""
    ways: list[Callable[[str], str]] = [
        str.upper,
        lambda w: w.translate(_LEET),
        lambda w: ".".join(w) if " " not in w else w.replace(" ", "  "),
    ]
    if not ascii_only:
        ways = [
            lambda w: w.translate(_CYRILLIC),
            lambda w: w.translate(_FULL_WIDTH),
            lambda w: w[0] + "\u200b" + w[1:],
            lambda w: w[:2] + "\u0301" + w[2:],
        ]
    return rng.choice(ways)(word)


def text_of(kind: str, num_sentences: int = 5_000) -> str:
    """Prose with one of the first ten literals in every 25th sentence or so, often disguised."""
    rng = random.Random(5)
    planted = literals(10)
    words: list[str] = []
    for sentence in islice(sentences(), num_sentences):
        if kind == CHINESE:
            words.append("".join(rng.choices(_CHINESE, k=rng.randint(4, 9))) + "。")
        else:
            words += sentence.split()
        if rng.randrange(25) == 0:
            literal = rng.choice(planted)
            if rng.random() < 1 / 3:
                literal = disguised(literal, rng, ascii_only=kind != MIXED)
            words.append(literal)
    if kind == MIXED:
        ways: tuple[Callable[[str], str], ...] = (
            lambda w: w.replace("e", "é").replace("o", "ö"),
            lambda w: f"“{w}”",
            lambda w: f"{w} \N{GRINNING FACE}",
            lambda w: f"{w}—",
            partial(disguised, rng=rng, ascii_only=False),
        )
        words = [rng.choice(ways)(w) if rng.randrange(12) == 0 else w for w in words]
    return " ".join(words)


@dataclass(frozen=True)
class Case:
    """The contestants over one text, proven to find what they should."""

    contestants: dict[str, Contestant]
    num_hits: dict[str, int]

    def run(self, name: str) -> None:
        """One pass over the stream."""
        for k in range(STEPS):
            self.contestants[name].step(k)


@lru_cache(maxsize=3)
def prepare(text: str) -> Case:
    """Compile the list under all forms, and check what each finds."""
    work = shared()
    tokens = work.tokenizer.encode(text_of(text), add_special_tokens=False)
    stream = stretches(np.array(tokens, np.int64), BATCH, STEPS)
    slots, rows = np.arange(BATCH), list(stream)
    contestants: dict[str, Contestant] = {}
    found: dict[str, set[Hit]] = {}
    for name, forms in FORMS.items():
        guard = Guard(policy(NUM_LITERALS, "halt", forms=forms), work.vocabulary)
        session = fresh_session(guard, BATCH)
        hits = session_hits(session, stream)
        checked = {hit for hit in hits if hit[1] < _CHECKED_ROWS}
        assert_same(f"scanner, {name}", checked, _scanned(guard, stream))
        if not found.get(PLAIN, hits) <= hits:
            raise AssertionError(f"{name} misses what plain finds")
        found[name] = hits
        contestants[name] = Contestant(
            lambda k, session=session: session.advance(slots, rows[k])  # type: ignore[misc]
        )
    return Case(contestants, {name: len(hits) for name, hits in found.items()})


def _scanned(guard: Guard, stream: NDArray[np.int64]) -> set[Hit]:
    """What the scanner finds in the first texts, at the token that makes it certain."""
    token_bytes = guard.program.vocabulary.token_bytes
    hits: set[Hit] = set()
    for row in range(_CHECKED_ROWS):
        scanner = Scanner(guard.program)
        for k, token in enumerate(stream[:, row].tolist()):
            hits |= {(k, row, match.rule) for match in scanner.feed(token_bytes[token])}
    return hits


def measure(text: str, num_rounds: int) -> tuple[Case, dict[str, Timing]]:
    """Time one text; seconds per token."""
    prepared = prepare(text)
    timings = interleave(
        prepared.contestants, num_steps=STEPS, units_per_step=BATCH, num_rounds=num_rounds
    )
    return prepared, timings


def bench(quick: bool, on_case: Callable[[str], None]) -> Results:
    """All texts. on_case is told what was finished."""
    results = Results()
    for text in TEXTS:
        prepared, t = measure(text, 7 if quick else 21)
        for name, timing in t.items():
            value = timing.median * 1e9
            if name == PLAIN:
                question = f"Session.advance, {PLAIN}, {text}, a token"
                results.cells.append(Cell(ROOM, question, NUM_LITERALS, BATCH, value, "ns"))
                continue
            ratio = Ratio.of(t[PLAIN].rounds, timing.rounds)
            p99 = t[PLAIN].p99 / timing.p99
            question = f"Session.advance, {name}, {text}: plain / forms"
            results.cells.append(Cell(ROOM, question, NUM_LITERALS, BATCH, value, "ns", ratio, p99))
            if text != CHINESE:  # nearly every character is cut: told, not promised
                bar = f"plain / {name}, {text} text, batch {BATCH}, {NUM_LITERALS:,} literals"
                results.bars.append(Bar(bar, 1 / _REQUIRED, ratio))
        results.facts[f"forms, hits ({text})"] = ", ".join(
            f"{name} {count:,}" for name, count in prepared.num_hits.items()
        )
        on_case(f"{text} text")
    results.facts["forms, the six"] = ", ".join(_SIX)
    return results


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("text", TEXTS)
def test_advance_under_normal_forms(benchmark: Any, text: str, name: str) -> None:
    benchmark.group = f"forms: {text} text, {NUM_LITERALS} literals, batch {BATCH}"
    benchmark.extra_info["tokens"] = STEPS * BATCH
    benchmark.pedantic(prepare(text).run, args=(name,), rounds=5, warmup_rounds=1)
