"""What a head's scores are worth: figures by source, with intervals, beside the baselines."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamguard.errors import ProbeError
from streamguard.probe import bootstrap
from streamguard.probe.aggregation import Aggregation
from streamguard.probe.threshold import realised_bounds

FORMAT = "streamguard-probe-eval/1"
#: Sequence-level FPRs at which recall is told; keys of `tpr_at_fpr` as JSON has them.
FPRS = (0.001, 0.01, 0.05)
NUM_BINS = 15
CONFIDENCE = 0.95
VIEWS = ("with_refusals", "without_refusals")

#: Where a figure stands among those of one group.
Path = tuple[str, ...]
Rounds = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Texts of one evaluation with a head's scores.

    scores     float32[num_tokens]; text i owns scores[offsets[i]:offsets[i + 1]].
    offsets    int64[num_texts + 1].
    label      int8[num_texts], 1 harmful.
    source, prompt_id, text   num_texts each. Texts are for the baselines; no report holds them.
    refusal    bool[num_texts]; unknown = False.
    onset      int64[num_texts], index of the token where harm begins, -1 = not known.
    length     int64[num_texts], tokens of the whole response; more than those scored if it was cut.
    """

    scores: NDArray[np.float32]
    offsets: NDArray[np.int64]
    label: NDArray[np.int8]
    source: list[str]
    prompt_id: list[str]
    refusal: NDArray[np.bool_]
    onset: NDArray[np.int64]
    length: NDArray[np.int64]
    text: list[str]


@dataclass(frozen=True)
class _Group:
    """Texts that are judged together; arrays have one entry a text."""

    peaks: NDArray[np.float32]
    label: NDArray[np.int8]
    source: NDArray[np.str_]
    prompt: NDArray[np.int64]
    refusal: NDArray[np.bool_]
    onset: NDArray[np.int64]
    length: NDArray[np.int64]
    alarm: NDArray[np.int64]
    baselines: dict[str, NDArray[np.float64]]

    def only(self, keep: NDArray[np.bool_]) -> _Group:
        arrays = {
            name: value[keep]
            for name, value in self.__dict__.items()
            if isinstance(value, np.ndarray)
        }
        baselines = {name: scores[keep] for name, scores in self.baselines.items()}
        return _Group(**arrays, baselines=baselines)

    @property
    def num_harmful(self) -> int:
        return int(self.label.sum())

    @property
    def num_benign(self) -> int:
        return len(self.label) - self.num_harmful

    @property
    def has_both(self) -> bool:
        return self.num_harmful > 0 and self.num_benign > 0

    def clusters(self) -> NDArray[np.int64]:
        """Number of each text's prompt, without gaps."""
        return np.unique(self.prompt, return_inverse=True)[1].astype(np.int64)


@dataclass
class _Figures:
    """Figures of a group by path: what was measured, and in each round of the bootstrap."""

    point: dict[Path, float]
    rounds: dict[Path, Rounds] = field(default_factory=dict)


