"""`streamguard doctor`: what would and would not work on this machine, and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from streamguard.commands import environment
from streamguard.commands.environment import FAIL, OK, WARN, Finding
from streamguard.commands.terminal import EXIT_ERROR, print_table, size, spinner
from streamguard.errors import StreamguardError
from streamguard.policy import Policy, PolicySet

_STYLES = {OK: "green", WARN: "yellow", FAIL: "bold red"}
#: Installed beside torch in builds that must fit it; text models need none of them.
_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A model folder or name to look at too.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what would and would not work here, and what to do about it.

    Starts no engine. Exit code 0 if nothing fails (warnings included), else 2.

    \b
    Example:
      streamguard doctor models/SmolLM2-135M-Instruct
    """
    with spinner("looking around (importing torch, running the matcher)"):
        findings = list(_findings(model))
    failed = any(finding.status == FAIL for finding in findings)
    if as_json:
        checks = [vars(finding) for finding in findings]
        print(json.dumps({"ok": not failed, "checks": checks}, indent=2))
    else:
        _print(findings)
    if failed:
        raise typer.Exit(EXIT_ERROR)


def _print(findings: list[Finding]) -> None:
    rows = [
        (
            finding.status,
            finding.check,
            f"{finding.found}. {finding.remedy}" if finding.remedy else finding.found,
        )
        for finding in findings
    ]
    print_table(("", "check", "found"), rows, [_STYLES[finding.status] for finding in findings])
    counts = Counter(finding.status for finding in findings)
    print(f"{counts[OK]} ok, {counts[WARN]} warn, {counts[FAIL]} fail")


def _findings(model: str | None) -> Iterator[Finding]:
    yield environment.python()
    yield environment.vllm()
    yield _torch()
    yield _companions()
    yield environment.plugins()
    yield environment.plugin_filter()
    yield environment.frontend()
    yield environment.model_runner()
    yield environment.metrics_folder()
    yield from _matcher()
    finding, policies = environment.policy()
    yield finding
    if model is not None:
        yield from _model(model, policies)


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:  # a broken build raises whatever its loader meets first
        return Finding(
            "torch", FAIL, f"cannot be imported ({_short(error)})", "Install torch again."
        )
    if torch.cuda.is_available():
        return Finding("torch", OK, f"{torch.__version__}, {torch.cuda.get_device_name(0)}")
    if Path("/proc/driver/nvidia/version").exists():
        return Finding(
            "torch",
            WARN,
            f"{torch.__version__} sees no GPU, but this machine has an NVIDIA driver",
            "Install the CUDA build: pip install 'vllm-streamguard[cuda]'.",
        )
    return Finding("torch", OK, f"{torch.__version__}, CPU only")


def _companions() -> Finding:
    """Import what lies beside torch in another process: a broken one takes transformers along."""
    names = [name for name in _COMPANIONS if environment.distribution((name,))]
    if not names:
        return Finding("torch companions", OK, f"none of {', '.join(_COMPANIONS)} is installed")
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        importlib.import_module(name)\n"
        "    except BaseException as error:\n"
        "        print(name, (str(error) or type(error).__name__).splitlines()[0], sep=': ')\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *names],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        broken = done.stdout.strip().splitlines() or (["crashed"] if done.returncode else [])
    except subprocess.TimeoutExpired:
        broken = ["importing them takes more than 300 s"]
    if broken:
        return Finding(
            "torch companions",
            FAIL,
            f"{'; '.join(broken)}. They do not fit this torch, and transformers imports them",
            f"Text models need none: pip uninstall -y {' '.join(names)}.",
        )
    return Finding("torch companions", OK, f"{', '.join(names)}: can be imported")


def _matcher() -> Iterator[Finding]:
    """Where numba keeps compiled kernels, and whether they find a match."""
    remedy = "Set NUMBA_CACHE_DIR to a folder that can be written."
    try:
        from streamguard.compiler.program import compile_program
        from streamguard.scanner import Scanner
        from streamguard_kernels.scan import scan_kernel
    except Exception as error:  # numba refuses at decoration where it finds no cache folder
        yield Finding("kernel cache", FAIL, f"kernels cannot be loaded ({_short(error)})", remedy)
        return
    folder = Path(scan_kernel._cache.cache_path)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if os.access(existing, os.W_OK | os.X_OK):
        yield Finding("kernel cache", OK, str(folder))
    else:
        yield Finding(
            "kernel cache",
            WARN,
            f"{folder} cannot be written: every process compiles the kernels anew",
            remedy,
        )
    rule = {"id": "self-test", "literals": ["bomb"], "action": "halt"}
    policies = PolicySet.from_policies([Policy.from_dict({"version": 1, "rules": [rule]})])
    try:
        scanner = Scanner(compile_program(policies))
        matches = [*scanner.feed(b"a bo"), *scanner.feed(b"mb"), *scanner.finish()]
    except Exception as error:
        yield Finding("matcher", FAIL, f"the self-test fails ({_short(error)})", "Report it.")
        return
    if matches == [(0, 2, 6)]:
        yield Finding("matcher", OK, "compiles a policy and finds a match split over two chunks")
    else:
        yield Finding("matcher", FAIL, f"the self-test found {matches}", "Report it.")


