"""The rules of a policy set in one numbered list: what frontends need without any automaton."""

from __future__ import annotations

from dataclasses import dataclass

from streamguard.compiler.vocabulary import Vocabulary
from streamguard.policy import SEVERITY, PolicySet, Rule

#: Groups of rules that the look-ahead tells apart (bits of `Tables.groups`).
MASK, STOP, OBSERVE = 1, 2, 4
_GROUP = {"halt": STOP, "redirect": STOP, "mask": MASK, "redact": OBSERVE, "observe": OBSERVE}


@dataclass(frozen=True)
class CompiledRule:
    """A rule, the policy it belongs to, and how it ranks among all (lower = more severe)."""

    policy: str
    rule: Rule
    group: int
    rank: int


@dataclass(frozen=True)
class RuleTable:
    """All policies' rules by global rule index; policies: names by policy index."""

    rules: tuple[CompiledRule, ...]
    policies: tuple[str, ...]
    default_policy: int
    vocabulary: Vocabulary

    @classmethod
    def from_policies(cls, policies: PolicySet, vocabulary: Vocabulary) -> RuleTable:
        """Number the rules of all policies; within one action the earlier rule is more severe."""
        names = tuple(policies.policies)
        rules = [(name, rule) for name in names for rule in policies.policies[name].rules]
        by_severity = sorted(
            range(len(rules)), key=lambda i: (SEVERITY.index(rules[i][1].action), i)
        )
        ranks = {index: rank for rank, index in enumerate(by_severity)}
        compiled = tuple(
            CompiledRule(name, rule, _GROUP[rule.action], ranks[i])
            for i, (name, rule) in enumerate(rules)
        )
        return cls(compiled, names, names.index(policies.default), vocabulary)

    def policy_rules(self, policy: int) -> tuple[int, ...]:
        """Global indices of one policy's rules, most severe first."""
        name = self.policies[policy]
        mine = [i for i, r in enumerate(self.rules) if r.policy == name]
        return tuple(sorted(mine, key=lambda i: self.rules[i].rank))

    def uses(self, group: int, policy: int | None = None) -> bool:
        """Whether any rule (of one policy) belongs to the group."""
        name = None if policy is None else self.policies[policy]
        return any(r.group & group and name in (None, r.policy) for r in self.rules)
