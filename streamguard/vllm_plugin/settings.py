"""Where the policy comes from, and everything that it compiles to for the served model."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamguard.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from streamguard.compiler.program import Program
    from streamguard.compiler.rules import RuleTable
    from streamguard.holdback import WordHold
    from streamguard.metrics import AdmissionMetrics, WorkerMetrics
    from streamguard.policy import PolicySet, Rule
    from streamguard.verdict import VerdictCodes

POLICY_VARIABLE = "STREAMGUARD_POLICY"
REQUIRED_VARIABLE = "STREAMGUARD_REQUIRED"
LENIENT_VARIABLE = "STREAMGUARD_LENIENT"
ALLOW_STALE_VARIABLE = "STREAMGUARD_ALLOW_STALE"
#: Key of `--additional-config` and of a request's extra_args.
KEY = "streamguard"


def required() -> bool:
    """Whether the operator said that nothing may be served without a guard."""
    return os.environ.get(REQUIRED_VARIABLE, "") not in ("", "0")


def lenient_by_environment() -> bool:
    """Whether bad literals are to be skipped, as the environment has it.

    Raises ConfigurationError for a value that could be meant either way.
    """
    return _flag(LENIENT_VARIABLE, "leave literals out of the guard, or refuse to start")


def allow_stale_by_environment() -> bool:
    """Whether probes of another model may observe, as the environment has it.

    Raises ConfigurationError for a value that could be meant either way.
    """
    return _flag(ALLOW_STALE_VARIABLE, "let probes of another model observe, or refuse to start")


def _flag(variable: str, harm: str) -> bool:
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ConfigurationError(
            f"{variable} is {value!r}; allowed: 0, 1. Read wrongly it would {harm}. Write "
            f"{variable}=1, or unset it."
        )
    return value == "1"


def policy_path(vllm_config: VllmConfig) -> str | None:
    """The configured policy file or folder, None if there is none.

    Raises ConfigurationError for an additional-config entry that cannot be read.
    """
    entry = _additional(vllm_config)
    if entry is not None and "policy" in entry:
        return str(entry["policy"])
    path = os.environ.get(POLICY_VARIABLE) or None
    if entry is not None and path is None:
        raise _not_understood(entry)
    return path


def lenient(vllm_config: VllmConfig) -> bool:
    """Whether bad literals are skipped; what the configuration says counts before the environment.

    Raises ConfigurationError as `policy_path` and `lenient_by_environment` do.
    """
    entry = _additional(vllm_config) or {}
    return bool(entry["lenient"]) if "lenient" in entry else lenient_by_environment()


def allow_stale(vllm_config: VllmConfig) -> bool:
    """Whether probes of another model may observe; the configuration counts before the environment.

    Raises ConfigurationError as `policy_path` and `allow_stale_by_environment` do.
    """
    entry = _additional(vllm_config) or {}
    if "allow_stale" in entry:
        return bool(entry["allow_stale"])
    return allow_stale_by_environment()


def stale_probes(vllm_config: VllmConfig) -> frozenset[str] | None:
    """`Probe.sha256` of the probes that the main process found to be of another model: they observe.

    None if the main process has not looked.
    """
    entry = _additional(vllm_config) or {}
    return frozenset(entry["stale_probes"]) if "stale_probes" in entry else None


def _additional(vllm_config: VllmConfig) -> dict[str, Any] | None:
    additional = getattr(vllm_config, "additional_config", None)
    if not isinstance(additional, dict) or KEY not in additional:
        return None
    entry = additional[KEY]
    known = {
        "policy": str,
        "sha256": str,
        "lenient": bool,
        "allow_stale": bool,
        "stale_probes": list,
    }
    if (
        not isinstance(entry, dict)
        or not set(entry) <= set(known)
        or not all(isinstance(value, known[key]) for key, value in entry.items())
        or not entry.keys() & {"policy", "lenient", "allow_stale"}
    ):
        raise _not_understood(entry)
    return entry


def _not_understood(entry: object) -> ConfigurationError:
    return ConfigurationError(
        f'--additional-config: "{KEY}" is {entry!r}; allowed: {{"policy": "FILE", "lenient": true '
        f'or false, "allow_stale": true or false}}; the first may come from {POLICY_VARIABLE}. What '
        f"is not understood would leave the engine unguarded. Correct it."
    )


def load_policies(vllm_config: VllmConfig) -> PolicySet | None:
    """The policies in force; None if the plugin is inert.

    Raises PolicyError, or ConfigurationError if the files changed since the engine was configured.
    """
    path = policy_path(vllm_config)
    if path is None:
        return None
    from streamguard.policy import PolicySet

    policies = PolicySet.load(path, lenient=lenient(vllm_config))
    additional = vllm_config.additional_config
    expected = additional.get(KEY, {}).get("sha256") if isinstance(additional, dict) else None
    if expected not in (None, policies.sha256):
        raise ConfigurationError(
            f"{path}: the policy has sha256 {policies.sha256[:12]}…, the engine was configured with "
            f"{expected[:12]}…; it was changed while the engine started. Start again."
        )
    return policies


def observing(policies: PolicySet, stale: Collection[str]) -> PolicySet:
    """The same policies, with the rules of these probes (by `Probe.sha256`) only observing."""

    def demoted(rule: Rule) -> Rule:
        if rule.probe is None or rule.probe.sha256 not in stale:
            return rule
        return replace(rule, action="observe", message=None)

    return replace(
        policies,
        policies={
            name: replace(policy, rules=tuple(map(demoted, policy.rules)))
            for name, policy in policies.policies.items()
        },
    )


@dataclass(frozen=True)
class Context:
    """Policies, rules and codes for one served model; the automata only on demand (workers)."""

    policies: PolicySet
    table: RuleTable
    codes: VerdictCodes

    @classmethod
    def from_config(cls, vllm_config: VllmConfig) -> Context | None:
        """Build from the engine's configuration; None if no policy is configured. Cached."""
        policies = load_policies(vllm_config)
        if policies is None:
            return None
        stale = stale_probes(vllm_config)
        if stale:
            policies = observing(policies, stale)
        model = vllm_config.model_config
        return _build(policies.sha256, _Key(policies, vllm_config), model.get_vocab_size())

    @cached_property
    def program(self) -> Program:
        """The compiled automata."""
        from streamguard.compiler.cache import cached_program

        return cached_program(self.policies, self.table.vocabulary)

    @cached_property
    def uses_probes(self) -> bool:
        """Whether any policy has a rule that reads a probe."""
        return any(rule.rule.probe is not None for rule in self.table.rules)

    def reads_hidden_states(self, policy: str, stage: str | None = None) -> bool:
        """Whether a policy has a probe rule (that reads the tokens of a stage)."""
        return any(
            rule.probe is not None and stage in (None, rule.stage)
            for rule in self.policies.policies[policy].rules
        )

    @cached_property
    def word_hold(self) -> WordHold | None:
        """What frontends withhold under rules that need the next character; None if there are none."""
        from streamguard.holdback import WordHold

        hold = WordHold(self.policies, self.table)
        return hold if hold.policies else None

    @cached_property
    def admission_metrics(self) -> AdmissionMetrics:
        """Metrics of a frontend process."""
        from streamguard.metrics import AdmissionMetrics

        return AdmissionMetrics(self.table.policies)

    @cached_property
    def worker_metrics(self) -> WorkerMetrics:
        """Metrics of a worker process."""
        from streamguard.metrics import WorkerMetrics

        # Rules of several policies may share an id and labels; they share a counter then.
        return WorkerMetrics(
            dict.fromkeys(map(self.labels, range(len(self.table.rules)))), self.score_names
        )

    @cached_property
    def score_names(self) -> list[str]:
        """By column of the scores (as `ProbeTable` has them): the probe's file and head."""
        probes = {r.rule.probe.sha256: r.rule.probe for r in self.table.rules if r.rule.probe}
        return [
            f"{Path(rule.path).stem}/{head}"
            for rule in probes.values()
            for head in (rule.probe.heads if rule.probe is not None else ())
        ]

    def labels(self, rule: int) -> tuple[str, str, str, str]:
        """Metric labels of a rule by global index."""
        found = self.table.rules[rule].rule
        return found.id, found.category, found.action, found.stage


