"""A finished probe on other texts: thresholds from an operator's own traffic, figures on new data."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from streamguard.errors import ProbeError
from streamguard.probe import collect
from streamguard.probe.artifact import Card, Probe
from streamguard.probe.data import Data
from streamguard.probe.evaluate import reproduces
from streamguard.probe.fit import Step, quiet
from streamguard.probe.items import HARMFUL, Item
from streamguard.probe.measure import Measured, held_out, measure
from streamguard.probe.model import ServedModel
from streamguard.probe.pool import Pool, heads_of
from streamguard.probe.prepare import FitOptions, judged_splices, prepare
from streamguard.probe.texts import Text, encode
from streamguard.probe.threshold import DEFAULT_CONFIDENCE, needed_benign

#: Between a card's figures and those of the same texts read again: other batches round otherwise.
TOLERANCE = 0.02
_LEAST_BENIGN = 45  # shows 5% at 90% confidence with no alarm at all


def check_model(probe: Probe, model: ServedModel) -> None:
    """Raise ProbeError unless the probe was fitted on this model's very weights."""
    card, served = probe.card.model, model.card
    for what in ("num_layers", "hidden_size", "fingerprint"):
        mine, theirs = getattr(card, what), getattr(served, what)
        if mine != theirs:
            short = (str(mine)[:12], str(theirs)[:12])
            raise ProbeError(
                f"the probe was fitted on {card.name} ({what} {short[0]}), the model given is "
                f"{served.name} ({what} {short[1]}). A probe reads one model's hidden states and means "
                f"nothing on others: name that model, or fit a probe for this one."
            )


def calibrate(
    probe: Probe,
    model: ServedModel,
    data: Data,
    folder: Path,
    *,
    max_tokens: int | None = None,
    engine_options: dict[str, Any] | None = None,
    step: Step = quiet,
) -> Probe:
    """The probe with thresholds from other benign texts: those that it is to let pass.

    data    harmful items in it are left out. folder: for scores, 4 bytes a token and head.
    max_tokens  tokens of a response that are read; None = all of them, as when it is served: the
            longer a response, the more occasions has its statistic to reach a threshold.
    Raises ProbeError for another model, or too few benign items for any usual rate.
    """
    check_model(probe, model)
    items = [item for item in data.items if item.label != HARMFUL]
    if len(items) < _LEAST_BENIGN:
        raise ProbeError(
            f"{len(items)} benign items ({len(data.items) - len(items)} harmful ones were left out); "
            f"at least {needed_benign(0.05, DEFAULT_CONFIDENCE)} are needed to show an FPR of 5%, "
            f"{needed_benign(0.01, DEFAULT_CONFIDENCE)} for 1%. Give more benign items."
        )
    if max_tokens is not None and probe.card.stage == "prompt":
        raise ProbeError(
            f"max_tokens is {max_tokens}, but the probe reads prompts, and these whole. Leave "
            f"--max-tokens out."
        )
    texts = whole(items, model, max_tokens, probe.card.stage)
    rows = _scores(probe, model, texts, folder, engine_options, step)
    pool = Pool(texts, rows.offsets, np.zeros((len(texts), 1), np.int8), [], rows.array)
    every = np.arange(len(texts))
    benign = {
        head: np.sort(
            probe.aggregation(head).peaks(*pool.of(np.asarray(rows.array[:, column]), every))
        )
        for column, head in enumerate(probe.heads)
    }
    files = tuple(card for card in probe.card.data if card.role != "calibration")
    files += tuple(card.model_copy(update={"max_tokens": max_tokens}) for card in data.files)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return replace(
        probe, card=probe.card.model_copy(update={"data": files, "date": today}), benign=benign
    )


