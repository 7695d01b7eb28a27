"""Which scores a server's probe rules read: the columns of the score buffer, and tables for monitors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamguard.compiler.rules import OBSERVE, CompiledRule, RuleTable
from streamguard.errors import ProbeError
from streamguard.probe.artifact import Probe


@dataclass(frozen=True)
class ProbeTable:
    """The probes of all policies and what each policy watches them for. Make one with `from_table`.

    probes         distinct by `Probe.sha256`, in the order of the rules that name them first.
    column_offset  by `Probe.sha256`: first column of the score buffer of the probe; its heads follow.
    num_columns    of the score buffer.

    A *monitor* is one probe rule of one policy. Arrays over [num_policies, max_monitors >= 1]; a place
    without a monitor has rule -1. Within a policy the most severe rule comes first.
    rule           int32: global rule index
    column         int32: of the score buffer
    kind, size     int32; weight, drift float32; warmup int32: see `Aggregation`
    threshold, hysteresis  float32, in units of the statistic
    stage          int32: 0 = reads the output, 1 = the prompt
    stop           bool: the rule ends the response; else it observes
    rank           int32: `CompiledRule.rank`
    """

    probes: tuple[Probe, ...]
    column_offset: Mapping[str, int]
    num_columns: int
    rule: NDArray[np.int32]
    column: NDArray[np.int32]
    kind: NDArray[np.int32]
    size: NDArray[np.int32]
    weight: NDArray[np.float32]
    drift: NDArray[np.float32]
    warmup: NDArray[np.int32]
    threshold: NDArray[np.float32]
    hysteresis: NDArray[np.float32]
    stage: NDArray[np.int32]
    stop: NDArray[np.bool_]
    rank: NDArray[np.int32]

    @classmethod
    def from_table(cls, table: RuleTable) -> ProbeTable:
        """Lay out the probes of a rule table.

        Raises ProbeError for rules that came from a compiled artefact without their policies.
        """
        probes: dict[str, Probe] = {}
        watched: list[list[tuple[int, CompiledRule]]] = [[] for _ in table.policies]
        for index, compiled in enumerate(table.rules):
            found = compiled.rule.probe
            if found is None:
                continue
            if found.probe is None:
                raise ProbeError(
                    f'policy {compiled.policy!r}: rule "{compiled.rule.id}": the weights of '
                    f"{found.path} are not loaded: a compiled artefact holds none. Load the policy "
                    f"file, and give it to Artifact.load."
                )
            probes.setdefault(found.sha256, found.probe)
            watched[table.policies.index(compiled.policy)].append((index, compiled))
        offsets: dict[str, int] = {}
        num_columns = 0
        for sha256, probe in probes.items():
            offsets[sha256] = num_columns
            num_columns += len(probe.heads)
        shape = len(table.policies), max(1, *map(len, watched))
        rule, stop = np.full(shape, -1, np.int32), np.zeros(shape, bool)
        column, kind, stage, rank = (np.zeros(shape, np.int32) for _ in range(4))
        size, warmup = np.ones(shape, np.int32), np.ones(shape, np.int32)
        weight, drift, threshold, hysteresis = (np.zeros(shape, np.float32) for _ in range(4))
        for policy, mine in enumerate(watched):
            for k, (index, compiled) in enumerate(sorted(mine, key=lambda entry: entry[1].rank)):
                found = compiled.rule.probe
                assert found is not None
                how = found.aggregation
                at = policy, k
                rule[at], rank[at], stop[at] = index, compiled.rank, compiled.group != OBSERVE
                column[at] = offsets[found.sha256] + found.column
                kind[at], size[at], warmup[at] = how.code, how.size, how.warmup
                weight[at], drift[at] = how.weight, how.drift
                threshold[at], hysteresis[at] = found.threshold, found.hysteresis
                stage[at] = found.stage == "prompt"
        return cls(
            tuple(probes.values()), offsets, num_columns, rule, column, kind, size, weight, drift,
            warmup, threshold, hysteresis, stage, stop, rank,
        )  # fmt: skip

    @property
    def watched(self) -> NDArray[np.int32]:
        """Which columns a policy reads: 1 = in outputs, 2 = in prompts, 3 = in both.

        int32[num_policies, num_columns].
        """
        found = np.zeros((len(self.rule), self.num_columns), np.int32)
        for at in zip(*np.nonzero(self.rule >= 0), strict=True):
            found[at[0], self.column[at]] |= 2 if self.stage[at] else 1
        return found

    def uses(self, policy: int) -> bool:
        """Whether a policy has a probe rule."""
        return bool((self.rule[policy] >= 0).any())

    def reads_prompt(self, policy: int) -> bool:
        """Whether a policy has a probe rule that reads the prompt."""
        return bool(((self.rule[policy] >= 0) & (self.stage[policy] == 1)).any())
