"""The curves of bench_growth as one picture, readable at the width of a README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_growth import BATCH, EVERY_BATCH, OVER_BATCH, OVER_LITERALS, SIZE, STREAMGUARD
from benchmarks.peers import HYPERSCAN, PYAHOCORASICK
from benchmarks.report import Point

#: Of Okabe and Ito's palette, told apart by colour-blind readers; the markers tell them apart too.
_STYLES = {
    STREAMGUARD: ("#0072B2", "o"),
    HYPERSCAN: ("#D55E00", "s"),
    PYAHOCORASICK: ("#009E73", "^"),
}
_DRAWN = (OVER_LITERALS, *OVER_BATCH.values(), SIZE)
_ROUND = (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)


def draw(points: Sequence[Point], path: Path) -> None:
    """Write a PNG of three log-log panels: ns over literals, ns over batch, MB over literals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 10.5, "axes.titlesize": 11}):
        figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 4), layout="constrained")
        few, many = EVERY_BATCH
        _curves(left, points, OVER_LITERALS)
        _curves(middle, points, OVER_BATCH[few])
        _curves(middle, points, OVER_BATCH[many], ":", hollow=True)
        _curves(right, points, SIZE)
        _axes(left, f"time, batch of {BATCH} texts", "literals", "ns of CPU per token")
        over = f"time, {_short(few)} (solid) and {_short(many)} literals (dotted)"
        _axes(middle, over, "texts in the batch", "ns of CPU per token")
        _axes(right, "memory of the tables", "literals", "MB")
        _ticks(left.xaxis, [p.x for p in points if p.panel == OVER_LITERALS])
        _ticks(middle.xaxis, [p.x for p in points if p.panel in OVER_BATCH.values()])
        _ticks(right.xaxis, [p.x for p in points if p.panel == SIZE])
        times = [p.y for p in points if p.panel != SIZE and p.panel in _DRAWN]
        for axes in (left, middle):
            axes.set_ylim(0.6 * min(times), 1.5 * max(times))
            _ticks(axes.yaxis, [y for y in _ROUND if 0.6 * min(times) < y < 1.5 * max(times)])
        low, high = right.get_ylim()
        _ticks(right.yaxis, [10.0**k for k in range(-4, 6) if low < 10.0**k < high])
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def _curves(
    axes: Any, points: Sequence[Point], panel: str, line: str = "-", *, hollow: bool = False
) -> None:
    """A line per engine, with the range of its rounds behind it."""
    for name, (colour, marker) in _STYLES.items():
        mine = sorted(
            (p for p in points if (p.panel, p.series) == (panel, name)), key=lambda p: p.x
        )
        x = [p.x for p in mine]
        axes.plot(
            x, [p.y for p in mine], line, color=colour, marker=marker, markersize=5, label=name,
            linewidth=1.6, markerfacecolor="white" if hollow else colour,
        )  # fmt: skip
        if mine and mine[0].low is not None:
            low, high = [p.low or p.y for p in mine], [p.high or p.y for p in mine]
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _axes(axes: Any, title: str, x_label: str, y_label: str) -> None:
    axes.set(xscale="log", yscale="log", title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(True, which="major", color="0.88", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(axis: Any, values: Sequence[float]) -> None:
    places = sorted(set(values))
    axis.set_ticks(places, [_short(value) for value in places])
    axis.set_ticks([], minor=True)


def _short(value: float) -> str:
    """10, 1k, 1M; batches as they are."""
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
