"""`streamguard probe fit`: from labelled items to a probe with a card."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from streamguard.errors import ProbeError
from streamguard.probe import choose, collect
from streamguard.probe.artifact import NORM, AggregationCard, Card, DataCard, HeadCard, Probe
from streamguard.probe.data import (
    Data,
)
from streamguard.probe.extra import need
from streamguard.probe.measure import Measured, held_out, localisation, measure
from streamguard.probe.model import ServedModel, versions
from streamguard.probe.pool import Index, Pool
from streamguard.probe.prepare import FitOptions, Prepared, prepare
from streamguard.probe.train import LOSSES, LinearProbe

#: Says what goes on: step(name, total) gives a context that is told how much was done.
Step = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
_SWEEP_TOKENS = 96


def quiet(_name: str, _total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A Step that says nothing."""
    return nullcontext(lambda _: None)


@dataclass(frozen=True)
class Fitted:
    """A probe and what its fit measured; sweep: (layer, figure) in the model's order."""

    probe: Probe
    measured: Measured | None
    sweep: list[tuple[int | str, float]] = field(default_factory=list)


def fit(
    model: ServedModel,
    data: Data,
    options: FitOptions,
    activations: Path,
    *,
    engine_options: dict[str, Any] | None = None,
    step: Step = quiet,
) -> Fitted:
    """Fit a probe on labelled items.

    Hidden states come from vLLM with the serving tap. Training sees the train split alone; layer,
    loss and statistic are chosen on one half of the calibration split, thresholds come from the
    other half, both by prompt; the card's figures are those of the test split and of the held-out
    sources.

    activations  folder for hidden states; a run that was cut off goes on there.
    Raises ProbeError for data or a model that cannot support a probe.
    """
    check_layers(model, options.layers or ())
    if options.baselines and options.stage == "output":
        need("sklearn", "the card's baselines need")  # now, not after an hour of work
    ready = prepare(data, model, options)
    items, part = ready.items, ready.part
    longest = options.max_prompt + options.max_response + 2
    engine = collect.Engine(model.name, longest, dict(engine_options or {}))
    try:
        layer, sweep = _layer(model, ready, options, activations, engine, step)
        texts = [ready.every[i] for i in ready.used]
        with step("reading hidden states", collect.num_tokens(texts)) as progress:
            rows = collect.hidden_states(
                engine, texts, [layer], activations / "fit", stage=options.stage,
                fingerprint=model.card.fingerprint, progress=progress,
            )  # fmt: skip
    finally:
        engine.close()

    pool, here, cut = ready.pool(rows)
    groups = [items[i].prompt_id for i in part["calibration"]]
    select, decide = halves(groups, here["calibration"], ready.rng)
    losses = 1 if options.loss else len(LOSSES)
    train = np.concatenate([here["train"], cut["train"]])
    work = losses * LinearProbe().epochs * len(pool.segments(train).begin)
    with step("training", work) as progress:
        choices = choose.choose(
            pool, train, select, cut["calibration"], options.loss, options.seed, progress
        )
    best = choices[0]
    scores = best.probe.scores(pool.rows)
    told = {
        "options": asdict(options),
        "parts": {name: len(chosen) for name, chosen in part.items()},
        "spliced": {name: len(chosen) for name, chosen in ready.spliced.items()},
        "dropped": ready.splits.dropped,
        "sweep": {str(name): round(value, 4) for name, value in sweep},
    }
    probe = assemble(
        model, layer, ready.heads, choices, pool, decide, data.files, told, options.stage
    )
    measured = None
    if options.stage == "output":
        judged = np.concatenate([here["test"], here["held_out"]])
        train_items = [items[i] for i in part["train"]] if options.baselines else []
        measured = measure(
            probe, pool, scores, judged, np.concatenate([cut["test"], cut["held_out"]]),
            ready.used_items, train_items, step=step,
        )  # fmt: skip
        unspliced = _unspliced(pool, here, cut, select, best, options)
        metrics = {
            **measured.results,
            "held_out": held_out(measured.results, options.hold_out),
            "localisation_without_splices": unspliced,
        }
        probe = replace(probe, card=probe.card.model_copy(update={"metrics": metrics}))
    return Fitted(probe, measured, sweep)


