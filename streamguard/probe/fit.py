"""`streamguard probe fit`: from labelled items to a probe with a card."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamguard.errors import ProbeError
from streamguard.probe import collect
from streamguard.probe.aggregation import Aggregation
from streamguard.probe.artifact import (
    NORM,
    AggregationCard,
    Card,
    HeadCard,
    ModelCard,
    Probe,
)
from streamguard.probe.data import Data, Item, Splits, check_balance, check_leakage, split
from streamguard.probe.model import ServedModel
from streamguard.probe.texts import Text, encode, splices
from streamguard.probe.threshold import threshold_for
from streamguard.probe.train import LOSSES, LinearProbe, Segments, segments

#: Reports what goes on: step(name, total) -> a context that is told of progress.
Step = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
_SWEEP_TEXTS = 1200
_SWEEP_LAYERS = 8
#: Statistics to choose from. Short windows act sooner, long ones see through single words.
AGGREGATIONS = (
    Aggregation("window", 1, warmup=4),
    Aggregation("window", 4, warmup=4),
    Aggregation("window", 8, warmup=4),
    Aggregation("window", 16, warmup=8),
    Aggregation("window", 32, warmup=8),
    Aggregation("consecutive", 2, warmup=4),
    Aggregation("consecutive", 4, warmup=4),
    Aggregation("consecutive", 8, warmup=8),
    Aggregation("ema", weight=0.2, warmup=4),
    Aggregation("ema", weight=0.1, warmup=8),
    Aggregation("ema", weight=0.05, warmup=8),
)
_L2 = (1e-4, 1e-3, 1e-2)


def quiet(_name: str, _total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A Step that reports nothing."""
    return nullcontext(lambda _: None)


