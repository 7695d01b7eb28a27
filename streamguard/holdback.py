"""Withhold text that the end of a response, or a verdict, would turn into a match.

A `boundary: word` match is certain only with the character behind it. A halt at that character
leaves the word itself written, so it must not have been shown. What has to be withheld is exactly
the tokens after which the text, if it ended there, would show a match: at most a token or two, and
nothing at all for other rules, whose last token is never committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from streamguard.compiler.program import compile_program
from streamguard.compiler.rules import OBSERVE, RuleTable
from streamguard.policy import PolicySet
from streamguard.policy_regexes import needs_next_character
from streamguard.session import Session

_SLOTS = 256


class WordHold:
    """Follows texts under policies with word rules (\\b in a regex too). Tables hold only those.

    Cost: one `Session.advance` and one `Session.would_close` a token, for these policies alone.
    """

    def __init__(self, policies: PolicySet, table: RuleTable) -> None:
        needed = {}
        for name, policy in policies.policies.items():
            rules = tuple(
                compiled.rule
                for compiled in table.rules
                if compiled.policy == name
                and compiled.group != OBSERVE
                and needs_next_character(compiled.rule)
            )
            if rules:
                needed[name] = replace(policy, rules=rules)
        self.policies = frozenset(needed)
        self._free: list[tuple[Session, int]] = []
        if needed:
            default = policies.default if policies.default in needed else next(iter(needed))
            self._program = compile_program(PolicySet(needed, default), table.vocabulary)

    def warm_up(self) -> None:
        """Compile the kernels now, not at the first request."""
        text = self.begin(
            next(iter(self.policies)), (), hide_special_tokens=True, end_token_ids=(),
            show_end_token=False,
        )  # fmt: skip
        text.feed([0])
        self.end(text)

    def begin(
        self,
        policy: str,
        prompt_token_ids: Sequence[int],
        *,
        hide_special_tokens: bool,
        end_token_ids: Sequence[int],
        show_end_token: bool,
    ) -> HeldText:
        """Follow a new text under one of `policies`; arguments as in `Session.reset`."""
        if not self._free:
            session = Session(self._program, _SLOTS)
            self._free = [(session, slot) for slot in range(_SLOTS)]
        session, slot = self._free.pop()
        session.reset(
            slot,
            prompt_token_ids,
            policy=policy,
            hide_special_tokens=hide_special_tokens,
            end_token_ids=end_token_ids,
            show_end_token=show_end_token,
        )
        return HeldText(session, slot)

    def end(self, text: HeldText) -> None:
        """Give a text's place back."""
        self._free.append((text.session, text.slot))


class HeldText:
    """One text: how many of its last tokens must not be shown yet."""

    def __init__(self, session: Session, slot: int) -> None:
        self.session = session
        self.slot = slot
        self.held = 0
        self._behind = b""  # what was written since the first of the withheld tokens

    def feed(self, token_ids: Sequence[int]) -> int:
        """Take in tokens; return how many of the last ones, earlier ones included, to withhold."""
        for token in token_ids:
            self.session.advance([self.slot], [token])
            if self._is_hidden_behind(token) or self.session.would_close([self.slot])[0]:
                self.held += 1
            else:
                self.held, self._behind = 0, b""
        return self.held

    def _is_hidden_behind(self, token: int) -> bool:
        """Whether the reader sees nothing yet of what stands behind the withheld word.

        Detokenizers hold text back while it ends in U+FFFD, and drop it if the response ends there:
        what it says behind a word does not count before it is shown.
        """
        if not self.held:
            return False
        if not self.session.is_invisible(self.slot, token):
            self._behind += self.session.program.vocabulary.token_bytes[token]
        return self._behind.decode(errors="replace").endswith("\ufffd")
