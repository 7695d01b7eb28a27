"""A request's parameters as the guard reads them, in frontends and workers alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamguard.vllm_plugin.settings import KEY, Context

if TYPE_CHECKING:
    from streamguard.holdback import HeldText, WordHold
    from streamguard.session import Session


@dataclass(frozen=True)
class Admission:
    """What a guard needs to know of a request, from its parameters as admission completed them.

    A request that reached the engine without admission falls under the default policy.
    max_tokens: most tokens that the text can have, the engine's own limit included.
    """

    policy: str
    prompt: list[int]
    max_tokens: int
    hide_special_tokens: bool
    end_token_ids: list[int]
    show_end_token: bool

    @classmethod
    def from_request(
        cls, context: Context, params: Any, prompt: Sequence[int] | None, max_model_len: int
    ) -> Admission:
        """Read a request's parameters."""
        entry = (params.extra_args or {}).get(KEY) or {}
        table = context.table
        ids = np.asarray(() if prompt is None else prompt, np.int64)
        room = max_model_len - len(ids)
        # Ids that the vocabulary does not have (placeholders of images, say) are no text.
        foreign = np.flatnonzero((ids < 0) | (ids >= len(table.vocabulary)))
        return cls(
            policy=entry.get("policy", table.policies[table.default_policy]),
            prompt=(ids[foreign[-1] + 1 :] if len(foreign) else ids).tolist(),
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            hide_special_tokens=params.skip_special_tokens,
            end_token_ids=[
                token
                for token in entry.get("ends", params.stop_token_ids or ())
                if 0 <= token < len(table.vocabulary)
            ],
            show_end_token=params.include_stop_str_in_output,
        )

    def reset(self, session: Session, slot: int) -> None:
        """Begin the text in a session's slot."""
        session.reset(
            slot,
            self.prompt,
            policy=self.policy,
            hide_special_tokens=self.hide_special_tokens,
            end_token_ids=self.end_token_ids,
            show_end_token=self.show_end_token,
        )

    def hold(self, hold: WordHold) -> HeldText:
        """Begin the text where words are withheld."""
        return hold.begin(
            self.policy,
            self.prompt,
            hide_special_tokens=self.hide_special_tokens,
            end_token_ids=self.end_token_ids,
            show_end_token=self.show_end_token,
        )
