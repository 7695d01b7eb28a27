"""A probe's figures on labelled texts: by `evaluate`, beside baselines, and where harm begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamguard.errors import ProbeError
from streamguard.probe.aggregation import Aggregation
from streamguard.probe.artifact import Probe
from streamguard.probe.choose import area
from streamguard.probe.evaluate import Scored, evaluate
from streamguard.probe.items import Item
from streamguard.probe.pool import Index, Pool
from streamguard.probe.threshold import just_above

#: Beside the baselines: the mean of a text's scores, what they say of it once all of it was sent.
MEAN_SCORE = "mean of all its scores"
#: The rate at which the card's recall and localisation are stated.
FPR = 0.05


@dataclass(frozen=True)
class Measured:
    """Figures as `evaluate` gives them, and the texts they are of (for plots)."""

    results: dict[str, Any]
    scored: Scored


def measure(
    probe: Probe,
    pool: Pool,
    scores: NDArray[np.float32],
    judged: Index,
    spliced: Index,
    items: Sequence[Item],
    train: Sequence[Item],
    *,
    step: Callable[[str, int], AbstractContextManager[Callable[[int], None]]],
) -> Measured:
    """Figures of the first head on some texts of a pool; of further heads their AUROC.

    scores   float32[num_rows, num_heads] of all texts of the pool.
    judged   texts as they came; spliced: texts that turn at a known token, harmful or benign.
    items    of each text of the pool. train: what baselines are fitted on; none = only
             the mean of the texts' own scores stands beside the figures.

    The threshold is that of the probe's calibration at an FPR of 5%, or, where too few benign texts
    support it, the lowest that they support.
    """
    head = probe.heads[0]
    aggregation = probe.aggregation(head)
    flat, offsets = pool.of(scores[:, 0], judged)
    mine = [items[i] for i in judged]
    scored = Scored(
        scores=flat,
        offsets=offsets,
        label=pool.labels[judged, 0],
        source=[item.source for item in mine],
        prompt_id=[item.prompt_id for item in mine],
        refusal=np.array([bool(item.refusal) for item in mine]),
        onset=np.full(len(judged), -1, np.int64),
        length=np.array([pool.texts[i].length for i in judged], np.int64),
        text=[item.response for item in mine],
    )
    baselines = {MEAN_SCORE: _means(flat, offsets)}
    if train:
        baselines |= _baselines(train, scored.text, step)
    threshold, fpr = _threshold(probe, head)
    with step("resampling figures", 1) as progress:
        told = 0.0

        def report(done: int, total: int) -> None:
            nonlocal told
            progress(done / max(total, 1) - told)  # type: ignore[arg-type]
            told = done / max(total, 1)

        results = evaluate(scored, aggregation, threshold, baselines=baselines, progress=report)
    results["head"] = head
    results["nominal_fpr"] = fpr
    results["other_heads"] = {
        name: _area(probe, pool, scores, column, judged)
        for column, name in enumerate(probe.heads)
        if column
    }
    calm = judged[pool.labels[judged, 0] == 0]
    results["localisation"] = localisation(pool, scores[:, 0], aggregation, spliced, calm)
    return Measured(results, scored)


def localisation(
    pool: Pool,
    scores: NDArray[np.float32],
    aggregation: Aggregation,
    spliced: Index,
    benign: Index,
) -> dict[str, Any]:
    """How soon texts are halted that turn harmful at a known token, at 5% FPR of `benign` texts.

    An alarm before the onset is not a catch. Delays are tokens from there (of a text with spans: from
    its first harmful token) to the token behind which the text is halted. Those `spliced` texts that are
    of a benign item turn to another benign text: a control, since a probe may take any turn for harm.
    Empty if there is nothing to measure on.
    """
    texts = [pool.texts[i] for i in spliced]
    harmful = np.array([text.label == 1 for text in texts], bool)
    control = (
        pool.labels[spliced, 0] == 0
    )  # a harmful item may be cut before its harm, and is neither
    if not harmful.any() or len(benign) < 1 / FPR:
        return {}
    calm = np.sort(aggregation.peaks(*pool.of(scores, benign)))[::-1]
    threshold = just_above(calm[int(FPR * len(calm))])
    flat, offsets = pool.of(scores, spliced)
    alarm = aggregation.alarms(flat, offsets, threshold)
    turn = [int(text.harmful.argmax()) if text.label else text.onset for text in texts]
    delay = alarm - np.array(turn)
    behind = (alarm >= 0) & (delay >= 0)
    caught = behind & harmful
    return {
        "texts": int(harmful.sum()),
        "benign": len(benign),
        "fpr": FPR,
        "threshold": threshold,
        "caught": float(behind[harmful].mean()),
        "before_onset": float(((alarm >= 0) & (delay < 0))[harmful].mean()),
        "median_delay_tokens": float(np.median(delay[caught])) if caught.any() else None,
        "p90_delay_tokens": float(np.quantile(delay[caught], 0.9)) if caught.any() else None,
        "benign_turns": {
            "texts": int(control.sum()),
            "halted_behind": float(behind[control].mean()) if control.any() else None,
        },
    }


def _threshold(probe: Probe, head: str) -> tuple[float, float]:
    """The calibration's threshold at 5%, or at the lowest rate it supports."""
    for fpr in (FPR, 0.1, 0.2, 0.5):
        try:
            return probe.threshold(head, fpr), fpr
        except ProbeError:
            continue
    raise ProbeError(
        f"{len(probe.benign[head])} benign calibration texts support no threshold at all. Give more "
        f"benign items."
    )


def _baselines(
    train: Sequence[Item],
    texts: Sequence[str],
    step: Callable[[str, int], AbstractContextManager[Callable[[int], None]]],
) -> dict[str, NDArray[np.float64]]:
    from streamguard.probe.baselines import fit_baselines

    with step("fitting baselines", 1) as progress:
        fitted = fit_baselines([item.response for item in train], [item.label for item in train])
        found = fitted.score(texts)
        progress(1)
    return found


def _means(flat: NDArray[np.float32], offsets: Index) -> NDArray[np.float64]:
    """Mean of each text's values, 0 of one without any: float64[num_texts]."""
    ends = np.concatenate([[0.0], np.cumsum(flat, dtype=np.float64)])
    means: NDArray[np.float64] = (ends[offsets[1:]] - ends[offsets[:-1]]) / np.maximum(
        np.diff(offsets), 1
    )
    return means


def _area(
    probe: Probe, pool: Pool, scores: NDArray[np.float32], column: int, judged: Index
) -> dict[str, Any]:
    label = pool.labels[judged, column]
    known = label >= 0
    positive = int((label == 1).sum())
    if not 0 < positive < known.sum():
        return {"auroc": None, "positive": positive, "texts": int(known.sum())}
    flat, offsets = pool.of(scores[:, column], judged)
    peaks = probe.aggregation(probe.heads[column]).peaks(flat, offsets)
    return {
        "auroc": area(peaks[known], label[known]),
        "positive": positive,
        "texts": int(known.sum()),
    }


def held_out(results: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
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
