"""Reading the guard's counters as a scraper of /metrics would."""

from __future__ import annotations

from prometheus_client import REGISTRY


def samples(name: str, label: str) -> dict[str, float]:
    """Values of a metric, summed over all labels but one."""
    found: dict[str, float] = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name == name:
                key = sample.labels.get(label, "")
                found[key] = found.get(key, 0) + sample.value
    return found


def verdict_counts() -> dict[str, float]:
    """rule id -> verdicts so far."""
    return samples("streamguard_verdicts_total", "rule")