def _model(model: str, policies: PolicySet | None) -> Iterator[Finding]:
    from streamguard.compiler.vocabulary import Vocabulary

    vocab_size, config = _vocab_size(model)
    yield config
    try:
        vocabulary = Vocabulary.from_tokenizer(model, vocab_size=vocab_size)
    except StreamguardError as error:
        yield Finding("tokenizer", FAIL, str(error), "No guard is possible without it.")
        return
    num_known = sum(1 for piece in vocabulary.token_bytes if piece)
    yield Finding(
        "tokenizer", OK, f"{len(vocabulary):,} token ids, the bytes of {num_known:,} are known"
    )
    num_spare = len(vocabulary.spare)
    if num_spare >= 2:
        yield Finding("spare ids", OK, f"{num_spare} token ids are free to carry verdicts")
    elif vocabulary.eos_token_ids:
        yield Finding(
            "spare ids",
            WARN,
            f"{num_spare} token ids are free, 2 are needed to carry verdicts in the token stream; "
            f"verdicts are kept beside it and end responses with EOS",
            "That works; a tokenizer with reserved special tokens survives preemption better.",
        )
    else:
        yield Finding(
            "spare ids",
            FAIL,
            f"{num_spare} token ids are free and no EOS is known: a verdict could end no response",
            "Add reserved special tokens, or name eos_token_id in generation_config.json.",
        )
    if policies is None:
        return
    yield from _probes(model, policies)
    from streamguard.compiler.program import compile_program

    try:
        program = compile_program(policies, vocabulary)
    except StreamguardError as error:
        yield Finding("policy for this model", FAIL, str(error), "Correct the policy.")
        return
    yield Finding(
        "policy for this model",
        OK,
        f"{program.num_states:,} states, {size(program.size_bytes)}",
    )


def _probes(model: str, policies: PolicySet) -> Iterator[Finding]:
    """Whether the probes of the policies were fitted on this model, one line each."""
    rules = [rule.probe for policy in policies.policies.values() for rule in policy.rules]
    probes = {rule.path: rule.probe for rule in rules if rule is not None}
    if not probes:
        return
    from streamguard.probe.model import ServedModel, misfit
    from streamguard.vllm_plugin.settings import allow_stale_by_environment

    served = ServedModel(model)
    for path, probe in probes.items():
        if probe is None:
            continue
        check, card = f"probe {path}", None
        try:
            card = served.card
            found = card.fingerprint
            fault = misfit(
                probe.card.model, model, card.num_layers, card.hidden_size, partial(str, found)
            )
        except StreamguardError as error:
            fault = str(error)
        layer = probe.card.layer
        where = "the last norm" if layer == "norm" else f"layer {layer}"
        if fault is None:
            heads = f"{len(probe.heads)} head{'s' if len(probe.heads) > 1 else ''}"
            yield Finding(check, OK, f"was fitted on this model: {heads}, {where}")
            continue
        fit = f"Fit it for this model: streamguard probe fit --model {model} …"
        if card is None or card.hidden_size != probe.card.model.hidden_size:
            yield Finding(check, FAIL, fault, f"{fit}.")
        elif allow_stale_by_environment():
            yield Finding(check, WARN, f"{fault}. It would only observe", f"{fit}.")
        else:
            yield Finding(
                check,
                FAIL,
                fault,
                f"{fit}, or let it only observe: streamguard serve --allow-stale.",
            )


def _vocab_size(model: str) -> tuple[int | None, Finding]:
    """Rows of the model's output layer, padding included."""
    try:
        from transformers import AutoConfig

        config: Any = AutoConfig.from_pretrained(model).get_text_config()
        return int(config.vocab_size), Finding(
            "model", OK, f"{config.model_type}, {int(config.vocab_size):,} rows of logits"
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … alike
        return None, Finding(
            "model",
            FAIL,
            f"{model}: its configuration cannot be read ({_short(error)})",
            "Give a folder with config.json, or a name that is in the local cache.",
        )


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
