"""An evaluation for people: a table in the terminal, one HTML file and its pictures."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamguard.probe.artifact import Card
from streamguard.probe.evaluate import FPRS, VIEWS, Scored

if TYPE_CHECKING:
    from rich.table import Table

LIMITS = (
    "Scores are measured error rates on these data, not guarantees: other prompts, other harm or "
    "another way of writing give other rates.",
    "Intervals tell how much the figures move when prompts are drawn again from the same sources. "
    "They say nothing about sources that are not here.",
    "Labels are those of the sources, some of them given by other models, and are taken as true.",
    "The probe is good for the model and the layer on its card only. A fine-tune or an adapter "
    "makes these figures void.",
    "Refusals are easy to tell from harmful answers and lift every figure; read those without them.",
)
_CAPTIONS = {
    "roc": "Recall over false positive rate, by source; to the right the part that matters.",
    "scores": "The running statistic, token by token. Lines are means, bands a standard deviation; "
    "positions that fewer than five texts reach are left out.",
    "timeliness": "How much had been sent when harmful texts were halted. The curves end at recall.",
    "baselines": "The peak of the running statistic, which halts, beside the mean of the same scores, "
    "which is known when all was sent, and beside what needs no model, on the same texts.",
    "layers": "AUROC of probes on each layer, on the calibration split; marked: the highest.",
}
_VIEW_TITLES = dict(zip(VIEWS, ("With refusals", "Without refusals"), strict=True))
_DASH = "–"


def write_report(
    folder: str | os.PathLike[str],
    card: Card,
    results: Mapping[str, Any],
    scored: Scored,
    layer_sweep: Sequence[Mapping[str, Any]] | None = None,
) -> list[Path]:
    """Write report.html, self-contained, and its pictures as PNG; returns their paths, HTML first.

    folder       made if it is not there; files of those names are replaced.
    results      what `evaluate` gave for `scored`.
    layer_sweep  {"layer": number or "norm", "auroc", "low", "high"} each, in the model's order.

    No text, prompt or prompt's id of the data is in any of them. Raises OSError, and ProbeError
    without matplotlib.
    """
    from streamguard.probe.plots import draw

    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    pictures = draw(place, results, scored, layer_sweep)
    page = place / "report.html"
    page.write_text("\n".join(_page(card, results, pictures)), encoding="utf-8")
    return [page, *pictures.values()]


def figures_table(results: Mapping[str, Any], *, narrow: bool = False) -> Table:
    """The figures of `evaluate` for a terminal: a row for each source, macro and pooled.

    narrow  fewer columns, for 80 characters; else it takes about 130.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"at threshold {results['threshold']:.4g}; 95% intervals; o: from the onset of harm, "
        f"s: from the start",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    shown = [i for i, name in enumerate(_HEADINGS) if not narrow or name in _NARROW]
    for name in (_HEADINGS[i] for i in shown):
        left, whole = name == "source", name in ("source", "AUROC")
        side = "left" if left else "right"
        table.add_column(name, justify=side, overflow="fold", no_wrap=whole)  # type: ignore[arg-type]
    for view in VIEWS:
        table.add_section()
        table.add_row(Text(_VIEW_TITLES[view], style="bold"))
        for name, group in _groups(results[view]):
            cells = [name, *_cells(group, intervals=False)]
            style = "bold" if name in ("macro", "pooled") else ""
            first, *rest = (cells[i] for i in shown)
            table.add_row(Text(first, style=style), *map(Text, rest))
        for name, baseline in results[view]["macro"]["baselines"].items():
            cells = [_short(baseline["auroc"], interval=True)]
            cells = cells if narrow else ["", *cells]
            table.add_row(Text(f"macro, {name}", style="dim"), *map(Text, cells))
    return table


_HEADINGS = (
    "source",
    "harmful / benign",
    "AUROC",
    *(f"recall at {fpr:.1%} FPR".replace(".0%", "%") for fpr in FPRS),
    "FPR",
    "recall",
    "ECE",
    "tokens to alarm",
    "share sent",
)


_NARROW = ("source", "AUROC", "recall at 5% FPR", "FPR", "tokens to alarm")


