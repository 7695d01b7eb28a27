"""`streamguard probe fit`: from labelled items to a probe with a card."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamguard.errors import ProbeError
from streamguard.probe import choose, collect
from streamguard.probe.aggregation import Aggregation
from streamguard.probe.artifact import AggregationCard, Card, HeadCard, Probe
from streamguard.probe.data import Data, check_balance, check_leakage, split
from streamguard.probe.measure import Measured, localisation, measure
from streamguard.probe.model import ServedModel, versions
from streamguard.probe.pool import Index, Pool, drawn, heads_of
from streamguard.probe.texts import Text, encode, splices
from streamguard.probe.train import LOSSES, LinearProbe

#: Says what goes on: step(name, total) gives a context that is told how much was done.
Step = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
_SWEEP_TEXTS = 1000
_SWEEP_TOKENS = 96
_PARTS = ("train", "calibration", "test", "held_out")


def quiet(_name: str, _total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A Step that says nothing."""
    return nullcontext(lambda _: None)


@dataclass(frozen=True)
class FitOptions:
    """What a fit may be told.

    layers        candidate layers; None = about eight over the model's depth. The best is taken.
    loss          one of LOSSES; None = all are tried.
    head          name of the first head. categories: one more for each category with enough items.
    hold_out      sources that are kept for the test alone.
    max_items     most items that are read, evenly over sources and labels; None = all.
    max_response  tokens of a response that are read; max_prompt: of a prompt, its last ones.
    splice        spliced texts to train on, as a share of the harmful ones.
    baselines     whether the card has the figures of length, keywords and TF-IDF too.
    """

    layers: tuple[int | str, ...] | None = None
    loss: str | None = None
    head: str = "harm"
    categories: bool = False
    stage: str = "output"
    hold_out: tuple[str, ...] = ()
    max_items: int | None = None
    max_response: int = 160
    max_prompt: int = 256
    splice: float = 0.4
    baselines: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss is not None and self.loss not in LOSSES:
            raise ProbeError(f"loss {self.loss!r} is unknown; allowed: {', '.join(LOSSES)}.")


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
    items = data.items
    rng = np.random.default_rng(options.seed)
    if options.max_items is not None:
        kept = drawn(items, np.arange(len(items)), options.max_items, rng)
        items = tuple(items[i] for i in kept)
    splits = split(items, hold_out=options.hold_out, seed=options.seed)
    check_leakage(items, splits)
    check_balance(items, splits.train, "the training split")
    check_balance(items, splits.calibration, "the calibration split", least=10)
    heads, labels = heads_of(items, options.head, options.categories)
    part = {name: np.asarray(getattr(splits, name), np.int64) for name in _PARTS}
    limits = {"max_prompt": options.max_prompt, "max_response": options.max_response}
    texts = list(encode(items, model.tokenizer, **limits))
    sources = [item.source for item in items]
    longest = options.max_prompt + options.max_response + 2
    engine = collect.Engine(model.name, longest, dict(engine_options or {}))
    try:
        fitting = np.concatenate([part["train"], part["calibration"]])
        swept = drawn(items, fitting, _SWEEP_TEXTS, rng)
        layer, sweep = _layer(
            model, texts, labels, sources, swept, options, activations, engine, step
        )
        every, spliced = _with_splices(texts, labels[:, 0], part, options, rng)
        of_item = np.array([text.item for text in every])
        used = np.concatenate([*part.values(), *spliced.values()])
        with step(
            "reading hidden states", collect.num_tokens([every[i] for i in used])
        ) as progress:
            rows = collect.hidden_states(
                engine, [every[i] for i in used], [layer], activations / "fit", stage=options.stage,
                fingerprint=model.card.fingerprint, progress=progress,
            )  # fmt: skip
    finally:
        engine.close()

    place = np.full(len(every), -1)
    place[used] = np.arange(len(used))
    pool = Pool(
        [every[i] for i in used], rows.offsets, labels[of_item[used]],
        [sources[of_item[i]] for i in used], rows.array[0],
    )  # fmt: skip
    here = {name: place[chosen] for name, chosen in part.items()}
    cut = {name: place[chosen] for name, chosen in spliced.items()}
    select, decide = _halves(
        [items[i].prompt_id for i in part["calibration"]], here["calibration"], rng
    )
    losses = 1 if options.loss else len(LOSSES)
    train = np.concatenate([here["train"], cut["train"]])
    work = losses * LinearProbe().epochs * len(pool.segments(train).begin)
    with step("training", work) as progress:
        choices = choose.choose(
            pool, train, select, cut["calibration"], options.loss, options.seed, progress
        )
    best = choices[0]
    scores = best.probe.scores(pool.rows)
    card = Card(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions=versions(),
        model=model.card,
        layer=layer,  # type: ignore[arg-type]
        stage=options.stage,  # type: ignore[arg-type]
        heads=tuple(_head_card(head, best.aggregation) for head in heads),
        data=data.files,
        training={
            **asdict(options),
            "loss": best.probe.loss,
            "parts": {name: len(chosen) for name, chosen in part.items()},
            "spliced": {name: len(chosen) for name, chosen in spliced.items()},
            "dropped": splits.dropped,
            "sweep": {str(name): round(value, 4) for name, value in sweep},
            "choices": [choice.as_json() for choice in choices[:10]],
        },
    )
    benign = {
        head: _benign_peaks(pool, scores[:, column], column, decide, best.aggregation)
        for column, head in enumerate(heads)
    }
    probe = Probe(card, best.probe.coef_, best.probe.intercept_, benign)
    measured = None
    if options.stage == "output":
        judged = np.concatenate([here["test"], here["held_out"]])
        train_items = [items[i] for i in part["train"]] if options.baselines else []
        measured = measure(
            probe, pool, scores, judged, np.concatenate([cut["test"], cut["held_out"]]),
            [items[of_item[i]] for i in used], train_items, step=step,
        )  # fmt: skip
        unspliced = _unspliced(pool, here, cut, select, best, options)
        metrics = {
            **measured.results,
            "held_out": _held_out(measured.results, options.hold_out),
            "localisation_without_splices": unspliced,
        }
        probe = Probe(
            card.model_copy(update={"metrics": metrics}), probe.weight, probe.bias, benign
        )
    return Fitted(probe, measured, sweep)


