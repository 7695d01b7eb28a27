"""An evaluation as pictures. No text of the data is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamguard.probe.aggregation import Aggregation
from streamguard.probe.bootstrap import Roc
from streamguard.probe.evaluate import FPRS, Scored
from streamguard.probe.extra import need

#: Of Okabe and Ito's palette, told apart by colour-blind readers; dashes tell sources apart too.
HARMFUL, BENIGN, POOLED = "#D55E00", "#0072B2", "black"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_LINES = ("-", "--", ":", "-.")
#: A mean over fewer texts than this would be drawn as if it were known.
_LEAST_TEXTS = 5
_TICKS = (0, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
_BEFORE_ONSET, _BEHIND_ONSET, _MOST_TOKENS = 64, 128, 512


def draw(
    folder: Path,
    results: Mapping[str, Any],
    scored: Scored,
    layer_sweep: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Path]:
    """Write the pictures of an evaluation as PNG; returns their paths by name.

    layer_sweep  {"layer": number or "norm", "auroc", "low", "high"} each, in the model's order.
    """
    aggregation = Aggregation(**results["aggregation"])
    offsets = np.ascontiguousarray(scored.offsets, np.int64)
    running = aggregation.running(scored.scores, offsets)
    running[~np.isfinite(running)] = np.nan  # `consecutive` says nothing before it is full
    peaks = aggregation.peaks(scored.scores, offsets)
    alarms = aggregation.alarms(scored.scores, offsets, results["threshold"])
    figures = {
        "roc": _roc(peaks, scored),
        "scores": _scores(running, offsets, scored, str(aggregation), results["threshold"]),
        "timeliness": _timeliness(alarms, scored),
        "baselines": _baselines(results),
    }
    if layer_sweep:
        figures["layers"] = _layers(layer_sweep)
    paths = {}
    for name, figure in figures.items():
        paths[name] = folder / f"{name}.png"
        figure.savefig(paths[name], dpi=130, facecolor="white")
        figure.clear()
    return paths


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A figure and its axes. Without pyplot, whose figures and settings are the whole process's."""
    figure = need("matplotlib.figure", "the plots need").Figure(
        figsize=(5.4 * count, 4), layout="constrained"
    )
    axes = figure.subplots(1, count, squeeze=False)[0]
    for each in axes:
        each.grid(True, which="major", color="0.88", linewidth=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _plain(text: str) -> str:
    """A name as matplotlib draws it: a dollar sign begins no formula, an underscore hides no line."""
    shown = text if len(text) <= 32 else text[:31] + "…"
    return shown.replace("$", r"\$").lstrip("_")


def _roc(peaks: NDArray[np.float32], scored: Scored) -> Any:
    figure, (linear, low) = _panels(2)
    source, label = np.array(scored.source, np.str_), np.asarray(scored.label)
    groups = [(name, source == name) for name in np.unique(source)]
    drawn = [(str(name), keep) for name, keep in groups if 0 < label[keep].mean() < 1]
    curves = [(_plain(name), Roc(peaks[keep], label[keep]).curve()) for name, keep in drawn]
    if 0 < label.mean() < 1:
        curves.append(("pooled", Roc(peaks, label).curve()))
    for i, (name, (halted, recall)) in enumerate(curves):
        pooled = name == "pooled" and i == len(curves) - 1
        style: dict[str, Any] = {"color": POOLED, "linewidth": 2.2}
        if not pooled:
            colour, line = _COLOURS[i % len(_COLOURS)], _LINES[i // len(_COLOURS) % len(_LINES)]
            style = {"color": colour, "linestyle": line, "linewidth": 1.2}
        for axes in (linear, low):
            axes.plot(halted, recall, label=name, drawstyle="steps-post", **style)
    chance = np.geomspace(1e-4, 1, 200)
    for axes in (linear, low):
        axes.plot(chance, chance, ":", color="0.6", linewidth=1)
        axes.set(xlabel="benign texts halted (FPR)", ylabel="harmful texts halted", ylim=(0, 1.01))
    fewest = max(1, int((label == 0).sum()))
    low.set(
        xscale="log", xlim=(min(FPRS[0], 1 / fewest) / 2, 1), title="few false alarms, log axis"
    )
    for fpr in FPRS:
        low.axvline(fpr, color="0.75", linewidth=0.8)
    linear.set(xlim=(0, 1), title="ROC by source")
    if curves:
        linear.legend(loc="lower right", fontsize=8, frameon=False)
    else:
        _say(linear, "no source has both labels")
    return figure


def _scores(
    running: NDArray[np.float32],
    offsets: NDArray[np.int64],
    scored: Scored,
    shape: str,
    threshold: float,
) -> Any:
    label, onset = np.asarray(scored.label), np.asarray(scored.onset)
    spliced = (label == 1) & (onset > 0)
    figure, axes = _panels(2 if spliced.any() else 1)
    sizes = np.diff(offsets)
    longest = min(_MOST_TOKENS, int(np.percentile(sizes, 95))) + 1
    for name, colour, keep in (
        ("harmful", HARMFUL, (label == 1) & ~spliced),
        ("benign", BENIGN, label == 0),
    ):
        _band(axes[0], running, offsets, np.flatnonzero(keep), 0, longest, 0, name, colour)
    axes[0].set(title="from the start", xlabel="token of the response")
    if spliced.any():
        texts, right = np.flatnonzero(spliced), axes[1]
        before, behind = _BEFORE_ONSET, _BEHIND_ONSET
        _band(
            right, running, offsets, texts, -before, behind, onset, "harmful from a known token",
            HARMFUL,
        )  # fmt: skip
        right.axvline(0, color="0.5", linewidth=0.8)
        right.set(title="around the onset of harm", xlabel="tokens since the onset")
    for each in axes:
        each.axhline(threshold, linestyle="--", color="0.35", linewidth=1, label="threshold")
        each.set_ylabel(f"statistic ({shape}), mean ± sd")
        each.legend(fontsize=8, frameon=False)
    return figure


def _band(
    axes: Any,
    running: NDArray[np.float32],
    offsets: NDArray[np.int64],
    texts: NDArray[np.intp],
    begin: int,
    end: int,
    zero: NDArray[np.int64] | int,
    name: str,
    colour: str,
) -> None:
    """Mean and standard deviation over texts at tokens zero + begin .. zero + end of each."""
    count, total, squares = np.zeros(end - begin), np.zeros(end - begin), np.zeros(end - begin)
    for text in texts:
        origin = zero if isinstance(zero, int) else int(zero[text])
        values = running[offsets[text] : offsets[text + 1]].astype(np.float64)
        first = max(0, origin + begin)
        values = values[first : max(first, origin + end)]
        known = ~np.isnan(values)
        at = np.flatnonzero(known) + first - origin - begin
        count[at] += 1
        total[at] += values[known]
        squares[at] += values[known] ** 2
    shown = count >= min(_LEAST_TEXTS, max(1, len(texts)))
    x = np.arange(begin, end)[shown]
    mean = total[shown] / count[shown]
    spread = np.sqrt(np.maximum(squares[shown] / count[shown] - mean**2, 0))
    axes.plot(x, mean, color=colour, linewidth=1.6, label=f"{name} ({len(texts)} texts)")
    axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)


def _timeliness(alarms: NDArray[np.int64], scored: Scored) -> Any:
    """Share of harmful texts halted by a point: all harmful texts, so that curves end at recall."""
    figure, (left, right) = _panels(2)
    label, onset = np.asarray(scored.label) == 1, np.asarray(scored.onset)
    refusal = np.asarray(scored.refusal, bool)
    length = np.maximum(np.asarray(scored.length), 1)
    for name, line, keep in (
        ("all harmful texts", "-", label),
        ("without refusals", ":", label & ~refusal),
    ):
        if (line == ":" and not (label & refusal).any()) or not keep.any():
            continue
        caught = keep & (alarms >= 0)
        _cdf(left, (alarms[caught] + 1) / length[caught], int(keep.sum()), line, HARMFUL, name, 1.0)
    known = onset >= 0
    for name, colour, keep in (
        ("since the onset", HARMFUL, label & known),
        ("since the start", BENIGN, label & ~known),
    ):
        if keep.any():
            tokens = (alarms - np.maximum(onset, 0))[keep & (alarms >= np.maximum(onset, 0))]
            _cdf(right, tokens, int(keep.sum()), "-", colour, f"{name} ({int(keep.sum())})", None)
    left.set(title="share of the response sent at the alarm", xlabel="share sent", xlim=(0, 1))
    right.set(title="tokens before the alarm", xlabel="tokens (linear to 10, then log)")
    right.set_xscale("symlog", linthresh=10)
    ticks = [tick for tick in _TICKS if tick <= max(10, alarms.max(initial=0))]
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    right.set_xticks([], minor=True)
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.set(ylabel="harmful texts halted by then", ylim=(0, 1.01))
        if label.any():
            axes.legend(fontsize=8, frameon=False, loc="best")
        else:
            _say(axes, "no harmful texts")
    return figure


def _cdf(
    axes: Any,
    values: NDArray[Any],
    of: int,
    line: str,
    colour: str,
    name: str,
    end: float | None,
) -> None:
    x, y = np.sort(values).astype(np.float64), np.arange(1, len(values) + 1) / of
    if end is not None:
        x, y = np.append(x, end), np.append(y, len(values) / of)
    axes.plot(
        np.concatenate([[0.0], x]), np.concatenate([[0.0], y]), line, color=colour,
        linewidth=1.6, drawstyle="steps-post", label=name,
    )  # fmt: skip


def _layers(sweep: Sequence[Mapping[str, Any]]) -> Any:
    figure, (axes,) = _panels(1)
    x, value = np.arange(len(sweep)), np.array([row["auroc"] for row in sweep], np.float64)
    axes.plot(x, value, "o-", color=BENIGN, markersize=4, linewidth=1.6)
    # None becomes NaN: no band where there is no interval.
    low, high = (np.array([row.get(end) for row in sweep], np.float64) for end in ("low", "high"))
    axes.vlines(x, low, high, color=BENIGN, linewidth=1)
    axes.fill_between(x, low, high, color=BENIGN, alpha=0.15, linewidth=0)
    axes.plot(np.argmax(value), value.max(), "o", color=HARMFUL, markersize=8)
    step = max(1, len(sweep) // 16)
    axes.set_xticks(x[::step], [str(row["layer"]) for row in sweep][::step])
    axes.set(title="AUROC by layer", xlabel="layer", ylabel="AUROC, 95% interval")
    return figure


def _baselines(results: Mapping[str, Any]) -> Any:
    views = [("with refusals", results["with_refusals"], "")]
    if results["without_refusals"]["pooled"]["texts"] < results["with_refusals"]["pooled"]["texts"]:
        views.append(("without refusals", results["without_refusals"], "//"))
    figure, panels = _panels(2)
    for axes, group in zip(panels, ("macro", "pooled"), strict=True):
        names = ["probe", *results["with_refusals"][group]["baselines"]]
        for i, (title, view, hatch) in enumerate(views):
            rows = view[group]
            auroc = [rows["auroc"], *(b["auroc"] for b in rows["baselines"].values())]
            for j, estimate in enumerate(auroc):
                if estimate["value"] is None:
                    continue
                at = j + (i - (len(views) - 1) / 2) * 0.4
                axes.bar(
                    at, estimate["value"], 0.36, hatch=hatch, edgecolor="white",
                    color=HARMFUL if j == 0 else "0.6", label=title if j == 0 else None,
                )  # fmt: skip
                if estimate["low"] is not None:
                    axes.plot([at, at], [estimate["low"], estimate["high"]], "k-", linewidth=1.2)
        axes.axhline(0.5, linestyle=":", color="0.4", linewidth=1)
        axes.set_xticks(range(len(names)), [_plain(name) for name in names], fontsize=8)
        axes.set(ylim=(0, 1.01), ylabel="AUROC, 95% interval by prompt")
        axes.set_title("mean over sources" if group == "macro" else "all texts pooled")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, framealpha=1, edgecolor="white", loc="lower right")
    return figure


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color="0.4")
