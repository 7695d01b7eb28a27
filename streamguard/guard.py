"""The engine-free front of the library: a policy and a tokenizer make a guard."""

from __future__ import annotations

from typing import Any

from streamguard.compiler.program import Program, compile_program
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.policy import Policy, PolicySet
from streamguard.session import Session


class Guard:
    """A policy (or several) compiled for one tokenizer.

    Compiling takes milliseconds for thousands of patterns, about a second for 100,000; the first
    use on a machine compiles the kernels too (some ten seconds, cached on disk).
    Raises TokenizerError, and PolicyError if the policy exceeds the size limit.
    """

    def __init__(
        self, policy: Policy | PolicySet, tokenizer: Any, *, vocab_size: int | None = None
    ) -> None:
        policies = policy if isinstance(policy, PolicySet) else PolicySet.from_policies([policy])
        vocabulary = (
            tokenizer
            if isinstance(tokenizer, Vocabulary)
            else Vocabulary.from_tokenizer(tokenizer, vocab_size=vocab_size)
        )
        self.policies = policies
        self.program: Program = compile_program(policies, vocabulary)

    def session(self, num_slots: int = 256) -> Session:
        """Matching state for `num_slots` concurrent texts."""
        return Session(self.program, num_slots)
