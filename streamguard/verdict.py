"""What is said in the token stream when a rule fires, and how a reader finds it there again.

A verdict replaces the token that would have completed the match by a *script*: a spare token id that
names the rule, the message of a redirect, and a spare id that stops the response. Scripts are
ordinary committed tokens, so preemption, chunked prefill and restarts cannot lose them, and they
need no other channel from the sampler to the frontend. Spare ids are ids that the tokenizer never
produces (`Vocabulary.spare`); clients never see them.

  halt      [R]  or, with more rules than spare ids, [marker, code, stop]
  redirect  [R, message…, stop]  or  [marker, code, message…, stop]

R is the rule's own spare id; code is an ordinary token whose index names the rule. A vocabulary with
fewer than two spare ids has scripts without them, [message…, EOS], and the verdict is kept beside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamguard.compiler.rules import OBSERVE, RuleTable
from streamguard.errors import PolicyError, TokenizerError

UNKNOWN = -2
"""A verdict whose rule was lost with the engine's memory between marker and code."""
FAILED = -3
"""Not a rule: the guard itself failed on this response, and its policy says `on_error: block`."""


@dataclass(frozen=True)
class VerdictCodes:
    """Scripts of all rules of a table, and their decoding.

    stop_id, marker_id  spare ids, None if the vocabulary has too few; eos_id ends texts then.
    rule_of             spare id -> global rule index, per policy (ids are shared between policies).
    scripts             per global rule index the tokens to force, empty for observe rules.
    code_of             ordinary token id -> local index of a rule in `RuleTable.policy_rules`.
    """

    eos_id: int
    stop_id: int | None
    marker_id: int | None
    rule_of: tuple[dict[int, int], ...]
    scripts: tuple[tuple[int, ...], ...]
    code_of: dict[int, int]
    policy_rules: tuple[tuple[int, ...], ...]
    spare: frozenset[int] = field(default=frozenset())

    @property
    def kept_beside(self) -> bool:
        """Whether the vocabulary has no ids to spare, so that verdicts travel outside the stream."""
        return self.marker_id is None

    def for_device(self, table: RuleTable) -> dict[str, Any]:
        """What `device_tables.to_device` takes of a table and its codes, by name."""
        return {
            "rule_group": [rule.group for rule in table.rules],
            "rule_policy": [table.policies.index(rule.policy) for rule in table.rules],
            "stop_id": self.stop_id,
            "marker_id": self.marker_id,
            "rule_of": self.rule_of,
            "scripts": self.scripts,
            "code_of": self.code_of,
            "code_rules": self.policy_rules,
            "eos_token": self.eos_id,
        }

    @classmethod
    def from_table(
        cls,
        table: RuleTable,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
    ) -> VerdictCodes:
        """Assign spare ids to rules and tokenize messages; the same in every process.

        encode, decode  the tokenizer's, without special tokens.
        Raises PolicyError if a message does not survive the tokenizer, TokenizerError if the
        vocabulary has neither spare ids nor an EOS.
        """
        vocabulary = table.vocabulary
        spare = vocabulary.spare
        beside = len(spare) < 2
        if beside and not vocabulary.eos_token_ids:
            raise TokenizerError(
                "the vocabulary has neither two spare token ids nor an end-of-text token, so no "
                "response could be ended on a verdict. Add reserved special tokens to the tokenizer, "
                "or name the model's eos_token_id in generation_config.json."
            )
        eos = vocabulary.eos_token_ids[0] if vocabulary.eos_token_ids else spare[0]
        stop = eos if beside else spare[0]
        special = set(spare) | set(vocabulary.eos_token_ids)
        special |= {i for i, flag in enumerate(vocabulary.special) if flag}
        scripts: list[tuple[int, ...]] = [()] * len(table.rules)
        rule_of: list[dict[int, int]] = []
        policy_rules: list[tuple[int, ...]] = []
        rules_per_policy = [
            [i for i in table.policy_rules(p) if table.rules[i].group != OBSERVE]
            for p in range(len(table.policies))
        ]
        most = max(map(len, rules_per_policy))
        codes = [
            i for i in range(len(vocabulary)) if i not in special and vocabulary.token_bytes[i]
        ]
        for indices in rules_per_policy:
            own: dict[int, int] = {}
            for local, index in enumerate(indices):
                message = _message(table, index, encode, decode, special)
                if beside:
                    scripts[index] = (*message, stop)
                elif local + 2 < len(spare):
                    own[spare[local + 2]] = index
                    scripts[index] = (spare[local + 2], *((*message, stop) if message else ()))
                else:
                    scripts[index] = (spare[1], codes[local], *message, stop)
            rule_of.append(own)
            policy_rules.append(tuple(indices))
        return cls(
            eos,
            None if beside else stop,
            None if beside else spare[1],
            tuple(rule_of),
            tuple(scripts),
            {token: local for local, token in enumerate(codes[:most])},
            tuple(policy_rules),
            frozenset() if beside else frozenset(spare[: most + 2]),
        )

    def stop_token_ids(self, policy: int) -> list[int]:
        """Ids that must stop a response under this policy at once."""
        if self.stop_id is None:
            return [self.eos_id]
        ends = [i for i, rule in self.rule_of[policy].items() if len(self.scripts[rule]) == 1]
        return [self.stop_id, *ends]