def _groups(view: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Sources by name, then macro and pooled."""
    yield from view["sources"].items()
    yield "macro", view["macro"]
    yield "pooled", view["pooled"]


def _cells(group: Mapping[str, Any], *, intervals: bool = True) -> list[str]:
    """A group's cells under `_HEADINGS`, but for its name."""
    macro = "sources" in group
    size = f"{group['sources']} sources" if macro else f"{group['harmful']} / {group['benign']}"
    timeliness = group["timeliness"]
    return [
        size,
        _short(group["auroc"], interval=True),
        *(_supported(group["tpr_at_fpr"][str(fpr)], group, intervals) for fpr in FPRS),
        _short(group["fpr"], interval=intervals),
        _short(group["recall"], interval=intervals),
        _short(group["ece"]),
        _tokens(timeliness),
        _short(timeliness["share_sent"]["median"]),
    ]


def _short(estimate: Mapping[str, Any], *, interval: bool = False) -> str:
    """.912 [.905,.920]"""
    if estimate["value"] is None:
        return _DASH
    text = _rate(estimate["value"])
    if interval and estimate["low"] is not None:
        text += f" [{_rate(estimate['low'])},{_rate(estimate['high'])}]"
    return text


def _supported(estimate: Mapping[str, Any], group: Mapping[str, Any], interval: bool) -> str:
    """A figure; in macro with the number of sources that support it, if not all do."""
    text = _short(estimate, interval=interval)
    few = estimate["value"] is not None and estimate.get("sources") != group.get("sources")
    return f"{text} ({estimate['sources']} of {group['sources']})" if few else text


def _rate(value: float) -> str:
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and text.lstrip("-")[0] == "0" else text


def _tokens(timeliness: Mapping[str, Any]) -> str:
    """Median from the onset and from the start, told apart: 12 o, 40 s"""
    medians = ((timeliness["from_onset"], "o"), (timeliness["from_start"], "s"))
    known = [(g["median_tokens"]["value"], letter) for g, letter in medians]
    return (
        ", ".join(f"{value:.0f} {letter}" for value, letter in known if value is not None) or _DASH
    )


def _page(card: Card, results: Mapping[str, Any], pictures: Mapping[str, Path]) -> Iterator[str]:
    heads = ", ".join(head.name for head in card.heads)
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>Probe {escape(heads)}: evaluation</title><style>{_CSS}</style></head><body><main>"
    yield f"<h1>Probe <em>{escape(heads)}</em>: evaluation</h1>"
    yield from _limits()
    yield "<h2>Figures</h2>"
    yield f"<p>{escape(_how(results))}</p>"
    for view in VIEWS:
        yield f"<h3>{_VIEW_TITLES[view]}</h3>"
        yield from _figures(results[view])
    yield "<p>tokens to alarm: medians over caught harmful texts; o: from the known onset of harm, s: "
    yield "from the first token where the onset is not known. share sent: median share of the "
    yield "response already sent. A dash stands where the data cannot support a figure; why, is below."
    yield "</p>"
    yield from _timeliness(results)
    yield from _missing(results)
    yield "<h2>Beside the baselines</h2>"
    yield from _baselines(results)
    yield "<h2>Pictures</h2>"
    for name, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        caption = escape(_CAPTIONS[name])
        yield f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        yield f"<figcaption>{caption}</figcaption></figure>"
    yield "<h2>The card</h2>"
    yield from _card(card)
    yield "</main></body></html>"


def _limits() -> Iterator[str]:
    yield '<section class="limits"><h2>Limits</h2><ul>'
    yield from (f"<li>{escape(limit)}</li>" for limit in LIMITS)
    yield "</ul></section>"


def _how(results: Mapping[str, Any]) -> str:
    shape = ", ".join(f"{name} {value}" for name, value in results["aggregation"].items())
    own = results["thresholds_from"] == "evaluated"
    return (
        f"{results['texts']} texts ({results['harmful']} harmful) of {results['prompts']} prompts, "
        f"{results['tokens']} tokens. Statistic: {shape}. FPR, recall and times are at the threshold "
        f"{results['threshold']:.6g}. Recall at a given FPR takes its threshold from "
        f"{'the benign texts that are evaluated here' if own else 'other benign texts'}. Intervals "
        f"are 95%: exact binomial for FPR and recall, else {results['bootstrap']['rounds']} resamples "
        f"by prompt (seed {results['bootstrap']['seed']})."
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table; the first cell of a row is its heading. Everything is escaped here."""
    yield '<div class="wide"><table><thead><tr>'
    yield from (f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    yield "</tr></thead><tbody>"
    for first, *others in rows:
        yield f'<tr><th scope="row">{escape(first)}</th>'
        yield from (f"<td>{escape(cell)}</td>" for cell in others)
        yield "</tr>"
    yield "</tbody></table></div>"


def _figures(view: Mapping[str, Any]) -> Iterator[str]:
    yield from _table(_HEADINGS, [[name, *_cells(group)] for name, group in _groups(view)])


def _timeliness(results: Mapping[str, Any]) -> Iterator[str]:
    yield "<h3>Harm that begins at a known token</h3>"
    rows = []
    for view in VIEWS:
        for name, group in _groups(results[view]):
            place = group["timeliness"]["from_onset"]
            if place.get("texts"):
                rows.append(
                    [
                        f"{name}, {_VIEW_TITLES[view].lower()}",
                        str(place["texts"]),
                        str(place["before_onset"]),
                        _short(place["recall"], interval=True),
                        _count(place["median_tokens"]),
                        _count(place["p90_tokens"]),
                    ]
                )
    if not rows:
        yield "<p>No text of this evaluation states where its harm begins.</p>"
        return
    yield from _table(
        ("source", "texts", "halted too early", "caught", "tokens, median", "tokens, p90"), rows
    )


def _count(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return _DASH
    if estimate["low"] is None:
        return f"{estimate['value']:.0f}"
    return f"{estimate['value']:.0f} [{estimate['low']:.0f}, {estimate['high']:.0f}]"


def _missing(results: Mapping[str, Any]) -> Iterator[str]:
    """Why figures are missing, each reason once for a group."""
    reasons = []
    for view in VIEWS:
        for name, group in _groups(results[view]):
            said = {}
            for figure in ("auroc", "fpr", "recall"):
                said[group[figure].get("reason")] = figure
            for fpr, estimate in group["tpr_at_fpr"].items():
                said.setdefault(estimate.get("reason"), f"recall at {float(fpr):g} FPR")
            said.pop(None, None)
            title = _VIEW_TITLES[view].lower()
            reasons += [f"{name}, {title}: {what}: {why}" for why, what in said.items()]
    if reasons:
        yield "<details><summary>Figures that these data cannot support</summary><ul>"
        yield from (f"<li>{escape(reason)}</li>" for reason in reasons)
        yield "</ul></details>"


def _baselines(results: Mapping[str, Any]) -> Iterator[str]:
    names = list(results[VIEWS[0]]["pooled"]["baselines"])
    if not names:
        yield "<p>None were evaluated.</p>"
        return
    yield "<p>AUROC, and in how much the probe's is higher, in the same resamples of prompts.</p>"
    for view in VIEWS:
        rows = []
        for name, group in _groups(results[view]):
            if group["auroc"]["value"] is None:
                continue
            row = [name, _short(group["auroc"], interval=True)]
            for baseline in names:
                figures = group["baselines"][baseline]
                row.append(_short(figures["auroc"], interval=True))
                row.append(_short(figures["difference"], interval=True))
            rows.append(row)
        headings = [text for name in names for text in (name, "probe higher by")]
        yield f"<h3>{_VIEW_TITLES[view]}</h3>"
        yield from _table(("source", "probe", *headings), rows)


def _card(card: Card) -> Iterator[str]:
    model = card.model
    facts = [
        ("date", card.date),
        ("model", f"{model.name} ({model.architecture}, {model.dtype})"),
        ("model's fingerprint", model.fingerprint),
        ("adapter", model.adapter or "none"),
        ("layer", f"{card.layer} of {model.num_layers}"),
        ("reads", f"the {card.stage}'s tokens"),
        ("versions", ", ".join(f"{name} {version}" for name, version in card.versions.items())),
    ]
    for head in card.heads:
        shape = ", ".join(
            f"{name} {value}" for name, value in head.aggregation.model_dump().items()
        )
        facts.append((f"head {head.name}", shape))
    facts += ((f"training: {name}", str(value)) for name, value in card.training.items())
    yield from _table(("", ""), [list(fact) for fact in facts])
    if card.data:
        yield "<h3>Data</h3>"
        rows = [
            [
                data.name,
                data.role,
                str(data.items),
                str(data.positive),
                ", ".join(f"{name} {count}" for name, count in data.sources.items()),
                ", ".join(f"{name} {count}" for name, count in data.licences.items()),
                data.sha256,
            ]
            for data in card.data
        ]
        headings = ("file", "role", "items", "positive", "sources", "licences", "sha256")
        yield from _table(headings, rows)


_CSS = """
:root { color-scheme: light dark; --line: #d8d8d8; --soft: #f4f4f2; --ink: #1c1c1c; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3c3c3c; --soft: #242424; --ink: #e6e6e6; --page: #171717; }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem; }
h1, h2, h3 { line-height: 1.25; }
.limits { background: var(--soft); border-left: 4px solid #d55e00; padding: .2rem 1.2rem; }
.limits h2 { margin-top: .6rem; font-size: 1.1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right; }
th { text-align: left; }
td { overflow-wrap: anywhere; }
thead th { vertical-align: bottom; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; background: #fff; border-radius: 6px; padding: .4rem; box-sizing: border-box; }
figcaption { font-size: .9rem; opacity: .8; }
"""