def check_layers(model: ServedModel, layers: Sequence[int | str]) -> None:
    """Raise ProbeError for a layer that the model does not have, before an engine starts."""
    last = model.card.num_layers - 1
    for layer in layers:
        if layer != NORM and not (isinstance(layer, int) and 0 <= layer <= last):
            raise ProbeError(
                f"layer {layer} of {model.card.name}: it has the layers 0..{last}, and {NORM!r}."
            )


def assemble(
    model: ServedModel,
    layer: int | str,
    heads: Sequence[str],
    choices: Sequence[choose.Choice],
    pool: Pool,
    decide: Index,
    files: tuple[DataCard, ...],
    training: dict[str, Any],
    stage: str = "output",
) -> Probe:
    """The best choice as a probe; `decide`: the texts whose benign ones thresholds come from."""
    best = choices[0]
    scores = best.probe.scores(pool.rows)
    aggregation = AggregationCard(**asdict(best.aggregation))
    card = Card.model_validate(
        {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": versions(),
            "model": model.card,
            "layer": layer,
            "stage": stage,
            "heads": tuple(HeadCard(name=head, aggregation=aggregation) for head in heads),
            "data": files,
            "training": {
                "loss": best.probe.loss,
                "choices": [choice.as_json() for choice in choices[:10]],
                **training,
            },
        }
    )
    benign = {}
    for column, head in enumerate(heads):
        calm = decide[pool.labels[decide, column] == 0]
        benign[head] = np.sort(best.aggregation.peaks(*pool.of(scores[:, column], calm)))
    return Probe(card, best.probe.coef_, best.probe.intercept_, benign)


def _layer(
    model: ServedModel,
    ready: Prepared,
    options: FitOptions,
    activations: Path,
    engine: collect.Engine,
    step: Step,
) -> tuple[int | str, list[tuple[int | str, float]]]:
    """The layer to read, and how all that were tried did on a sample of texts."""
    layers: list[int | str] = list(options.layers or choose.candidate_layers(model.card.num_layers))
    if len(layers) == 1:
        return layers[0], []
    short = [ready.every[i].cut(_SWEEP_TOKENS) for i in ready.swept]
    with step("reading layers for the sweep", collect.num_tokens(short)) as progress:
        rows = collect.hidden_states(
            engine, short, layers, activations / "sweep", stage=options.stage,
            fingerprint=model.card.fingerprint, progress=progress,
        )  # fmt: skip
    labels = ready.labels[ready.swept]
    sources = [ready.items[i].source for i in ready.swept]
    figures: list[tuple[int | str, float]] = []
    with step("comparing layers", len(layers)) as progress:
        for at, layer in enumerate(layers):
            pool = Pool(short, rows.offsets, labels, sources, np.asarray(rows.array[at]))
            figures.append((layer, choose.layer_figure(pool, options.seed)))
            progress(1)
    return choose.earliest_best(figures), figures


def halves(groups: Sequence[str], chosen: Index, rng: np.random.Generator) -> tuple[Index, Index]:
    """Divide texts in two by their groups."""
    names = sorted(set(groups))
    first = set(rng.permutation(names)[: len(names) // 2].tolist())
    mine = np.array([group in first for group in groups], bool)
    return chosen[mine], chosen[~mine]


def _unspliced(
    pool: Pool,
    here: dict[str, Index],
    cut: dict[str, Index],
    select: Index,
    best: choose.Choice,
    options: FitOptions,
) -> dict[str, Any]:
    """How a probe of the same kind localises that saw no spliced text: the baseline."""
    judged = np.concatenate([cut["test"], cut["held_out"]])
    if not len(judged):
        return {}
    plain = LinearProbe(best.probe.loss, seed=options.seed)
    scores = plain.fit(pool.rows, pool.segments(here["train"])).scores(pool.rows)[:, 0]
    calm = np.concatenate([here["test"], here["held_out"]])
    calm = calm[pool.labels[calm, 0] == 0]
    return localisation(pool, scores, best.aggregation, judged, calm)
