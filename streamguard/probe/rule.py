"""What a rule of a policy says of a probe, resolved: which score it reads and when it fires."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamguard.probe.aggregation import Aggregation
    from streamguard.probe.artifact import Probe


@dataclass(frozen=True)
class ProbeRule:
    """One head of a probe and the threshold at which its rule fires; immutable, comparable.

    path         of the probe as the policy file has it; sha256: `Probe.sha256`.
    head         name of the column `column` of the probe's weights.
    threshold    what the head's running statistic has to reach. Where the policy asked for a share
                 of benign texts, that is `fpr` (else None) with `confidence`.
    hysteresis   an observe rule counts again only after the statistic was below threshold - hysteresis.
    stage        whose tokens are read: output or prompt.
    probe        the probe itself, None in policies that come from a compiled artefact.
    """

    path: str
    sha256: str
    head: str
    column: int
    threshold: float
    fpr: float | None
    confidence: float
    hysteresis: float
    aggregation: Aggregation
    stage: str
    probe: Probe | None = field(default=None, compare=False, repr=False)

    @property
    def content(self) -> dict[str, Any]:
        """What the rule does, for digests; column, aggregation and stage follow from the probe's."""
        keys = ("sha256", "head", "threshold", "hysteresis")
        return {key: getattr(self, key) for key in keys}

    def stored(self) -> dict[str, Any]:
        """All but the probe itself, as JSON has it."""
        fields = {key: value for key, value in vars(self).items() if key != "probe"}
        return {**fields, "aggregation": asdict(self.aggregation)}

    @classmethod
    def restored(cls, fields: dict[str, Any]) -> ProbeRule:
        """The inverse of `stored`. Raises TypeError for other fields."""
        from streamguard.probe.aggregation import Aggregation

        return cls(**{**fields, "aggregation": Aggregation(**fields["aggregation"])})
