"""`streamguard compile`: a policy and a tokenizer make one file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from streamguard.commands.terminal import (
    InputError,
    Lenient,
    load_policies,
    print_table,
    progress_bar,
)


def command(
    policy: Annotated[
        Path, typer.Argument(metavar="POLICY", help="A policy file, or a folder of them.")
    ],
    tokenizer: Annotated[
        str, typer.Option(metavar="DIR", help="Folder of the served model's tokenizer.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Where to write the artefact.")
    ],
    force: Annotated[
        bool, typer.Option("-f", "--force", help="Replace FILE if it exists.")
    ] = False,
    lenient: Lenient = False,
) -> None:
    """Compile a policy for a tokenizer and write the artefact to one file.

    Prints states, bytes, build seconds and the file's sha256, which depends on policy and
    tokenizer only. The file appears complete or not at all.

    \b
    Example:
      streamguard compile policy.yaml --tokenizer models/SmolLM2-135M-Instruct -o policy.sga
    """
    _check_output(output, force)
    policies = load_policies(policy, lenient)
    with progress_bar(
        "compiling the policy (the first time on a machine takes longer)"
    ) as on_progress:
        from streamguard.compiler.artifact import Artifact
        from streamguard.compiler.program import compile_program
        from streamguard.compiler.vocabulary import Vocabulary

        vocabulary = Vocabulary.from_tokenizer(tokenizer)
        started = time.perf_counter()
        program = compile_program(
            policies, vocabulary, on_progress=lambda share: on_progress(0.6 * share)
        )
        artifact = Artifact(policies, program)
        artifact.build_look_ahead()
        seconds = time.perf_counter() - started
        sha256 = artifact.save(output)
    print_table(
        ("wrote", str(output)),
        [
            ("states", f"{artifact.program.num_states}"),
            ("bytes", f"{output.stat().st_size}"),
            ("build seconds", f"{seconds:.3f}"),
            ("sha256", sha256),
        ],
    )


def _check_output(output: Path, force: bool) -> None:
    """Refuse before the work what could not be written after it."""
    if output.is_dir():
        raise InputError(
            f"{output}: is a folder; the artefact is one file. Name it: -o {output / 'policy.sga'}."
        )
    if output.exists() and not output.is_file():
        raise InputError(
            f"{output}: is a device or pipe; the artefact is written beside its place and renamed, "
            f"which would replace it. Name a file."
        )
    if output.exists() and not force:
        raise InputError(
            f"{output}: exists; it is not overwritten unasked, since an engine may be using it. "
            f"Give --force to replace it, or another name."
        )
    parent = output.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{output}: there is no folder {parent} to write it into. Make it first.")