def _layer(
    model: ServedModel,
    texts: Sequence[Text],
    labels: NDArray[np.int8],
    sources: Sequence[str],
    swept: Index,
    options: FitOptions,
    activations: Path,
    engine: collect.Engine,
    step: Step,
) -> tuple[int | str, list[tuple[int | str, float]]]:
    """The layer to read, and how all that were tried did on a sample of texts."""
    layers: list[int | str] = list(options.layers or choose.candidate_layers(model.card.num_layers))
    if len(layers) == 1:
        return layers[0], []
    short = [_cut(texts[i], _SWEEP_TOKENS) for i in swept]
    with step("reading layers for the sweep", collect.num_tokens(short)) as progress:
        rows = collect.hidden_states(
            engine, short, layers, activations / "sweep", stage=options.stage,
            fingerprint=model.card.fingerprint, progress=progress,
        )  # fmt: skip
    named = [sources[i] for i in swept]
    figures: list[tuple[int | str, float]] = []
    with step("comparing layers", len(layers)) as progress:
        for at, layer in enumerate(layers):
            pool = Pool(short, rows.offsets, labels[swept], named, np.asarray(rows.array[at]))
            figures.append((layer, choose.layer_figure(pool, options.seed)))
            progress(1)
    return choose.earliest_best(figures), figures


def _cut(text: Text, most: int) -> Text:

    return replace(text, response=text.response[:most], harmful=text.harmful[:most])


def _with_splices(
    texts: list[Text],
    label: NDArray[np.int8],
    part: dict[str, Index],
    options: FitOptions,
    rng: np.random.Generator,
) -> tuple[list[Text], dict[str, Index]]:
    """All texts, and for each part the numbers of the spliced ones made of its own texts."""
    every, made_of = list(texts), {}
    for name, chosen in part.items():
        calm, bad = chosen[label[chosen] == 0], chosen[label[chosen] == 1]
        judged = name in ("test", "held_out")
        count = 0 if options.stage == "prompt" else int(len(bad) * options.splice)
        made = splices(
            texts, calm.tolist(), bad.tolist(), count=min(count, 400) if judged else count,
            max_response=options.max_response, rng=rng, first=(64, 65) if judged else (8, 97),
            back=0.0 if judged else 0.25, middle=0.0 if judged else 0.5,
        )  # fmt: skip
        made_of[name] = np.arange(len(every), len(every) + len(made), dtype=np.int64)
        every += made
    return every, made_of


def _halves(groups: Sequence[str], chosen: Index, rng: np.random.Generator) -> tuple[Index, Index]:
    """Divide texts in two by their groups."""
    names = sorted(set(groups))
    first = set(rng.permutation(names)[: len(names) // 2].tolist())
    mine = np.array([group in first for group in groups], bool)
    return chosen[mine], chosen[~mine]


def _head_card(head: str, aggregation: Aggregation) -> HeadCard:
    return HeadCard(name=head, aggregation=AggregationCard(**asdict(aggregation)))


def _benign_peaks(
    pool: Pool, scores: NDArray[np.float32], column: int, chosen: Index, aggregation: Aggregation
) -> NDArray[np.float32]:
    calm = chosen[pool.labels[chosen, column] == 0]
    return np.sort(aggregation.peaks(*pool.of(scores, calm)))


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


def _held_out(results: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Mean AUROC over the held-out sources that have both labels, the baselines' beside it."""
    groups = [results["with_refusals"]["sources"][name] for name in names]
    groups = [group for group in groups if group["auroc"]["value"] is not None]
    if not groups:
        return {}
    baselines = groups[0].get("baselines", {})
    return {
        "sources": len(groups),
        "auroc": float(np.mean([group["auroc"]["value"] for group in groups])),
        "baselines": {
            name: float(np.mean([group["baselines"][name]["auroc"]["value"] for group in groups]))
            for name in baselines
        },
    }