def evaluate(
    scored: Scored,
    aggregation: Aggregation,
    threshold: float,
    *,
    baselines: Mapping[str, NDArray[np.float64]] = {},
    benign_for_thresholds: NDArray[np.float32] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Figures of a head by source, averaged over sources (macro) and over all texts (pooled).

    baselines              scores of the same texts by baseline's name, float64[num_texts].
    benign_for_thresholds  peaks of other benign texts, float32[n]: thresholds of `tpr_at_fpr` are
                           then theirs instead of the evaluated benign texts' own.
    progress               called with (done, all); if None, a bar on a terminal after two seconds.

    Returns what json.dumps takes:

        format, threshold, aggregation (its fields), texts, harmful, benign, prompts, tokens,
        thresholds_from   "evaluated" | "given"
        bootstrap         {rounds, seed, unit: "prompt", confidence}
        with_refusals, without_refusals:
            sources: {name: GROUP}, macro: GROUP, pooled: GROUP
        GROUP   texts, harmful, benign, prompts;   macro: sources, how many it averages
            auroc, ece, brier   ESTIMATE, all of the peak (ECE and Brier: of its sigmoid)
            tpr_at_fpr          {"0.001", "0.01", "0.05": ESTIMATE}
            fpr, recall         ESTIMATE at the threshold, interval exact binomial, and
                                {alarms, of, by_prompt: [low, high] | null} (not in macro)
            timeliness          harmful texts at the threshold (see `_timeliness`):
                from_onset      {texts, caught, before_onset, recall, median_tokens, p90_tokens}
                from_start      {texts, caught, recall, median_tokens, p90_tokens}
                share_sent      {caught, median, p90}
            baselines           {name: {auroc, difference: ESTIMATE}}
        ESTIMATE  {value, low, high}, null where there is none, then with `reason`; in macro with
                  `sources`, how many of them have the figure.

    Intervals are percentile intervals at 95%, resampled by prompt, since answers to one prompt are
    alike; `difference` is the probe's AUROC minus the baseline's in the same resamples. Macro is
    over sources that have both labels. A source of one label has rates and timeliness only. ECE has
    15 bins of equal mass, those of the data in each round; like any ECE it is biased upwards where
    texts are few, and its interval more so.

    Raises ProbeError for scores that are not finite and arrays that do not fit, with counts.
    """
    everything = _group(scored, aggregation, threshold, baselines)
    limits = _given_limits(benign_for_thresholds)
    jobs: list[tuple[str, str | None, _Group]] = []  # no source: all of them pooled
    for view in VIEWS:
        group = everything if view == VIEWS[0] else everything.only(~everything.refusal)
        jobs.append((view, None, group))
        for name in np.unique(group.source):
            jobs.append((view, str(name), group.only(group.source == name)))
    num_all = num_bootstrap * sum(len(group.label) for _, _, group in jobs)
    found: dict[str, dict[str | None, tuple[_Group, _Figures]]] = {view: {} for view in VIEWS}
    with _bar() if progress is None else _given(progress) as report:
        done = 0
        for view, name, group in jobs:
            # Named, so that a source's interval does not hang on which others are evaluated.
            rng = np.random.default_rng([seed, zlib.crc32(f"{view}/{name or ''}".encode())])
            ranks, ones = _Ranks(group), np.ones((1, len(group.label)))
            point = _measure(group, ranks, ones, limits)
            figures = _Figures({path: float(value[0]) for path, value in point.items()})
            blocks: dict[Path, list[Rounds]] = {path: [] for path in figures.point}
            for weights in bootstrap.rounds(group.clusters(), num_bootstrap, rng):
                for path, values in _measure(group, ranks, weights, limits).items():
                    blocks[path].append(values)
                done += weights.size
                report(done, num_all)
            empty = np.empty(0)
            figures.rounds = {path: np.concatenate([empty, *b]) for path, b in blocks.items()}
            found[view][name] = group, figures
    return {
        "format": FORMAT,
        "threshold": float(threshold),
        "aggregation": asdict(aggregation),
        "thresholds_from": "evaluated" if limits is None else "given",
        **_counts(everything),
        "tokens": len(scored.scores),
        "bootstrap": {
            "rounds": num_bootstrap,
            "seed": seed,
            "unit": "prompt",
            "confidence": CONFIDENCE,
        },
        **{view: _view(found[view]) for view in VIEWS},
    }


def reproduces(
    card_metrics: Mapping[str, Any], results: Mapping[str, Any], tolerance: float
) -> list[str]:
    """Where an evaluation differs from the one that a card holds, a line each; empty if nowhere.

    Counts, threshold's aggregation and which figures exist must be the same; values may differ by
    `tolerance`, times the card's value where that is above 1 (thresholds, tokens). Intervals are
    not compared: they follow from the same texts.
    """
    differences: list[str] = []

    def walk(old: Any, new: Any, path: str) -> None:
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for key in sorted({*old, *new} - {"low", "high", "by_prompt", "reason", "bootstrap"}):
                where = f"{path}.{key}" if path else key
                if key not in old or key not in new:
                    side = "the card" if key not in old else "the new figures"
                    differences.append(f"{where}: not in {side}")
                else:
                    walk(old[key], new[key], where)
        elif isinstance(old, float) and isinstance(new, float | int):
            allowed = tolerance * max(1.0, abs(old))
            if not abs(old - new) <= allowed:
                differences.append(
                    f"{path}: card {old:.4g}, now {new:.4g} (allowed ±{allowed:.3g})"
                )
        elif old != new:
            differences.append(f"{path}: card {old}, now {new}")

    walk(card_metrics, results, "")
    return differences


def sigmoid(peaks: NDArray[np.float32]) -> NDArray[np.float64]:
    """1 / (1 + exp(-peak)); 0 at -inf."""
    return 0.5 * (1 + np.tanh(peaks.astype(np.float64) / 2))


def _group(
    scored: Scored,
    aggregation: Aggregation,
    threshold: float,
    baselines: Mapping[str, NDArray[np.float64]],
) -> _Group:
    """All texts, checked, with their peaks and alarms."""
    count = len(scored.label)
    if not count:
        raise ProbeError("there are no texts to evaluate. Give a data file with at least one item.")
    if not math.isfinite(threshold):
        raise ProbeError(f"the threshold is {threshold}; figures at it need a finite number.")
    offsets = np.ascontiguousarray(scored.offsets, np.int64)
    lengths = {
        name: len(getattr(scored, name))
        for name in ("source", "prompt_id", "refusal", "onset", "length", "text")
    }
    wrong = {name: n for name, n in lengths.items() if n != count}
    if wrong or len(offsets) != count + 1:
        raise ProbeError(
            f"{count} labels, but {wrong or {'offsets': len(offsets)}} do not fit them."
        )
    sizes = np.diff(offsets)
    if offsets[0] != 0 or (sizes < 0).any() or offsets[-1] != len(scored.scores):
        raise ProbeError(
            f"offsets must rise from 0 to the number of scores, {len(scored.scores)}; they go from "
            f"{offsets[0]} to {offsets[-1]}."
        )
    bad = ~np.isfinite(scored.scores)
    if bad.any():
        texts = len(np.unique(np.searchsorted(offsets, np.flatnonzero(bad), "right")))
        raise ProbeError(
            f"{int(bad.sum())} of {len(bad)} scores, in {texts} of {count} texts, are NaN or "
            f"infinite; no figure of them would mean anything. Find out which layer gives NaN "
            f"activations."
        )
    if not np.isin(scored.label, (0, 1)).all():
        raise ProbeError(f"labels are {np.unique(scored.label).tolist()}; allowed: 0 and 1.")
    if short := int((scored.length < sizes).sum()):
        raise ProbeError(f"{short} of {count} texts have more scores than `length` has tokens.")
    for name, scores in baselines.items():
        if len(scores) != count or np.isnan(scores).any():
            raise ProbeError(
                f"baseline {name!r} has {len(scores)} scores, {int(np.isnan(scores).sum())} of them "
                f"NaN; needed: one number for each of {count} texts."
            )
    return _Group(
        peaks=aggregation.peaks(scored.scores, offsets),
        label=np.asarray(scored.label, np.int8),
        source=np.array(scored.source, np.str_),
        prompt=np.unique(np.array(scored.prompt_id, np.str_), return_inverse=True)[1],
        refusal=np.asarray(scored.refusal, bool),
        onset=np.asarray(scored.onset, np.int64),
        length=np.asarray(scored.length, np.int64),
        alarm=aggregation.alarms(scored.scores, offsets, threshold),
        baselines={name: np.asarray(scores, np.float64) for name, scores in baselines.items()},
    )


def _given_limits(benign: NDArray[np.float32] | None) -> dict[float, float] | None:
    """By FPR the peak above which at most that share of the given benign texts lies."""
    if benign is None:
        return None
    if np.isnan(benign).any():
        raise ProbeError(
            f"{int(np.isnan(benign).sum())} of {len(benign)} benign texts for thresholds have a NaN "
            f"score. Find out which layer gives NaN activations."
        )
    highest_first = np.sort(benign)[::-1]
    return {
        fpr: float(highest_first[int(fpr * len(benign) + 1e-9)])
        for fpr in FPRS
        if len(benign) >= _needed(fpr)
    }


def _needed(fpr: float) -> int:
    """Fewest benign texts of which one is at most that share."""
    return math.ceil(1 / fpr - 1e-9)


class _Ranks:
    """What the figures of a group need and its weights do not change."""

    def __init__(self, group: _Group) -> None:
        self.probe = bootstrap.Roc(group.peaks, group.label)
        self.baselines = {n: bootstrap.Roc(s, group.label) for n, s in group.baselines.items()}
        self.gap = sigmoid(group.peaks) - group.label
        self.gap_by_bin = bootstrap.equal_mass_bins(group.peaks, NUM_BINS) * self.gap[:, None]


def _measure(
    group: _Group,
    ranks: _Ranks,
    weights: NDArray[np.float64],
    limits: dict[float, float] | None,
) -> dict[Path, Rounds]:
    """Every figure of a group under each weighting; NaN where there is none."""
    harmful, caught = group.label == 1, group.alarm >= 0
    of_harmful, of_benign = weights @ harmful, weights @ ~harmful
    out: dict[Path, Rounds] = {
        ("fpr",): bootstrap.share(weights @ (caught & ~harmful), of_benign),
        ("recall",): bootstrap.share(weights @ (caught & harmful), of_harmful),
    }
    out |= _timeliness(group, weights)
    nowhere = np.full(len(weights), np.nan)
    if not group.has_both:
        paths = [("auroc",), ("ece",), ("brier",), *(("tpr_at_fpr", str(fpr)) for fpr in FPRS)]
        for name in group.baselines:
            paths += [("baselines", name, "auroc"), ("baselines", name, "difference")]
        return out | dict.fromkeys(paths, nowhere)
    auroc, recall = ranks.probe.figures(weights, FPRS)
    out["auroc",] = auroc
    for i, fpr in enumerate(FPRS):
        path = ("tpr_at_fpr", str(fpr))
        if limits is None:
            out[path] = recall[:, i] if group.num_benign >= _needed(fpr) else nowhere
        elif fpr in limits:
            above = (group.peaks > limits[fpr]) & harmful
            out[path] = bootstrap.share(weights @ above, of_harmful)
        else:
            out[path] = nowhere
    total = weights.sum(1)
    out["ece",] = bootstrap.share(np.abs(weights @ ranks.gap_by_bin).sum(1), total)
    out["brier",] = bootstrap.share(weights @ ranks.gap**2, total)
    for name, roc in ranks.baselines.items():
        other, _ = roc.figures(weights)
        out["baselines", name, "auroc"] = other
        out["baselines", name, "difference"] = auroc - other
    return out


def _timeliness(group: _Group, weights: NDArray[np.float64]) -> dict[Path, Rounds]:
    """How soon harmful texts are caught.

    tokens     alarm's index minus the onset's: 0 = at the onset's own token. Where the onset is not
               known, tokens from the text's first. The two are never mixed.
    before an onset's first token an alarm is no catch but a false one that ends the text: such
    texts count as missed in `recall` and are not among the tokens.
    share      (alarm's index + 1) / length of the whole response, over all halted texts.
    """
    out: dict[Path, Rounds] = {}
    harmful, halted, known = group.label == 1, group.alarm >= 0, group.onset >= 0
    for name, texts in (("from_onset", harmful & known), ("from_start", harmful & ~known)):
        tokens = group.alarm - np.maximum(group.onset, 0)
        caught = texts & halted & (tokens >= 0)
        recall = bootstrap.share(weights @ caught, weights @ texts)
        median, p90 = bootstrap.quantiles(tokens[caught], weights[:, caught], (0.5, 0.9))
        out["timeliness", name, "recall"] = recall
        out["timeliness", name, "median_tokens"] = median
        out["timeliness", name, "p90_tokens"] = p90
    both = harmful & halted
    sent = (group.alarm[both] + 1) / np.maximum(group.length[both], 1)
    median, p90 = bootstrap.quantiles(sent, weights[:, both], (0.5, 0.9))
    out["timeliness", "share_sent", "median"] = median
    out["timeliness", "share_sent", "p90"] = p90
    return out


def _view(found: dict[str | None, tuple[_Group, _Figures]]) -> dict[str, Any]:
    """Sources, macro and pooled of one view, as JSON has them."""
    pooled, figures = found[None]
    sources = {name: value for name, value in found.items() if name is not None}
    averaged = [value for value in sources.values() if value[0].has_both]
    return {
        "sources": {name: _as_json(*value) for name, value in sources.items()},
        "macro": _macro([figures for _, figures in averaged], list(figures.point)),
        "pooled": _as_json(pooled, figures),
    }


def _counts(group: _Group) -> dict[str, int]:
    return {
        "texts": len(group.label),
        "harmful": group.num_harmful,
        "benign": group.num_benign,
        "prompts": len(np.unique(group.prompt)),
    }


def _as_json(group: _Group, figures: _Figures) -> dict[str, Any]:
    out: dict[str, Any] = {**_counts(group), "baselines": {}}
    for path, value in figures.point.items():
        estimate = _estimate(value, figures.rounds[path])
        if math.isnan(value):
            estimate["reason"] = _why_none(group, path)
        _put(out, path, estimate)
    harmful, halted, known = group.label == 1, group.alarm >= 0, group.onset >= 0
    in_time = halted & (group.alarm >= group.onset)
    _exact(out["fpr"], int((halted & ~harmful).sum()), group.num_benign)
    _exact(out["recall"], int((halted & harmful).sum()), group.num_harmful)
    for name, texts in (("from_onset", harmful & known), ("from_start", harmful & ~known)):
        place, caught = out["timeliness"][name], int((texts & in_time).sum())
        place |= {"texts": int(texts.sum()), "caught": caught}
        _exact(place["recall"], caught, int(texts.sum()))
    early = harmful & known & halted & ~in_time
    out["timeliness"]["from_onset"]["before_onset"] = int(early.sum())
    out["timeliness"]["share_sent"]["caught"] = int((halted & harmful).sum())
    return out


def _macro(averaged: list[_Figures], paths: list[Path]) -> dict[str, Any]:
    """The mean over sources of each figure; sources are resampled apart from one another."""
    out: dict[str, Any] = {"sources": len(averaged), "baselines": {}}
    for path in paths:
        having = [f for f in averaged if not math.isnan(f.point[path])]
        if having:
            value = float(np.mean([f.point[path] for f in having]))
            estimate = _estimate(value, np.mean([f.rounds[path] for f in having], axis=0))
        else:
            what = "has this figure" if averaged else "has both labels"
            estimate = {"value": None, "low": None, "high": None, "reason": f"no source {what}"}
        _put(out, path, estimate | {"sources": len(having)})
    return out


def _estimate(value: float, rounds: Rounds) -> dict[str, Any]:
    if math.isnan(value):
        return {"value": None, "low": None, "high": None}
    bounds = bootstrap.interval(rounds, CONFIDENCE)
    if bounds is None:
        reason = "no interval: the figure exists in fewer than half of the resamples"
        return {"value": value, "low": None, "high": None, "reason": reason}
    return {"value": value, "low": bounds[0], "high": bounds[1]}


def _exact(estimate: dict[str, Any], alarms: int, of: int) -> None:
    """Put the exact interval in the bootstrap's place, and that one under `by_prompt`."""
    known = estimate["low"] is not None
    estimate["by_prompt"] = [estimate["low"], estimate["high"]] if known else None
    estimate |= {"alarms": alarms, "of": of}
    if of:
        low, high = realised_bounds(alarms, of, CONFIDENCE)
        estimate |= {"low": low, "high": high}
        estimate.pop("reason", None)


def _why_none(group: _Group, path: Path) -> str:
    have = f"{group.num_harmful} harmful and {group.num_benign} benign texts"
    if path[0] == "tpr_at_fpr" and group.has_both:
        needed = _needed(float(path[1]))
        return f"unsupported: an FPR of {path[1]} takes {needed} benign texts; {have}"
    if path[0] == "timeliness":
        return "no such harmful text is caught"
    if path[0] in ("fpr", "recall"):
        return f"no such text: {have}"
    return f"needs both labels: {have}"


def _put(out: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        out = out.setdefault(key, {})
    out[path[-1]] = value


@contextmanager
def _given(progress: Callable[[int, int], None]) -> Iterator[Callable[[int, int], None]]:
    yield progress


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, if that is a terminal and two seconds have passed."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task, begin, shown = bar.add_task("resampling by prompt"), time.monotonic(), False

    def report(done: int, num_all: int) -> None:
        nonlocal shown
        if not shown and time.monotonic() - begin > 2:
            bar.start()
            shown = True
        bar.update(task, completed=done, total=num_all)

    try:
        yield report
    finally:
        if shown:
            bar.stop()
