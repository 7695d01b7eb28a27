"""The `streamguard` command. Stays light: what a command needs is imported when it runs."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from streamguard import __version__
from streamguard.commands import check, compile, doctor, packs, probe, scan, serve
from streamguard.commands.terminal import ReportingGroup, discard_stdout

app = typer.Typer(
    name="streamguard",
    cls=ReportingGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    # Plain help everywhere: both of typer's rich modes rewrap the examples.
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"streamguard {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Guard what a language model writes, inside vLLM, before it is emitted.

    \b
    Example:
      streamguard check policy.yaml
      streamguard serve MODEL --policy policy.yaml
    """


def _demo_model(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            help="Cache folder to put the model into; $STREAMGUARD_CACHE or ~/.cache/streamguard "
            "if not given.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make the small demonstration model available and print its path.

    The first call downloads 93 MB and converts them (about a minute); later ones only verify
    checksums. Nothing but the path goes to stdout.

    \b
    Example:
      streamguard serve "$(streamguard demo-model)" --policy policy.yaml
    """
    from streamguard.demo_model import demo_model

    print(demo_model(folder))


_packs = typer.Typer(
    name="packs",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List and show the rule packs that a policy can extend.\n\n"
    "\b\nExample:\n  streamguard packs list\n  streamguard packs show secrets",
)
_packs.command("list", short_help="Every pack with its version.")(packs.list_command)
_packs.command("show", short_help="A pack as it is written.")(packs.show_command)
_probe = typer.Typer(
    name="probe",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Fit, calibrate, evaluate and show probes: rules on meaning instead of spelling.\n\n"
    "\b\nExample:\n  streamguard probe fit -m MODEL -d items.jsonl -o harm.safetensors",
)
_probe.command("fit", short_help="Fit a probe on labelled items or a topic.")(probe.fit_command)
_probe.command("calibrate", short_help="Thresholds from your own benign traffic.")(
    probe.calibrate_command
)
_probe.command("eval", short_help="Measure a probe on labelled items.")(probe.eval_command)
_probe.command("show", short_help="Print a probe's card.")(probe.show_command)
app.command("check", short_help="Validate a policy.")(check.command)
app.command("scan", short_help="Find matches in files or stdin.")(scan.command)
app.command("compile", short_help="Compile a policy into one file.")(compile.command)
app.command("serve", short_help="Run vllm serve, guarded.", **serve.SETTINGS)(serve.command)
app.command("doctor", short_help="Say what works here, and why.")(doctor.command)
app.add_typer(_probe, short_help="Fit, calibrate, evaluate and show probes.")
app.add_typer(_packs, short_help="List and show rule packs.")
app.command("demo-model", short_help="Get the small model, print its path.")(_demo_model)


def main() -> None:
    """Run the command line; the console script. Exit code 0, or 2 on any error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A path that is not UTF-8 or a terminal that is not must not stop the message.
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            discard_stdout()
