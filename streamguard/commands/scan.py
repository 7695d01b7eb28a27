"""`streamguard scan`: matches of a policy in files or stdin, one JSON object a line."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from streamguard.commands.terminal import (
    PATIENCE_S,
    InputError,
    Lenient,
    load_policies,
    probe_note,
    progress_bar,
    say,
)

if TYPE_CHECKING:
    from streamguard.compiler.program import Program
    from streamguard.scanner import Match

STDIN = "-"


def command(
    policy: Annotated[
        Path, typer.Argument(metavar="POLICY", help="A policy file, or a folder of them.")
    ],
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE", help="Files to scan; - or none reads stdin.", show_default=False
        ),
    ] = None,
    chunk: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Bytes fed at a time; does not change the result."),
    ] = 65536,
    policy_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Policy of a folder to apply; the default one if not given."
        ),
    ] = None,
    lenient: Lenient = False,
) -> None:
    """Find every match of a policy in files or stdin, read as byte streams.

    Prints one JSON object a line with the keys rule, start, end and action: byte offsets into the
    raw input, end exclusive, every rule and end once with the earliest start (null: a regex ends
    there, and may have begun at several places). With several files
    each object has the key file too. Lines are flushed as soon as a match is certain. Rules with a
    probe read a model's hidden states: they are left out, with a note on stderr.

    \b
    Example:
      streamguard scan policy.yaml answers.txt
      tail -f server.log | streamguard scan policy.yaml
    """
    from streamguard.errors import PolicyError
    from streamguard.policy import PolicySet

    policies = load_policies(policy, lenient)
    name = policies.default if policy_name is None else policy_name
    if name not in policies.policies:
        raise PolicyError(
            f'{policy}: no policy is named "{name}"; found: {", ".join(policies.policies)}. '
            f"Name one of these with --policy-name, or leave it out for the default one."
        )
    if note := probe_note([policies.policies[name]]):
        say("note", f"{note}; a scan reads text alone", "cyan")
    names = files or [STDIN]
    sizes = [_checked_size(file) for file in names]
    with progress_bar(
        "compiling the policy (the first time on a machine takes longer)"
    ) as on_progress:
        from streamguard.compiler.program import compile_program
        from streamguard.scanner import Scanner

        chosen = PolicySet.from_policies([policies.policies[name]])
        program = compile_program(chosen, on_progress=on_progress)
    with _progress(sizes) as advance:
        for file in names:
            with ExitStack() as stack:
                source = _open(file, stack)
                scanner = Scanner(program)
                extra = {"file": file} if len(names) > 1 else {}
                for data in _chunks(source, file, chunk):
                    _write(scanner.feed(data), program, extra)
                    advance(len(data))
                _write(scanner.finish(), program, extra)


def _checked_size(name: str) -> int | None:
    """Size of a file if it has one; raises InputError for what could not be read later anyway."""
    if name == STDIN:
        return None
    try:
        info = os.stat(name)
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from None
    if stat.S_ISDIR(info.st_mode):
        raise _unreadable(name, IsADirectoryError())
    return info.st_size if stat.S_ISREG(info.st_mode) else None


def _unreadable(name: str, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        reason = f"no such file; looked for {Path(name).absolute()}. Correct the path"
    elif isinstance(error, IsADirectoryError):
        reason = f"is a folder; files are scanned one by one. Give its files: {name}/*"
    else:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error}). Correct that"
    return InputError(f"{name}: {reason}, or use - for stdin.")


def _open(name: str, stack: ExitStack) -> BinaryIO:
    if name == STDIN:
        return sys.stdin.buffer
    try:
        return stack.enter_context(open(name, "rb"))
    except OSError as error:
        raise _unreadable(name, error) from None


def _chunks(source: BinaryIO, name: str, num_bytes: int) -> Iterator[bytes]:
    """What has arrived, at most `num_bytes` at a time: a live stream is not waited for."""
    read: Callable[[int], bytes] = getattr(source, "read1", source.read)
    while True:
        try:
            data = read(num_bytes)
        except OSError as error:
            raise _unreadable(name, error) from None
        if not data:
            return
        yield data


def _write(matches: Iterator[Match], program: Program, extra: dict[str, str]) -> None:
    lines = []
    for rule, start, end in matches:
        found = program.rules[rule].rule
        entry = {"rule": found.id, "start": start, "end": end, "action": found.action, **extra}
        lines.append(json.dumps(entry) + "\n")
    if lines:
        sys.stdout.write("".join(lines))
        sys.stdout.flush()


@contextmanager
def _progress(sizes: list[int | None]) -> Iterator[Callable[[int], None]]:
    """A bar on stderr after two seconds, where it disturbs nothing and the end is known."""
    total = sum(size or 0 for size in sizes)
    if None in sizes or not total or not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    bar = Progress(
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
    )
    task = bar.add_task("scanning", total=total)
    began = time.monotonic()

    def advance(num_bytes: int) -> None:
        bar.advance(task, num_bytes)
        if not bar.live.is_started and time.monotonic() - began > PATIENCE_S:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
