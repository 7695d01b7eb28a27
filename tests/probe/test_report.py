"""Plots, the HTML page and the terminal's table."""

from __future__ import annotations

import io
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_cases import MARK, card, one_score_each, scored, varied
from rich.console import Console
from run_seed import SEED

from streamguard.errors import ProbeError
from streamguard.probe.aggregation import Aggregation
from streamguard.probe.evaluate import Scored, evaluate
from streamguard.probe.report import LIMITS, figures_table, write_report

SWEEP = [
    {"layer": 10, "auroc": 0.7, "low": 0.65, "high": 0.75},
    {"layer": 20, "auroc": 0.8, "low": None, "high": None},
    {"layer": "norm", "auroc": 0.75, "low": 0.7, "high": 0.8},
]
#: Elements that HTML never closes.
_VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a page loads, what it says and whether its elements nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.said: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def figures(data: Scored, threshold: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(SEED)
    return evaluate(
        data, Aggregation(size=4), threshold, num_bootstrap=20,
        baselines={"length": rng.random(len(data.label)), "<i>words</i>": rng.random(len(data.label))},
    )  # fmt: skip


def test_the_page_is_whole_alone_and_holds_no_text_of_the_data(tmp_path: Path) -> None:
    data = varied(np.random.default_rng(SEED))
    paths = write_report(tmp_path / "new" / "folder", card(), figures(data), data, SWEEP)
    assert [path.name for path in paths] == [
        "report.html", "roc.png", "scores.png", "timeliness.png", "baselines.png", "layers.png",
    ]  # fmt: skip
    for path in paths[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")
    text = paths[0].read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert len(page.loads) == 5
    assert all(address.startswith("data:image/png;base64,") for address in page.loads)
    for outside in ("http://", "https://", "url(", "@import"):
        assert outside not in text
    assert not page.tags & {"script", "link", "iframe", "object", "i", "b", "source"}
    assert MARK not in text
    assert "p17" not in "".join(page.said)
    said = " ".join(page.said)
    assert all(limit in said for limit in LIMITS)
    assert "measured error rates on these data, not guarantees" in said
    for shown in ("first <source>", "<i>words</i>", "streamguard <b>0.1</b>", "abc", "14 of 30"):
        assert shown in said


@pytest.mark.parametrize(
    "data",
    [
        one_score_each([1.0], [1]),
        one_score_each([1.0, 2.0], [0, 0]),
        one_score_each([1.0, 2.0], [1, 0], refusal=np.ones(2, bool)),
        scored([[1.0] * 9], [1], onset=np.array([4])),
        scored([[], [1.0]], [1, 0]),
    ],
    ids=["one harmful text", "no harmful texts", "refusals only", "one spliced", "an empty one"],
)
def test_tiny_sets_have_a_report_too(data: Scored, tmp_path: Path) -> None:
    results = figures(data)
    assert len(write_report(tmp_path, card(), results, data)) == 5
    for narrow in (False, True):
        assert figures_table(results, narrow=narrow).row_count > 3


def test_scores_before_a_statistic_is_full_are_not_drawn(tmp_path: Path) -> None:
    data = varied(np.random.default_rng(SEED), 60)
    results = evaluate(data, Aggregation("consecutive", 5), 0.5, num_bootstrap=5)
    assert len(write_report(tmp_path, card(), results, data)) == 5


def test_the_table_says_what_the_figures_say() -> None:
    data = varied(np.random.default_rng(SEED))
    results = json.loads(json.dumps(figures(data)))
    console = Console(width=250, file=io.StringIO())
    console.print(figures_table(results))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for view in ("with_refusals", "without_refusals"):
        for group in ("macro", "pooled"):
            value = results[view][group]["auroc"]["value"]
            assert f"{value:.3f}".removeprefix("0") in text
    for name in ("first <source>", "second $ource", "harmful_only", "macro, <i>words</i>"):
        assert name in text
    harmful_only = next(line for line in text.splitlines() if "harmful_only" in line)
    assert "–" in harmful_only


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = one_score_each([1.0, 2.0], [0, 1])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ProbeError, match=r"pip install 'vllm-streamguard\[probe\]'"):
        write_report(tmp_path, card(), figures(data), data)
