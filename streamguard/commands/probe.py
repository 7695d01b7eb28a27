"""`streamguard probe`: fit, calibrate, evaluate and show probes on a model's hidden states."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from streamguard.commands.terminal import InputError, count, print_table, warn

Model = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help="The served model: a folder or a name."),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="Where the probe goes.")
]
Lenient = Annotated[
    bool,
    typer.Option("--lenient", help="Leave out broken rows and count them, instead of refusing."),
]
Activations = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Keep what the engine computed here; the same command then goes on where it was cut "
        "off. A temporary folder, removed at the end, if not given.",
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=16, help="Tokens of a response that are read; all of them, as in serving, if not given."
    ),
]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="KEY=VALUE",
        help="A further argument of vLLM's engine, such as tensor_parallel_size=2; may be repeated.",
    ),
]


def fit_command(
    model: Model,
    output: Output,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", "-d", metavar="FILE", help="Labelled items; may be repeated."),
    ] = None,
    concept: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Fit a topic from this concept file instead of data."),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="auto, a layer, or several (8,12,norm), of which the best is taken.")
    ] = "auto",
    loss: Annotated[
        str | None, typer.Option(help="token, mean or window; all are tried if not given.")
    ] = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Keep a source for the test alone; may be repeated."),
    ] = None,
    stage: Annotated[
        str, typer.Option(help="output: read responses; prompt: read prompts.")
    ] = "output",
    head: Annotated[
        str, typer.Option(help="Name of the head that harm of any kind gets.")
    ] = "harm",
    categories: Annotated[
        bool,
        typer.Option("--categories", help="One more head for each category with enough items."),
    ] = False,
    max_items: Annotated[
        int | None,
        typer.Option(min=100, help="Read at most so many items, evenly over sources and labels."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=16, max=4096, help="Tokens of a response that are read.")
    ] = 160,
    splice: Annotated[
        float, typer.Option(min=0, max=4, help="Spliced texts, as a share of the harmful ones.")
    ] = 0.4,
    seed: Annotated[int, typer.Option(help="For splits, batches and splices.")] = 0,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write an HTML report with plots here.")
    ] = None,
    activations: Activations = None,
    lenient: Lenient = False,
    engine: EngineOptions = None,
) -> None:
    """Fit a probe: a linear score of the model's own hidden states, for each token that it writes.

    Hidden states are computed by vLLM with the tap that serving uses. Prompts are divided into
    parts that share none; the layer, the loss and the statistic are chosen on one, thresholds come
    from another, and the card's figures from a third and from the sources held out.

    \b
    Data is JSONL with prompt, response, label (1 harmful, 0 not) and, if known, source, category,
    refusal and spans; or BeaverTails, WildGuardMix, ToxicChat, XSTest, Do-Not-Answer or HarmBench
    as they are published.

    \b
    Example:
      streamguard probe fit -m MODEL -d items.jsonl -o harm.safetensors
      streamguard probe fit -m MODEL --concept cooking.yaml -o cooking.safetensors
    """
    from streamguard.probe.fit import fit
    from streamguard.probe.model import ServedModel
    from streamguard.probe.prepare import FitOptions

    if bool(data) == (concept is not None):
        raise InputError("give either --data FILE (labelled items) or --concept FILE, one of them.")
    if report is not None and (concept is not None or stage == "prompt"):
        raise InputError("--report: there are figures of responses only, from --data FILE.")
    _can_draw(report)
    _writable(output)
    served = ServedModel(model)
    chosen = _layers(layers)
    with _folder(activations) as folder:
        if concept is not None:
            from streamguard.probe.concept import fit_concept
            from streamguard.probe.concept_file import Concept

            if chosen is not None and len(chosen) > 1:
                raise InputError(f"--layers {layers}: a concept is fitted on one layer. Name one.")
            fitted = fit_concept(
                served, Concept.load(concept), concept, folder, layer=chosen[0] if chosen else None,
                seed=seed, engine_options=_options(engine), step=_step,
            )  # fmt: skip
        else:
            options = FitOptions(
                layers=chosen, loss=loss, head=head, categories=categories, stage=stage,
                hold_out=tuple(hold_out or ()), max_items=max_items, max_response=max_tokens,
                splice=splice, seed=seed,
            )  # fmt: skip
            read = _read(data or [], lenient, stage=stage)
            fitted = fit(served, read, options, folder, engine_options=_options(engine), step=_step)
    fitted.probe.save(output)
    if report is not None and fitted.measured is not None:
        _report(report, fitted.probe, fitted.measured, fitted.sweep)
    _summary(fitted.probe, output)


def calibrate_command(
    probe: Annotated[Path, typer.Argument(metavar="PROBE", help="A fitted probe.")],
    model: Model,
    benign: Annotated[
        list[Path],
        typer.Option("--benign", "-b", metavar="FILE", help="Benign items; may be repeated."),
    ],
    output: Output,
    max_tokens: MaxTokens = None,
    activations: Activations = None,
    lenient: Lenient = False,
    engine: EngineOptions = None,
) -> None:
    """Take a probe's thresholds from your own benign traffic.

    A rule's `threshold: {fpr: 0.01}` means the share of benign texts that are halted. It holds for
    texts like those that the probe was calibrated with, so give it yours: JSONL with prompt and
    response; no labels are needed. Responses are read to their ends, as they are when served: a
    long one has more occasions to reach a threshold than a short one. 45 items can show an FPR of 5%
    at 90% confidence, 230 one of 1%.

    \b
    Example:
      streamguard probe calibrate harm.safetensors -m MODEL --benign mine.jsonl -o mine.safetensors
    """
    from streamguard.probe.apply import calibrate
    from streamguard.probe.artifact import Probe
    from streamguard.probe.model import ServedModel

    _writable(output)
    loaded = Probe.load(probe)
    data = _read(benign, lenient, role="calibration", stage=loaded.card.stage)
    harmful = sum(item.label for item in data.items)
    if harmful:
        warn(
            f"{count(harmful, 'item')} labelled harmful left out: thresholds come from benign texts."
        )
    with _folder(activations) as folder:
        made = calibrate(
            loaded, ServedModel(model), data, folder, max_tokens=max_tokens,
            engine_options=_options(engine), step=_step,
        )  # fmt: skip
    made.save(output)
    _summary(made, output)


def eval_command(
    probe: Annotated[Path, typer.Argument(metavar="PROBE", help="A fitted probe.")],
    model: Model,
    data: Annotated[
        list[Path],
        typer.Option("--data", "-d", metavar="FILE", help="Labelled items; may be repeated."),
    ],
    train: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Labelled items to fit the baselines on."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write an HTML report with plots here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    max_tokens: MaxTokens = None,
    activations: Activations = None,
    lenient: Lenient = False,
    engine: EngineOptions = None,
) -> None:
    """Measure a probe on labelled items: per source and pooled, with intervals and baselines.

    Responses are read to their ends, as they are when served. Given the files that it was fitted
    on, it judges only what the fit kept from training, as far as the fit read it, and says whether
    the figures of the probe's card are reproduced (exit code 1 if not).

    \b
    Example:
      streamguard probe eval harm.safetensors -m MODEL -d items.jsonl --report report/
    """
    from streamguard.probe.apply import judge
    from streamguard.probe.artifact import Probe
    from streamguard.probe.model import ServedModel

    _can_draw(report)
    loaded = Probe.load(probe)
    if loaded.card.stage != "output":
        raise InputError(f"{probe}: reads prompts; only probes of responses can be evaluated.")
    read = _read(data, lenient)
    fitting = _read(train, lenient).items if train else ()
    with _folder(activations) as folder:
        measured, differences = judge(
            loaded, ServedModel(model), read, folder, train=fitting, max_tokens=max_tokens,
            engine_options=_options(engine), step=_step,
        )  # fmt: skip
    if report is not None:
        _report(report, loaded, measured, [])
    if as_json:
        print(json.dumps({**measured.results, "differs_from_card": differences}))
    else:
        from rich.console import Console

        from streamguard.probe.report import figures_table

        # A file or a pipe has no width; what is there is for somebody to look at later.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
        console.print(figures_table(measured.results, narrow=console.width < 130))
        print(_localisation(measured.results))
        if differences is not None:
            print("the card's figures are reproduced" if not differences else "NOT reproduced:")
            for line in differences[:20]:
                print(f"  {line}")
    if differences:
        raise typer.Exit(1)


def show_command(
    probe: Annotated[Path, typer.Argument(metavar="PROBE", help="A fitted probe.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole card as JSON.")] = False,
) -> None:
    """Print a probe's card: model, layer, heads, data, thresholds and figures.

    \b
    Example:
      streamguard probe show harm.safetensors
    """
    from streamguard.probe.artifact import Probe

    loaded = Probe.load(probe)
    if as_json:
        print(loaded.card.model_dump_json())
        return
    _summary(loaded, probe)


def _summary(probe: Any, path: Path) -> None:
    from streamguard.errors import ProbeError
    from streamguard.probe.threshold import DEFAULT_CONFIDENCE

    card = probe.card
    where = (
        "last norm" if card.layer == "norm" else f"layer {card.layer} of {card.model.num_layers}"
    )
    print(f"{path}: sha256 {probe.sha256[:12]}, {card.date}")
    print(
        f"model      {card.model.name} ({card.model.fingerprint[:12]}), {where}, reads the {card.stage}"
    )
    for entry in card.data:
        licences = ", ".join(entry.licences) or "no licence stated"
        items = f"{count(entry.items, 'item')}, {entry.positive} harmful"
        print(f"{entry.role:10} {entry.name}: {items}; {licences}")
    rows = []
    for head in probe.heads:
        row = [head, str(probe.aggregation(head)), f"{len(probe.benign[head])}"]
        for fpr in (0.001, 0.01, 0.05):
            try:
                row.append(f"{probe.threshold(head, fpr):.2f}")
            except ProbeError:
                row.append("too few")
        rows.append(row)
    columns = ("head", "statistic", "benign texts", "FPR .1%", "FPR 1%", "FPR 5%")
    print_table(columns, rows)
    read = card.read_tokens
    print(
        f"thresholds hold with {DEFAULT_CONFIDENCE:.0%} confidence, for texts like the benign ones, "
        + ("which were read to their ends" if read is None else f"of {read:,} tokens at most")
    )
    figures = card.metrics
    if figures:
        pooled, macro = (figures["with_refusals"][name] for name in ("pooled", "macro"))
        print(
            f"figures    AUROC {_figure(macro['auroc'])} macro, {_figure(pooled['auroc'])} pooled; "
            f"recall at 5% FPR {_figure(pooled['tpr_at_fpr']['0.05'])}"
        )
        held = figures.get("held_out")
        if held:
            beside = ", ".join(f"{name} {value:.2f}" for name, value in held["baselines"].items())
            print(f"held out   AUROC {held['auroc']:.3f} over {held['sources']} sources ({beside})")
        print(_localisation(figures))


def _figure(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "–"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _localisation(figures: dict[str, Any]) -> str:
    lines = []
    for key, name in (("localisation", "spliced"), ("localisation_without_splices", "baseline")):
        found = figures.get(key)
        if found:
            delay = found["median_delay_tokens"]
            lines.append(
                f"{name:10} {found['caught']:.0%} of {found['texts']} texts that turn harmful are "
                f"halted behind the onset at 5% FPR, "
                + (
                    f"{delay:.0f} tokens behind it (median)"
                    if delay is not None
                    else "none in time"
                )
            )
            turns = found["benign_turns"]
            if turns["texts"]:
                lines.append(
                    f"{'':10} {turns['halted_behind']:.0%} of {turns['texts']} that turn to another "
                    f"benign text there are halted, too"
                )
    return "\n".join(lines) or "no spliced texts: nothing is known of how soon it acts"


def _report(folder: Path, probe: Any, measured: Any, sweep: list[tuple[Any, float]]) -> None:
    from streamguard.probe.report import write_report

    layers = [{"layer": layer, "auroc": v, "low": v, "high": v} for layer, v in sweep] or None
    paths = write_report(folder, probe.card, measured.results, measured.scored, layers)
    print(f"report: {paths[0]}", file=sys.stderr)


def _read(paths: list[Path], lenient: bool, role: str = "fit", stage: str = "output") -> Any:
    from streamguard.probe.data import read

    if stage not in ("output", "prompt"):
        raise InputError(f"--stage {stage}: allowed: output, prompt.")
    data = read(paths, role=role, lenient=lenient, stage=stage)  # type: ignore[arg-type]
    for line in data.skipped:
        warn(line)
    return data


def _layers(given: str) -> tuple[int | str, ...] | None:
    if given == "auto":
        return None
    found: list[int | str] = []
    for part in given.split(","):
        name = part.strip()
        if name == "norm":
            found.append(name)
        elif name.isdecimal():
            found.append(int(name))
        else:
            raise InputError(
                f"--layers {given}: {name!r} is no layer; allowed: auto, numbers, norm."
            )
    return tuple(found)


def _options(given: list[str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for entry in given or ():
        key, separator, value = entry.partition("=")
        if not separator or not key.isidentifier():
            raise InputError(f"--engine {entry}: write KEY=VALUE, such as tensor_parallel_size=2.")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def _can_draw(report: Path | None) -> None:
    if report is not None:
        from streamguard.probe.extra import need

        need("matplotlib", "a report needs")


def _writable(path: Path) -> None:
    """Find out now, not after half an hour of work."""
    if not path.parent.is_dir():
        raise InputError(f"-o {path}: the folder {path.parent} does not exist. Make it first.")
    if path.is_dir():
        raise InputError(f"-o {path}: is a folder. Name a file.")


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix="streamguard-activations-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _step(name: str, total: int) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, from the first moment: each of these steps takes long."""
    if not sys.stderr.isatty():
        print(name, file=sys.stderr, flush=True)
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:28}"), BarColumn(), TaskProgressColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.advance(task, done)