def judge(
    probe: Probe,
    model: ServedModel,
    data: Data,
    folder: Path,
    *,
    train: Sequence[Item] = (),
    max_tokens: int | None = None,
    engine_options: dict[str, Any] | None = None,
    step: Step = quiet,
) -> tuple[Measured, list[str] | None]:
    """Figures of a probe on labelled items, read anew through vLLM.

    Where the files are those of its fit, only the items that the fit kept from training are judged,
    as far as it read them, with the same spliced texts, and the second value says where the card's
    figures differ (nothing: they are reproduced). Otherwise all items are judged and it is None.

    train       items to fit the baselines on; those of the fit if the files are its own.
    max_tokens  tokens of a response of other files that are read; None = all of them.
    """
    check_model(probe, model)
    fitted = {card.sha256 for card in probe.card.data if card.role == "fit"}
    same = bool(fitted) and fitted == {card.sha256 for card in data.files}
    options = _limits(probe.card)
    if same and max_tokens is not None:
        raise ProbeError(
            f"max_tokens is {max_tokens}, but these are the files of the probe's own fit: to compare "
            f"with its card, {options.max_response} tokens of a response are read, as the fit did. "
            f"Leave --max-tokens out."
        )
    if same:
        ready = prepare(data, model, options)
        part, cut = ready.part, ready.spliced
        used = np.concatenate([part["test"], part["held_out"], cut["test"], cut["held_out"]])
        texts = [ready.every[i] for i in used]
        train = [ready.items[i] for i in part["train"]] if options.baselines else []
    else:
        items = list(data.items)
        _, labels = heads_of(items, probe.heads[0], categories=False)
        texts = whole(items, model, max_tokens)
        plain = len(texts)
        texts += _spliced(texts, options)
    rows = _scores(probe, model, texts, folder, engine_options, step)
    if same:
        pool, here, where = ready.pool(rows, used)
        judged = np.concatenate([here["test"], here["held_out"]])
        spliced = np.concatenate([where["test"], where["held_out"]])
        behind = [ready.items[text.item] for text in texts]
    else:
        behind = [items[text.item] for text in texts]
        of_item = labels[[text.item for text in texts]]
        unknown = np.full((len(texts), len(probe.heads) - 1), -1, np.int8)
        pool = Pool(
            texts, rows.offsets, np.concatenate([of_item, unknown], axis=1),
            [item.source for item in behind], rows.array,
        )  # fmt: skip
        judged, spliced = np.arange(plain), np.arange(plain, len(texts))
    measured = measure(
        probe, pool, np.asarray(rows.array), judged, spliced, behind, train, step=step
    )
    if not same:
        return measured, None
    measured.results["held_out"] = held_out(measured.results, options.hold_out)
    card = {k: v for k, v in probe.card.metrics.items() if k != "localisation_without_splices"}
    return measured, reproduces(card, measured.results, TOLERANCE)


def whole(
    items: Sequence[Item], model: ServedModel, max_tokens: int | None, stage: str = "output"
) -> list[Text]:
    """Items as they are read when served: prompts whole, responses as far as the context goes.

    Where a response follows, a prompt longer than half the context loses its beginning.
    max_tokens  tokens of a response that are read at most; None = all that the context allows.
    """
    most = model.context - 1  # vLLM wants to write one token behind
    prompts = most if stage == "prompt" else model.context // 2
    limit = most if max_tokens is None else max_tokens
    found = encode(items, model.tokenizer, max_prompt=prompts, max_response=limit, stage=stage)
    return [text.cut(most - len(text.prompt)) for text in found]


def _limits(card: Card) -> FitOptions:
    """The options of the fit, as its card has them."""
    given = dict(card.training.get("options", {}))
    for name in ("layers", "hold_out"):
        if given.get(name) is not None:
            given[name] = tuple(given[name])
    try:
        return FitOptions(**given)
    except TypeError as error:
        raise ProbeError(
            f"the card's training options cannot be read ({error}). Fit it again."
        ) from None


def _spliced(texts: list[Text], options: FitOptions) -> list[Text]:
    calm = [i for i, text in enumerate(texts) if not text.label]
    bad = [i for i, text in enumerate(texts) if text.label]
    rng = np.random.default_rng(options.seed)
    return judged_splices(texts, calm, bad, min(400, len(bad)), options, rng)


def _scores(
    probe: Probe,
    model: ServedModel,
    texts: Sequence[Text],
    folder: Path,
    engine_options: dict[str, Any] | None,
    step: Step,
) -> collect.Rows:
    longest = max(len(text.prompt) + len(text.response) for text in texts)
    engine = collect.Engine(model.name, longest + 1, dict(engine_options or {}))
    try:
        with step("reading scores", collect.num_tokens(texts)) as progress:
            return collect.scores(
                engine, texts, [(probe.card.layer, probe.weight, probe.bias)], folder,
                stage=probe.card.stage, fingerprint=model.card.fingerprint, progress=progress,
            )  # fmt: skip
    finally:
        engine.close()
