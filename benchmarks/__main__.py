"""`python -m benchmarks [--quick] [ROOM ...]`: run all rooms or some, print tables, keep a record.

The record (benchmarks/results/latest.json, latest.md, growth.png) is written by full runs only, unless
--record.
Exits with 1 if an engine reports other hits, masks or tokens than its peer; a missed bar is printed,
not punished, because machines are noisy.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import (
    bench_advance,
    bench_c_loop,
    bench_engine,
    bench_forms,
    bench_growth,
    bench_lookahead,
    bench_packs,
    bench_probe,
    bench_text_stream,
    bench_vocabularies,
    report,
)

Bench = Callable[[bool, Callable[[str], None]], report.Results]


def _benches(quick: bool) -> dict[str, tuple[Bench, int]]:
    """The bench of each room, and how often it will report progress."""
    turns = bench_engine.turns_per_round() * (bench_engine.rounds(quick) + 1)
    probe_turns = bench_probe.turns_per_round() * (bench_probe.rounds(quick) + 1)
    return {
        "advance": (bench_advance.bench, len(bench_advance.cases())),
        "forms": (bench_forms.bench, len(bench_forms.TEXTS)),
        "packs": (bench_packs.bench, len(bench_packs.STEPS)),
        "c-loop": (bench_c_loop.bench, len(bench_c_loop.cases())),
        "lookahead": (bench_lookahead.bench, len(bench_lookahead.cases())),
        "vocabularies": (bench_vocabularies.bench, len(bench_vocabularies.cases())),
        "growth": (bench_growth.bench, len(bench_growth.cases(quick))),
        "text-stream": (bench_text_stream.bench, len(bench_text_stream.cases())),
        "engine": (bench_engine.bench, len(bench_engine.BATCHES) * turns),
        "probe": (bench_probe.bench, len(bench_probe.BATCHES) * probe_turns),
    }


def main() -> int:
    """Run the benches named on the command line, all by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ROOM", help=", ".join(_benches(True)))
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--record", action="store_true", help="keep the record of a partial run too"
    )
    options = parser.parse_args()
    benches = _benches(options.quick)
    unknown = sorted(set(options.names) - set(benches))
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; there are: {', '.join(benches)}")
    chosen = {name: benches[name] for name in benches if name in (options.names or benches)}

    warnings.filterwarnings("ignore", category=DeprecationWarning)
    console = Console(width=max(150, Console().width))
    started = time.monotonic()
    results = report.Results()
    columns = (
        TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[doing]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name, (bench, total) in chosen.items():
            task = progress.add_task(name, total=total, doing="preparing")

            def on_step(doing: str, task: object = task) -> None:
                progress.update(task, advance=1, doing=doing)  # type: ignore[arg-type]

            try:
                results.add(bench(options.quick, on_step))
            except AssertionError as error:
                console.print(f"[red]{name}: the engines disagree: {error}[/red]", highlight=False)
                return 1
            progress.update(task, doing="")

    report.show(results, console)
    minutes = (time.monotonic() - started) / 60
    console.print(f"{minutes:.1f} minutes")
    whole = not options.quick and len(chosen) == len(benches)
    if whole or options.record:
        for path in report.write(results, quick=options.quick, minutes=minutes):
            console.print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