def _message(
    table: RuleTable,
    index: int,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    special: set[int],
) -> list[int]:
    rule = table.rules[index].rule
    if not rule.message:
        return []
    tokens = encode(rule.message)
    if special.intersection(tokens) or decode(tokens).strip() != rule.message.strip():
        raise PolicyError(
            f'policy {table.rules[index].policy!r}: rule "{rule.id}": message {rule.message[:80]!r} '
            f"reads {decode(tokens)[:80]!r} once it went through the model's tokenizer. Use a "
            f"message without special tokens and of characters that the tokenizer knows."
        )
    return tokens


class VerdictReader:
    """Takes the scripts of one response's stream apart: what to show, and which rule fired.

    rule is the global index once a verdict was read, UNKNOWN if its code was cut off, FAILED if the
    guard gave up on the response, else None.
    """

    def __init__(self, codes: VerdictCodes, policy: int) -> None:
        self._codes = codes
        self._policy = policy
        self._code_next = False
        self.rule: int | None = None

    def feed(self, token_ids: Sequence[int]) -> list[int]:
        """Positions in `token_ids` of tokens that the client may see."""
        codes, shown = self._codes, []
        for position, token in enumerate(token_ids):
            if self._code_next:
                self._code_next = False
                local = codes.code_of.get(token)
                rules = codes.policy_rules[self._policy]
                if local is not None and local < len(rules):
                    self.rule = rules[local]
                    continue
            if self.rule is None and token in codes.rule_of[self._policy]:
                self.rule = codes.rule_of[self._policy][token]
            elif self.rule is None and token == codes.marker_id:
                self.rule, self._code_next = UNKNOWN, True
            elif self.rule is None and token == codes.stop_id:
                self.rule = FAILED  # a stop without a rule before it
            elif token not in codes.spare:
                shown.append(position)
        return shown


@dataclass
class Progress:
    """How far a slot's script has been committed: state as a function of committed tokens.

    rule is None while no verdict stands. remembered is the rule that `decide` last chose for the
    slot: needed only between a marker and its code.
    """

    rule: int | None = None
    step: int = 0
    remembered: int = UNKNOWN

    def commit(self, codes: VerdictCodes, policy: int, token: int) -> bool:
        """Take note of a committed token; return whether it belongs to a verdict."""
        if self.rule is not None:
            if self.step == 1 and (
                self.rule < 0 or codes.scripts[self.rule][:1] == (codes.marker_id,)
            ):
                local = codes.code_of.get(token)
                if local is not None and local < len(codes.policy_rules[policy]):
                    self.rule = codes.policy_rules[policy][local]
            self.step += 1
            return True
        if token in codes.rule_of[policy]:
            self.rule, self.step = codes.rule_of[policy][token], 1
        elif token == codes.marker_id and token is not None:
            self.rule, self.step = self.remembered, 1
        else:
            return False
        return True

    def forced(self, codes: VerdictCodes) -> int:
        """The next token of the script that runs."""
        assert self.rule is not None
        if self.rule < 0:
            return codes.stop_id if codes.stop_id is not None else codes.eos_id
        script = codes.scripts[self.rule]
        return script[min(self.step, len(script) - 1)]
