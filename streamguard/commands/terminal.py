"""What the commands share: errors on one screen, tables, and signs of life during slow steps.

Output is plain text when it does not go to a terminal, so that it can be piped and compared.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from streamguard.errors import StreamguardError

if TYPE_CHECKING:
    from streamguard.policy import Policy, PolicySet

EXIT_ERROR = 2
#: A step that is over by then shows no spinner and no bar.
PATIENCE_S = 2.0


class InputError(StreamguardError, ValueError):
    """Raised when a path or an option given on the command line cannot be used."""


class ReportingGroup(TyperGroup):
    """Turns every error that the user can mend into a message on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            # The reader has seen enough. Whatever is still buffered must not fail at exit.
            discard_stdout()
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
        except (StreamguardError, OSError) as error:
            report(error)
        raise typer.Exit(EXIT_ERROR)


def report(error: Exception) -> None:
    """Print `PolicyError: …` on stderr, the class name in red on a terminal."""
    name, text = type(error).__name__, str(error)
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        text = f"{where}{error.strerror or error}."
    say(name, text, "bold red")


def warn(text: str) -> None:
    """Print `warning: …` on stderr."""
    say("warning", text, "yellow")


def say(label: str, text: str, style: str) -> None:
    """Print `label: text` on stderr, the label in colour on a terminal."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.text import Text

        line = Text.assemble((f"{label}: ", style), text)
        Console(stderr=True, highlight=False).print(line, soft_wrap=True)
    else:
        print(f"{label}: {text}", file=sys.stderr, flush=True)


Lenient = Annotated[
    bool,
    typer.Option(
        "--lenient",
        help="Skip literals that cannot be used, with a warning each, instead of refusing the "
        "policy. STREAMGUARD_LENIENT=1 does the same.",
    ),
]


def load_policies(path: Path, lenient: bool) -> PolicySet:
    """Load the policies that a command was given, and warn of every literal left out."""
    policies = read_policies(path, lenient)
    for line in policies.warnings:
        warn(line)
    return policies


def read_policies(path: Path, lenient: bool) -> PolicySet:
    """The same without a word."""
    from streamguard.policy import PolicySet
    from streamguard.vllm_plugin.settings import lenient_by_environment

    with spinner(f"reading {path}"):
        return PolicySet.load(path, lenient=lenient or lenient_by_environment())


def probe_note(policies: Iterable[Policy]) -> str:
    """Say how many rules no scan of text can apply, or nothing."""
    number = sum(policy.num_probe_rules for policy in policies)
    if not number:
        return ""
    return (
        f"{count(number, 'probe rule')} {'acts' if number == 1 else 'act'} inside the engine only"
    )


def discard_stdout() -> None:
    """Point stdout nowhere, after its reader has gone."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()
) -> None:
    """Print a table on stdout: rich on a terminal, aligned columns otherwise.

    styles  one per row, for its first cell; used on terminals only.
    """
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, header_style="bold", show_lines=False)
        for index, row in enumerate(rows):
            first = Text(row[0], style=styles[index] if styles else "")
            table.add_row(first, *map(Text, row[1:]))
        Console(highlight=False).print(table)
        return
    lines = [tuple(columns), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """Show `text`, a spinner and the time that the step takes on stderr, after two seconds of it."""
    with _after_a_while(text, None):
        yield


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[float], None]]:
    """The same with a bar; yields what is to be told the share that is done, 0 to 1."""
    with _after_a_while(text, 1.0) as advance:
        yield advance


@contextmanager
def _after_a_while(text: str, total: float | None) -> Iterator[Callable[[float], None]]:
    if not sys.stderr.isatty():
        yield lambda share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    shown = SpinnerColumn() if total is None else BarColumn()
    columns = shown, TextColumn("{task.description}"), TimeElapsedColumn()
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(text, total=total)
    timer = threading.Timer(PATIENCE_S, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda share: progress.update(task, completed=share)
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


def size(num_bytes: int) -> str:
    """Write a number of bytes for people: `1.2 MB`."""
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def count(number: int, noun: str, plural: str = "") -> str:
    """`1 rule`, `2 rules`, `2 policies`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
