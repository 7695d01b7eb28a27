"""`streamguard check`: is a policy valid, what is in it, and does it mean what it says?"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamguard.commands import explain as explaining
from streamguard.commands.terminal import (
    Lenient,
    count,
    print_table,
    probe_note,
    progress_bar,
    read_policies,
    size,
    spinner,
    warn,
)

if TYPE_CHECKING:
    from streamguard.policy import PolicySet

MAX_WARNINGS = 20


def command(
    policy: Annotated[
        Path, typer.Argument(metavar="POLICY", help="A policy file, or a folder of them.")
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Compile for this tokenizer too, and say what that takes."
        ),
    ] = None,
    lenient: Lenient = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Say what each rule's normal forms cost and take as equal."),
    ] = False,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="With --explain: count hits in this ordinary text, per normal form. Repeatable.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Validate a policy file or a folder of policies and print what is in it.

    Exit code 0 if it is valid, 2 with the error on stderr if not. Warnings (rules that never act,
    a message that trips its own policy) go to stderr and do not change the exit code.

    \b
    Example:
      streamguard check policy.yaml --tokenizer models/SmolLM2-135M-Instruct
      streamguard check policy.yaml --explain --text ordinary-answers.txt
    """
    from streamguard.policy_advice import advice

    policies = read_policies(policy, lenient)
    with spinner("looking for rules that contradict each other"):
        warnings = policies.warnings + [
            f"{found.source}: {line}"
            for found in policies.policies.values()
            for line in advice(found)
        ]
    compiled = _compile(policies, tokenizer) if tokenizer is not None else None
    explained = None
    if explain or text:
        with spinner("compiling each rule by itself"):
            explained = explaining.explain(policies, text or ())
    if as_json:
        summary = _summary(policies)
        more = {} if explained is None else {"explained": [asdict(one) for one in explained]}
        print(json.dumps({"source": str(policy), **summary, "compiled": compiled,
                          "warnings": warnings, **more}, indent=2))  # fmt: skip
        return
    _print(str(policy), policies, compiled)
    if explained is not None:
        print()
        explaining.show(explained)
    for line in warnings[:MAX_WARNINGS]:
        warn(line)
    if len(warnings) > MAX_WARNINGS:
        warn(f"… and {len(warnings) - MAX_WARNINGS} more; --json lists them all.")


def _summary(policies: PolicySet) -> dict[str, Any]:
    return {
        "sha256": policies.sha256,
        "default": policies.default,
        "policies": [
            {
                "name": name,
                "source": policy.source,
                "default": name == policies.default,
                "client_selectable": policy.client_selectable,
                "on_error": policy.on_error,
                "rules": dict(Counter(rule.action for rule in policy.rules)),
                "patterns": policy.num_patterns,
                "probe_rules": policy.num_probe_rules,
                "packs": list(policy.packs),
                "sha256": policy.sha256,
            }
            for name, policy in policies.policies.items()
        ],
    }


def _compile(policies: PolicySet, tokenizer: str) -> dict[str, Any]:
    import numpy as np

    from streamguard.compiler.program import compile_program
    from streamguard.compiler.vocabulary import Vocabulary

    with progress_bar(
        "compiling the policy (the first time on a machine takes longer)"
    ) as on_progress:
        vocabulary = Vocabulary.from_tokenizer(tokenizer)
        started = time.perf_counter()
        program = compile_program(policies, vocabulary, on_progress=on_progress)
        whole = np.union1d(program.mask_ranges.whole, program.stop_ranges.whole)
        seconds = time.perf_counter() - started
    return {
        "tokenizer": tokenizer,
        "tokens": len(vocabulary),
        "states": program.num_states,
        "bytes": program.size_bytes,
        "seconds": round(seconds, 3),
        "tokens_with_whole_patterns": len(whole),
        "spare_ids": len(vocabulary.spare),
    }


def _print(source: str, policies: PolicySet, compiled: dict[str, Any] | None) -> None:
    found = policies.policies.values()
    print(
        f"{source}: valid; {count(len(found), 'policy', 'policies')}, "
        f"{count(sum(len(policy.rules) for policy in found), 'rule')}, "
        f"{count(sum(policy.num_patterns for policy in found), 'pattern')}"
    )
    rows = []
    for name, policy in policies.policies.items():
        actions = Counter(rule.action for rule in policy.rules)
        rows.append(
            (
                name,
                "yes" if name == policies.default else "no",
                "yes" if policy.client_selectable else "no",
                ", ".join(f"{number} {action}" for action, number in actions.items()),
                f"{policy.num_patterns:,}",
                policy.sha256[:12],
            )
        )
    print_table(("policy", "default", "selectable", "rules", "patterns", "sha256"), rows)
    for name, policy in policies.policies.items():
        if policy.packs:
            print(f"{name} extends {', '.join(policy.packs)}")
    if note := probe_note(found):
        print(note)
    if compiled:
        print(
            f"compiled for {compiled['tokenizer']} ({compiled['tokens']:,} tokens): "
            f"{compiled['states']:,} states, {size(compiled['bytes'])}, "
            f"{compiled['seconds']:.3f} s\n"
            f"{count(compiled['tokens_with_whole_patterns'], 'token')} of the vocabulary hold a "
            f"whole pattern of a halt, redirect or mask rule; "
            f"{count(compiled['spare_ids'], 'spare token id')} for verdicts"
        )