@dataclass(frozen=True)
class FitOptions:
    """What a fit may be told.

    layers         candidate layers; None = about eight over the model's depth, the best is taken.
    loss           one of LOSSES, or None = all are tried.
    head           name of the head; categories: one more head for each category with enough items.
    hold_out       sources that are kept for the test alone.
    max_response   tokens of a response that are read; max_prompt: of a prompt, its last ones.
    max_items      most items, drawn evenly over sources and labels.
    splice         spliced texts as a share of the harmful ones.
    """

    layers: tuple[int | str, ...] | None = None
    loss: str | None = None
    head: str = "harm"
    categories: bool = False
    stage: str = "output"
    hold_out: tuple[str, ...] = ()
    max_response: int = 192
    max_prompt: int = 256
    max_items: int | None = None
    splice: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """A probe and what its fit measured.

    sweep  macro AUROC by layer; choices: what was tried and how it did.
    """

    probe: Probe
    sweep: dict[str, float]
    choices: list[dict[str, Any]]
    splits: Splits


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

    Hidden states are computed by vLLM with the serving tap; training sees the train split alone,
    layer, loss and statistic are chosen on one half of the calibration split and thresholds come
    from the other, by prompt. The card's metrics are those of the test split and the held-out sources.

    activations  folder for hidden states; a run that was cut off goes on there.
    Raises ProbeError for data or a model that cannot support a probe.
    """
    items = _limited(data.items, options)
    splits = split(items, hold_out=options.hold_out, seed=options.seed)
    check_leakage(items, splits)
    check_balance(items, splits.train, "training")
    check_balance(items, splits.calibration, "calibration")
    longest = options.max_prompt + options.max_response + 2
    engine = collect.Engine(model.name, longest, dict(engine_options or {}))
    try:
        return _fit(model, data, items, splits, options, activations, engine, step)
    finally:
        engine.close()


def _fit(
    model: ServedModel,
    data: Data,
    items: Sequence[Item],
    splits: Splits,
    options: FitOptions,
    activations: Path,
    engine: collect.Engine,
    step: Step,
) -> Fitted:
    rng = np.random.default_rng(options.seed)
    texts = list(
        encode(
            items, model.tokenizer, max_prompt=options.max_prompt, max_response=options.max_response
        )
    )
    heads, labels = _heads(items, options)
    sources = [item.source for item in items]
    layers, sweep = _choose_layer(model, texts, labels, sources, splits, options, activations, engine, step, rng)
    layer = layers[0]

    every = list(texts)
    parts = {name: getattr(splits, name) for name in ("train", "calibration", "test", "held_out")}
    spliced: dict[str, NDArray[np.int64]] = {}
    for name, chosen in parts.items():
        made = _spliced(texts, labels, chosen, options, rng) if options.stage == "output" else []
        spliced[name] = np.arange(len(every), len(every) + len(made))
        every += made
    labels = np.concatenate([labels, labels[[t.item for t in every[len(texts) :]]]])
    sources += [sources[t.item] for t in every[len(texts) :]]

    with step("reading hidden states", collect.num_tokens(every)) as progress:
        rows = collect.hidden_states(
            engine, every, [layer], activations / "fit", stage=options.stage,
            fingerprint=model.card.fingerprint, progress=progress,
        )  # fmt: skip
    engine.close()
    states = rows.array[0]
    pool = _Pool(every, rows.offsets, labels, sources, states)
    train = np.concatenate([parts["train"], spliced["train"]])
    select, threshold = _halves(items, parts["calibration"], rng)
    choices, best = _choose(pool, train, select, spliced["calibration"], options, step)
    coef, bias = best.probe.coef_, best.probe.intercept_

    scored = best.probe.scores(states)
    benign: dict[str, NDArray[np.float32]] = {}
    for column, head in enumerate(heads):
        calm = threshold[labels[threshold, column] == 0]
        benign[head] = np.sort(best.aggregation.peaks(*pool.of(scored[:, column], calm)))
    card = Card(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions=versions(),
        model=model.card,
        layer=layer,  # type: ignore[arg-type]
        stage=options.stage,  # type: ignore[arg-type]
        heads=tuple(
            HeadCard(name=head, aggregation=AggregationCard(**vars(best.aggregation)))
            for head in heads
        ),
        data=data.files,
        training={
            "loss": best.probe.loss,
            "l2": best.probe.l2,
            "seed": options.seed,
            "max_response": options.max_response,
            "max_prompt": options.max_prompt,
            "hold_out": list(options.hold_out),
            "texts": {name: len(chosen) for name, chosen in parts.items()},
            "spliced": {name: len(chosen) for name, chosen in spliced.items()},
            "sweep": {str(name): value for name, value in sweep.items()},
        },
    )
    probe = Probe(card, coef, bias, benign)
    return Fitted(probe, sweep, choices, splits)


@dataclass(frozen=True)
class _Pool:
    """Texts with their hidden states."""

    texts: Sequence[Text]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int8]
    sources: Sequence[str]
    states: Any

    def of(
        self, values: NDArray[np.float32], chosen: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The values of some texts' rows, and the offsets of these."""
        spans = [values[self.offsets[i] : self.offsets[i + 1]] for i in chosen]
        lengths = [len(span) for span in spans]
        flat = np.concatenate(spans) if spans else np.empty(0, np.float32)
        return flat.astype(np.float32), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def segments(self, chosen: NDArray[np.int64]) -> Segments:
        """What there is to train on in some texts."""
        return segments(self.texts, self.offsets, self.labels, self.sources, chosen)


@dataclass(frozen=True)
class _Choice:
    probe: LinearProbe
    aggregation: Aggregation
    value: float


def _choose(
    pool: _Pool,
    train: NDArray[np.int64],
    select: NDArray[np.int64],
    spliced: NDArray[np.int64],
    options: FitOptions,
    step: Step,
) -> tuple[list[dict[str, Any]], _Choice]:
    """Loss, regularisation and statistic that do best on the selection half."""
    parts = pool.segments(train)
    candidates = [
        LinearProbe(loss, l2=l2, seed=options.seed)
        for loss in ((options.loss,) if options.loss else LOSSES)
        for l2 in _L2
    ]
    found: list[_Choice] = []
    choices: list[dict[str, Any]] = []
    with step("training", sum(c.epochs for c in candidates) * len(parts.begin)) as progress:
        for candidate in candidates:
            candidate.fit(pool.states, parts, progress)
            whole = np.concatenate([select, spliced])
            flat, offsets = pool.of(_column(candidate, pool, whole), np.arange(len(whole)))
            for aggregation in AGGREGATIONS:
                figures = _judge(pool, aggregation, flat, offsets, select, spliced)
                value = figures["auroc"] + figures["recall"] / 2 + figures["in_time"] / 2
                found.append(_Choice(candidate, aggregation, value))
                choices.append(
                    {"loss": candidate.loss, "l2": candidate.l2, "statistic": str(aggregation), **figures}
                )
    return choices, max(found, key=lambda choice: choice.value)
