"""The engine-free front of the library: a policy and a tokenizer make a guard."""

from __future__ import annotations

from typing import Any

from streamguard.compiler.program import Program, compile_program
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.errors import ShapeError, TokenizerError
from streamguard.policy import Policy, PolicySet
from streamguard.session import Session
from streamguard.text_stream import TextStream


class Guard:
    """A policy (or several) compiled for one tokenizer, or for text alone if that is None.

    Compiling takes milliseconds for thousands of patterns, about a second for 100,000; the first
    use on a machine compiles the kernels too (some ten seconds, cached on disk).
    Raises TokenizerError, and PolicyError if the policy exceeds the size limit.
    """

    def __init__(
        self, policy: Policy | PolicySet, tokenizer: Any = None, *, vocab_size: int | None = None
    ) -> None:
        policies = policy if isinstance(policy, PolicySet) else PolicySet.from_policies([policy])
        vocabulary = (
            tokenizer
            if tokenizer is None or isinstance(tokenizer, Vocabulary)
            else Vocabulary.from_tokenizer(tokenizer, vocab_size=vocab_size)
        )
        self.policies = policies
        self.program: Program = compile_program(policies, vocabulary)

    def session(self, num_slots: int = 256) -> Session:
        """Matching state for `num_slots` concurrent texts of token ids.

        Raises TokenizerError for a guard that was made without a tokenizer.
        """
        if not len(self.program.vocabulary):
            raise TokenizerError(
                "session: this guard has no tokenizer; a session reads token ids, which mean "
                "nothing without one. Give it to Guard, or use text_stream() for text."
            )
        return Session(self.program, num_slots)

    def text_stream(self, policy: str | None = None) -> TextStream:
        """A new text, str or bytes, that arrives in pieces; no engine and no tokenizer is needed.

        policy  name; the default policy if None. Raises ShapeError for an unknown one.
        """
        names = self.program.policies
        if policy is None:
            return TextStream(self.program, self.program.default_policy)
        if policy not in names:
            raise ShapeError(f"policy {policy!r} is not in this guard; it has: {', '.join(names)}.")
        return TextStream(self.program, names.index(policy))