class _Key:
    """Carries what `_build` needs past lru_cache; equal for equal tokenizers."""

    def __init__(self, policies: PolicySet, vllm_config: VllmConfig) -> None:
        self.policies = policies
        self.config = vllm_config
        model = vllm_config.model_config
        self._key = (model.tokenizer, model.tokenizer_revision, model.model, model.tokenizer_mode)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._key == other._key


@lru_cache(maxsize=8)
def _build(sha256: str, key: _Key, vocab_size: int) -> Context:
    from vllm.tokenizers import cached_tokenizer_from_config

    from streamguard.compiler.rules import RuleTable
    from streamguard.compiler.vocabulary import Vocabulary
    from streamguard.verdict import VerdictCodes

    model = key.config.model_config
    tokenizer: Any = cached_tokenizer_from_config(model)
    eos = (model.try_get_generation_config() or {}).get("eos_token_id")
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if tokenizer.eos_token_id is not None:
        ids.insert(0, tokenizer.eos_token_id)
    vocabulary = Vocabulary.from_tokenizer(
        tokenizer, vocab_size=vocab_size, eos_token_ids=tuple(dict.fromkeys(map(int, ids)))
    )
    table = RuleTable.from_policies(key.policies, vocabulary)
    codes = VerdictCodes.from_table(
        table,
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False),
    )
    return Context(key.policies, table, codes)
