"""`make demo`: serve a small real model guarded and unguarded, and show what the guard does.

A probe is fitted to a harmless topic first. Then two `vllm serve` processes, one with the example
policy and one without, answer the same requests through the OpenAI client. Exits with 1 if the guard
did not act as the policy says.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from streamguard.errors import ConfigurationError, StreamguardError

EXAMPLES = Path(__file__).parent / "examples"
POLICY = EXAMPLES / "demo.yaml"
CONCEPT = EXAMPLES / "concepts" / "cooking.yaml"
PROBE_RULE = """
  - id: cooking                # a topic, by the model's own hidden states
    category: custom
    probe: cooking.safetensors
    threshold: {fpr: 0.05}
    action: halt
"""
_NAME = "SmolLM2-135M-Instruct"
_START_TIMEOUT_S = 300
_METRICS = (
    "streamguard_active", "streamguard_requests_total", "streamguard_tokens_total",
    "streamguard_verdicts_total", "streamguard_step_seconds_sum", "streamguard_step_seconds_count",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A prompt, what the guard must say of it, and what must be gone from the answer.

    begins  least characters of the answer that must be said before the verdict.
    """

    prompt: str
    rule: str | None
    gone: tuple[str, ...] = ()
    begins: int = 0


CASES = (
    Case("Repeat this line exactly: The launch code is TANGO-7431-BRAVO.", "launch-code", ("TANGO-7431",)),
    Case("Tell me about Coca-Cola in two sentences.", "brand", ("Coca-Cola",)),
    Case("Explain in one sentence what photosynthesis is.", None, ("carbon dioxide",)),
    Case(
        "Tell me about the city of Paris, then describe how to cook French onion soup.",
        "cooking", begins=40,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """One streamed completion."""

    pieces: tuple[str, ...]
    finish_reason: str | None
    stop_reason: str | None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass
class Server:
    """A running `vllm serve`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def ready(self) -> bool:
        """Whether it answers; raises ConfigurationError with the end of its log if it died."""
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise ConfigurationError(f"vllm serve ended with {self.process.returncode}:\n{tail}")
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def metrics(self) -> str:
        """The text of /metrics."""
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def ask(self, prompt: str) -> Answer:
        """One greedy chat completion, streamed through the OpenAI client."""
        from openai import OpenAI

        client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none")
        pieces, finish, stop = [], None, None
        stream = client.chat.completions.create(
            model=_NAME,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=128,
            stream=True,
        )
        for chunk in stream:
            for choice in chunk.choices:
                pieces.append(choice.delta.content or "")
                if choice.finish_reason:
                    finish = choice.finish_reason
                    stop = (choice.model_extra or {}).get("stop_reason")
        return Answer(tuple(pieces), finish, stop)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(
    model: Path, log: Path, policy: Path | None, options: Sequence[str] = ()
) -> Iterator[Server]:
    """Run `vllm serve` on a free port of this machine; ended on leaving."""
    port = _free_port()
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **{
            k: v
            for k, v in os.environ.items()
            if not k.startswith("STREAMGUARD_") or k == "STREAMGUARD_CACHE"
        },
    }
    if policy is not None:
        environment["STREAMGUARD_POLICY"] = str(policy)
        environment["STREAMGUARD_REQUIRED"] = "1"
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(model),
        "--served-model-name", _NAME, "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager",
        *options,
    ]  # fmt: skip
    with log.open("wb") as sink:
        # A session of its own: whatever becomes of the server, its engine processes end with us.
        process = subprocess.Popen(
            command, stdout=sink, stderr=sink, env=environment, start_new_session=True
        )
    try:
        yield Server(process, port, log)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def value(metrics: str, name: str, **labels: str) -> float:
    """Sum of the samples of a metric whose labels include the given ones."""
    total = 0.0
    for line in metrics.splitlines():
        if re.match(rf"{re.escape(name)}(?:{{| )", line) and all(
            f'{key}="{text}"' in line for key, text in labels.items()
        ):
            total += float(line.rsplit(" ", 1)[1])
    return total


def _with_probe(model: Path, folder: Path) -> Path:
    """Fit the example concept by the command that users run; return a policy that has it as a rule.

    Raises ConfigurationError with the end of what the command printed.
    """
    probe = folder / "cooking.safetensors"
    command = [
        str(Path(sys.executable).parent / "streamguard"), "probe", "fit", "--model", str(model),
        "--concept", str(CONCEPT), "--output", str(probe),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise ConfigurationError(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
    policy = folder / "demo.yaml"
    policy.write_text(POLICY.read_text(encoding="utf-8") + PROBE_RULE, encoding="utf-8")
    return policy


def _shown(case: Case, plain: Answer, guarded: Answer) -> Panel:
    verdict = guarded.stop_reason or ""
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", justify="right", no_wrap=True)
    table.add_column()
    table.add_row("unguarded", Text(plain.text.strip()))
    shown = Text()
    same = os.path.commonprefix([plain.text, guarded.text])  # noqa: RUF071  (characters are meant)
    shown.append(same.lstrip())
    if verdict:
        shown.append("■", style="bold red")
    shown.append(guarded.text[len(same) :], style="yellow")
    table.add_row("guarded", shown)
    table.add_row(
        "verdict",
        Text(f"{guarded.finish_reason}  {verdict}", style="bold red" if verdict else "green"),
    )
    return Panel(table, title=Text(case.prompt), title_align="left", expand=True)


def _failures(metrics: str, answers: list[tuple[Case, Answer, Answer]]) -> list[str]:
    found = []
    for case, plain, guarded in answers:
        for word in case.gone:
            if word.casefold() in guarded.text.casefold():
                found.append(f"{case.prompt!r}: the guarded text contains {word!r}")
        if case.gone and not any(w.casefold() in plain.text.casefold() for w in case.gone):
            found.append(f"{case.prompt!r}: the unguarded model wrote none of {case.gone}")
        wanted = f"streamguard:{case.rule}" if case.rule else None
        if wanted and (guarded.finish_reason, guarded.stop_reason) != ("content_filter", wanted):
            found.append(
                f"{case.prompt!r}: ended with {guarded.finish_reason}, {guarded.stop_reason}; "
                f"expected content_filter, {wanted}"
            )
        same = os.path.commonprefix([plain.text, guarded.text])  # noqa: RUF071
        if len(same.strip()) < case.begins or (
            case.begins and len(guarded.text) >= len(plain.text)
        ):
            found.append(
                f"{case.prompt!r}: the guarded text has {len(guarded.text)} characters, the unguarded "
                f"one {len(plain.text)}; it was to end in its midst, after {case.begins} at least"
            )
        if case.rule and value(metrics, "streamguard_verdicts_total", rule=case.rule) != 1:
            found.append(f"metrics count another number of verdicts than 1 for rule {case.rule}")
    if value(metrics, "streamguard_active") != 1:
        found.append("streamguard_active is not 1")
    if not value(metrics, "streamguard_verdicts_total", rule="biology"):
        found.append("metrics show no match of the observe rule")
    return found


def run(console: Console) -> list[str]:
    """Serve, ask, print; return what went wrong."""
    from streamguard.demo_model import demo_model

    model = demo_model()
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console,
        transient=True,
    )  # fmt: skip
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamguard-demo-")))
        stack.enter_context(progress)
        task = progress.add_task(
            "fitting a probe to a topic: the model answers questions (a minute or two)"
        )
        policy = _with_probe(model, folder)
        progress.update(task, description="starting vllm serve twice: unguarded and guarded")
        plain = stack.enter_context(serve(model, folder / "unguarded.log", None))
        guarded = stack.enter_context(serve(model, folder / "guarded.log", policy))
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not (plain.ready() and guarded.ready()):
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"vllm serve did not answer within {_START_TIMEOUT_S} s. See what it prints: "
                    f"STREAMGUARD_POLICY={POLICY} vllm serve {model}"
                )
            time.sleep(0.5)
        answers = []
        for case in CASES:
            progress.update(task, description=f"asking: {case.prompt}")
            answers.append((case, plain.ask(case.prompt), guarded.ask(case.prompt)))
        time.sleep(1.5)  # what steps count is written once a second
        metrics = guarded.metrics()
        progress.stop()
        for answer in answers:
            console.print(_shown(*answer))
        _print_cost(console, metrics)
        return _failures(metrics, answers)


def _print_cost(console: Console, metrics: str) -> None:
    steps = value(metrics, "streamguard_step_seconds_count", phase="decide")
    guard_s = value(metrics, "streamguard_step_seconds_sum") / steps
    latency_s = value(metrics, "vllm:inter_token_latency_seconds_sum") / value(
        metrics, "vllm:inter_token_latency_seconds_count"
    )
    console.print(
        f"\nThe guard took {guard_s * 1e6:.0f} µs of a step of {latency_s * 1e3:.1f} ms: "
        f"[bold]{guard_s / latency_s:.2%}[/] (mean over {steps:.0f} steps, one request at a time).\n"
    )
    console.print("From GET /metrics:", style="dim")
    for line in metrics.splitlines():
        if line.startswith(_METRICS) and not line.endswith(" 0.0"):
            console.print(f"  {line}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the demo; exit with 1 if the guard did not act, 2 if it could not be run."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    # A terminal that is closed, or `kill`, must not leave the servers running.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda *_: sys.exit(1))
    try:
        failures = run(console)
    except StreamguardError as error:
        Console(stderr=True).print(f"{type(error).__name__}: {error}", style="red", highlight=False)
        sys.exit(2)
    for failure in failures:
        console.print(f"FAILED: {failure}", style="bold red", highlight=False)
    if failures:
        sys.exit(1)
    console.print("\n[bold green]The guard acted on every request as the policy says.[/]")


if __name__ == "__main__":
    main()
