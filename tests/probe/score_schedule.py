"""What an engine does to score rows: chunks, cached prefixes, restarts, recycled slots, lost rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from probes import save_probe

from streamguard.compiler.rules import RuleTable
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.policy import Policy, PolicySet
from streamguard.probe.aggregation import Aggregation
from streamguard.probe.columns import ProbeTable

HEADS = {
    "raw": Aggregation(),
    "mean": Aggregation("window", size=4, warmup=2),
    "run": Aggregation("consecutive", size=3),
    "ema": Aggregation("ema", weight=0.5, warmup=3),
    "sum": Aggregation("cusum", drift=0.5),
}
LIMIT = 20


def policies(folder: Path) -> PolicySet:
    """Policies with monitors of every kind, stage and action; one without probes, one of both."""
    save_probe(folder, "out.safetensors", heads=HEADS)
    save_probe(folder, "in.safetensors", heads=HEADS, stage="prompt", seed=1)
    save_probe(folder, "one.safetensors", seed=2)

    def rule(name: str, head: str, action: str, probe: str = "out", **more: object) -> dict:
        stage = {"stage": "prompt"} if probe == "in" else {}
        message = {"message": "no"} if action == "redirect" else {}
        return {
            "id": name, "probe": f"{probe}.safetensors", "threshold": 1.0, "action": action,
            **({"head": head} if head else {}), **stage, **message, **more,
        }  # fmt: skip

    literal = {"id": "word", "literals": ["bo"], "action": "halt"}
    found = {
        "default": [
            rule("see", "raw", "observe"),
            rule("late", "ema", "redirect", threshold=1.25),
            rule("stop", "run", "halt", threshold=0.5),
        ],
        "wide": [
            rule("see-sum", "sum", "observe", threshold=2.0, hysteresis=1.0),
            rule("see-mean", "mean", "observe", hysteresis=0.5),
            literal,
            rule("one", "", "observe", "one", threshold=1.5),
            rule("stop-sum", "sum", "halt", threshold=6.0),
        ],
        "words": [literal],
        "asked": [
            rule("see-in", "raw", "observe", "in", threshold=1.5),
            rule("see-out", "raw", "observe", threshold=1.5),
            rule("stop-in", "mean", "halt", "in", threshold=1.25),
            rule("stop-out", "mean", "redirect"),
        ],
        "prompt-only": [
            rule("see-ema", "ema", "observe", "in"),
            rule("see-run", "run", "observe", "in", threshold=0.25),
        ],
    }
    return PolicySet.from_policies(
        [
            Policy.from_dict({"version": 1, "name": name, "rules": rules}, base_dir=folder)
            for name, rules in found.items()
        ]
    )


def rule_table(folder: Path) -> RuleTable:
    return RuleTable.from_policies(policies(folder), Vocabulary.empty())


@dataclass
class Request:
    """One text. scores float32[LIMIT, num_columns]; known tokens, of which `computed` have scores."""

    policy: int
    prompt_len: int
    scores: np.ndarray
    computed: int
    known: int
    lost: int = LIMIT  # first position that is read whose scores never arrive, though later ones do


@dataclass
class Step:
    """resets: (slot, policy, prompt_len, count_from); arrays as `Monitor.feed` takes them.

    valid  bool[n]: the row's sample will be committed. before: tokens known, by row.
    """

    resets: list[tuple[int, int, int, int]]
    slots: np.ndarray
    starts: np.ndarray
    row_offsets: np.ndarray
    scores: np.ndarray
    valid: np.ndarray
    before: np.ndarray


class Schedule:
    """Random requests over `num_slots` slots. faults: rate of NaN scores and of lost rows."""

    def __init__(
        self, table: ProbeTable, num_slots: int, rng: random.Random, faults: float = 0.02
    ) -> None:
        self.table, self.rng, self.faults = table, rng, faults
        self.requests: list[Request | None] = [None] * num_slots
        self.restarted = 0

    def step(self) -> Step:
        rng, resets = self.rng, []
        for slot, request in enumerate(self.requests):
            if request is None or request.known >= LIMIT or rng.random() < 0.03:
                request = self.requests[slot] = self._request()
                resets.append(self._reset(slot, request))
            elif rng.random() < 0.08:
                self.restarted += request.known > request.prompt_len
                request.computed, request.lost = (
                    self._begin(request.policy, request.prompt_len),
                    LIMIT,
                )
                resets.append(self._reset(slot, request))
        slots = rng.sample(range(len(self.requests)), rng.randrange(1, len(self.requests) + 1))
        starts, pieces, valid, before = [], [], [], []
        for slot in slots:
            request = self.requests[slot]
            assert request is not None
            if rng.random() < self.faults and request.known - request.computed > 1:
                reads_prompt = self.table.reads_prompt(request.policy)
                if reads_prompt or request.computed >= request.prompt_len:
                    request.lost = min(request.lost, request.computed)
                request.computed += 1
            end = min(request.known, request.computed + rng.randrange(1, 7))
            starts.append(request.computed)
            pieces.append(request.scores[request.computed : end])
            valid.append(end == request.known)
            before.append(request.known)
            request.computed = end
            request.known += end == request.known
        offsets = np.cumsum([0, *map(len, pieces)])
        return Step(
            resets, np.array(slots), np.array(starts), offsets, np.concatenate(pieces),
            np.array(valid), np.array(before),
        )  # fmt: skip

    def _request(self) -> Request:
        rng = self.rng
        policy = rng.randrange(len(self.table.rule))
        prompt_len = rng.randrange(1, 12)
        # Eighths: sums, halves and means of four are exact.
        scores = np.array(
            [
                [rng.randrange(-16, 20) / 8 for _ in range(self.table.num_columns)]
                for _ in range(LIMIT)
            ],
            np.float32,
        )
        if rng.random() < 5 * self.faults:
            columns = rng.sample(range(self.table.num_columns), rng.randrange(1, 6))
            scores[rng.randrange(LIMIT), columns] = rng.choice([np.nan, np.inf, -np.inf])
        begin = self._begin(policy, prompt_len)
        return Request(policy, prompt_len, scores, begin, prompt_len)

    def _begin(self, policy: int, prompt_len: int) -> int:
        """Where a forward pass begins: some of the prompt is cached, unless its scores are needed."""
        return 0 if self.table.reads_prompt(policy) else self.rng.randrange(prompt_len)

    @staticmethod
    def _reset(slot: int, request: Request) -> tuple[int, int, int, int]:
        return slot, request.policy, request.prompt_len, request.known - 1


def statistics(how: Aggregation, scores: Sequence[float]) -> list[float]:
    """The definition of each statistic, read off the words."""
    found = []
    for i in range(len(scores)):
        last = list(scores[max(0, i + 1 - how.size) : i + 1])
        if how.kind == "window":
            found.append(sum(last) / len(last))
        elif how.kind == "consecutive":
            found.append(min(last) if len(last) == how.size else float("-inf"))
        elif how.kind == "ema":
            before = found[-1] if found else 0.0
            found.append(max(0.0, before + how.weight * (scores[i] - before)))
        else:
            found.append(max(0.0, (found[-1] if found else 0.0) + scores[i] - how.drift))
    return found
