"""What the benchmarks stand on: stable lists, a C loop that agrees, vocabularies that spell the text."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_c_loop, bench_forms, bench_packs, bench_vocabularies
from benchmarks.bench_growth import OVER_BATCH, OVER_LITERALS, SIZE
from benchmarks.measure import Ratio
from benchmarks.peers import (
    Hyperscan,
    PyAhocorasick,
    assert_same,
    compiled_hyperscan,
    compiled_pyahocorasick,
    fresh_session,
    session_hits,
)
from benchmarks.report import Bar, Cell, Point, Results, write
from benchmarks.workload import (
    NEAR_MISSES,
    ORDINARY,
    SINGLE_WORDS,
    literals,
    policy,
    policy_file,
    shared,
)
from streamguard import Policy
from streamguard.compiler.vocabulary import Vocabulary


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        (ORDINARY, "8aca10f4c9bf73d5"),
        (NEAR_MISSES, "e64fc2512acf9b1c"),
        (SINGLE_WORDS, "c71d0722f96e08e5"),
    ],
)
def test_first_ten_thousand_literals_stay_the_same_for_ever(kind: str, digest: str) -> None:
    known = literals(10_000, kind)
    assert hashlib.sha256("\n".join(known).encode()).hexdigest()[:16] == digest
    assert literals(1_000, kind) == known[:1_000]


def test_a_hundred_thousand_literals_are_distinct() -> None:
    many = literals(100_000)
    assert len(set(many)) == 100_000
    assert many[:10_000] == literals(10_000)
    assert max(map(len, many)) < 50


def test_near_misses_that_the_words_cannot_make_are_refused() -> None:
    with pytest.raises(ValueError, match="100,000 at most"):
        literals(100_001, NEAR_MISSES)


def test_policy_of_literals_files_equals_the_policy_of_literals(tmp_path: Path) -> None:
    loaded = Policy.load(policy_file(500, "halt", tmp_path))
    assert loaded.sha256 == policy(500, "halt").sha256


def test_engines_find_the_same_in_more_texts_than_python_has_small_integers() -> None:
    work = shared()
    stream = work.stream(300, 40)
    rows_of_bytes, rows_of_text = work.token_pieces(stream)
    hits = session_hits(fresh_session(work.guard(100, "halt"), 300), stream)
    for peer in (
        Hyperscan(compiled_hyperscan(100, ORDINARY, False)[0], 300).hits(rows_of_bytes),
        PyAhocorasick(compiled_pyahocorasick(100, ORDINARY, False)[0], 300).hits(rows_of_text),
    ):
        assert_same("peer", hits, peer)
    with pytest.raises(AssertionError, match="other"):
        assert_same("other", hits, set())


@pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler is installed"
)
def test_c_loop_equals_the_kernel() -> None:
    prepared = bench_c_loop.prepare(1_000, 32)  # compares results, events and states
    assert set(prepared.contestants) == {bench_c_loop.KERNEL, bench_c_loop.C_LOOP}


def test_c_loop_without_a_compiler_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_c_loop.shutil, "which", lambda name: None)
    bench_c_loop.library.cache_clear()
    bench_c_loop.prepare.cache_clear()
    results = bench_c_loop.bench(True, lambda doing: None)
    assert not results.cells
    assert all("no C compiler" in fact for fact in results.facts.values())


def test_larger_vocabulary_keeps_its_base_and_spells_the_text() -> None:
    work = shared()
    larger = bench_vocabularies.larger_vocabulary(work.vocabulary, 60_000, work.tokens[:20_000])
    assert larger.token_bytes[:49_152] == work.vocabulary.token_bytes
    assert len(larger) == len(larger.special) == 60_000
    added = larger.token_bytes[49_152:]
    assert len(set(added)) == len(added)
    assert not set(added) & set(work.vocabulary.token_bytes)
    text = "The old river finds the detonator, überall and 🙂.".encode()
    tokens = bench_vocabularies.greedy_tokens(larger, text)
    assert b"".join(larger.token_bytes[token] for token in tokens) == text
    assert not larger.special[tokens].any()


def test_vocabulary_larger_than_can_be_made_is_refused() -> None:
    base = Vocabulary((b"a", b" the", b"bc"), np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="could be made"):
        bench_vocabularies.larger_vocabulary(base, 100, np.zeros(0, np.int64))


def test_texts_of_the_forms_bench_are_what_they_are_called() -> None:
    assert bench_forms.text_of(bench_forms.ASCII, 200).isascii()
    mixed = bench_forms.text_of(bench_forms.MIXED, 200)
    share = sum(not word.isascii() for word in mixed.split()) / len(mixed.split())
    assert 0.02 < share < 0.15


def test_expressions_of_the_packs_cover_every_rule() -> None:
    chosen = bench_packs.policy()
    expressions, rules = bench_packs.expressions(chosen)
    assert sorted(set(rules)) == list(range(len(chosen.rules)))
    assert len(expressions) == len(rules) == chosen.num_patterns
    assert not any(getattr(rule, "validate", None) for rule in chosen.rules)


def test_record_holds_cells_points_bars_and_a_plot(tmp_path: Path) -> None:
    ratio = Ratio(2.0, 1.0, 3.0)
    results = Results(
        cells=[Cell("advance", "ours", 10, 256, 40.0, "ns", ratio, 2.0)],
        bars=[Bar("ours against theirs", 1 / 1.15, ratio)],
        points=[
            Point(panel, series, x, 10.0 * x, 9.0 * x, 11.0 * x)
            for panel in (OVER_LITERALS, *OVER_BATCH.values(), SIZE)
            for series in ("streamguard", "hyperscan")
            for x in (1, 10, 100)
            if (series, x) != ("hyperscan", 100)
        ],
        facts={"left out": "nothing"},
    )
    as_json, as_markdown, plot = write(results, quick=True, minutes=0.1, folder=tmp_path)
    assert '"points"' in as_json.read_text()
    assert "| hyperscan | 10 | 100 | – |" in as_markdown.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
