"""What does a probe cost a real vLLM engine?

As `bench_engine`, with one policy: 14 observe rules, each on a head of its own of one probe that reads
the middle layer of the small real model. The engine that is compared with has the plugin and no
policy, so the whole cost is in the ratio: the op in the forward pass, the statistics of 14 monitors a
row, and the guard's other phases. The weights are random, since what they are does not change the cost;
the thresholds are out of reach, so both engines write the same tokens, which is asserted.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.bench_engine import UNGUARDED, engines, measure
from benchmarks.measure import Ratio
from benchmarks.report import Cell, Results
from streamguard.demo_model import demo_model
from streamguard.probe.aggregation import Aggregation
from streamguard.probe.artifact import AggregationCard, Card, HeadCard, Probe
from streamguard.probe.model import ServedModel, versions

ROOM = "probe"
BATCHES = (1, 32)
NUM_HEADS = 14
NAME = "probe"
#: Turns of the guarded engine in a round.
TURNS = 3


def write_policy(folder: Path) -> None:
    """Write the probe, a policy of one rule a head, and an idle default policy."""
    model = ServedModel(str(demo_model()))
    rng = np.random.default_rng(0)
    how = Aggregation("ema", weight=0.05)
    aggregation = AggregationCard(
        kind=how.kind, size=how.size, weight=how.weight, drift=how.drift, warmup=how.warmup
    )
    heads = [f"head-{i}" for i in range(NUM_HEADS)]
    card = Card(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions=versions(),
        model=model.card,
        layer=model.card.num_layers // 2,
        heads=tuple(HeadCard(name=head, aggregation=aggregation) for head in heads),
    )
    shape = (model.card.hidden_size, NUM_HEADS)
    weight = (rng.normal(size=shape) / 100).astype(np.float32)
    benign = np.zeros(100, np.float32)
    probe = Probe(card, weight, np.zeros(NUM_HEADS, np.float32), dict.fromkeys(heads, benign))
    probe.save(folder / "random.safetensors")
    rules = [
        {
            "id": head,
            "probe": "random.safetensors",
            "head": head,
            "threshold": 1_000_000,
            "action": "observe",
        }
        for head in heads
    ]
    for name, content in (
        (NAME, rules),
        ("default", [{"id": "idle", "literals": ["never said"], "action": "observe"}]),
    ):
        policy = {"version": 1, "name": name, "client_selectable": True, "rules": content}
        (folder / f"{name}.yaml").write_text(json.dumps(policy))


def rounds(quick: bool) -> int:
    """How many rounds count."""
    return 1 if quick else 5


def bench(quick: bool, on_turn: Callable[[str], None]) -> Results:
    """Both batch sizes. on_turn is told what goes on, once a turn."""
    results = Results()
    with engines(write_policy, max(BATCHES)) as (guarded, unguarded):
        for batch in BATCHES:
            turns = measure(
                guarded,
                unguarded,
                batch,
                rounds(quick),
                partial(on_turn, f"batch {batch}"),
                [NAME] * TURNS,
            )
            one = np.ones(1)
            for kind, values in (
                ("tokens/s", turns.tokens_per_second),
                ("CPU time a step", turns.cpu),
            ):
                for label, name in (
                    ("unguarded / unguarded (noise)", UNGUARDED),
                    (f"{NUM_HEADS} heads / unguarded", NAME),
                ):
                    if values.get(name):
                        ratio = Ratio.of(np.array(values[name]), one)
                        text = f"{kind}: {label}"
                        results.cells.append(Cell(ROOM, text, 0, batch, ratio.median, "×", ratio))
            own = np.array(turns.guard_seconds[NAME])
            share = own / np.array(turns.step_seconds[NAME])
            for text, value, unit in (
                ("unguarded step", float(np.median(turns.step_seconds[UNGUARDED])) * 1e3, "ms"),
                ("guard's own time a step", float(np.median(own)) * 1e6, "µs"),
                ("its share of a step", float(np.median(share)) * 100, "%"),
            ):
                results.cells.append(Cell(ROOM, text, 0, batch, value, unit))
    return results


def turns_per_round() -> int:
    """Turns of both engines in a round."""
    return 2 * TURNS + 1
