"""Per-slot matching state: what each text has shown so far and what it must not show next.

A slot's state is a function of its committed tokens alone. Nothing here knows an engine; the vLLM
plugin, the tests' fake engine and library users drive the same class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamguard.compiler.program import Program
from streamguard.compiler.rules import MASK, STOP
from streamguard.errors import ShapeError
from streamguard.regex_masks import RegexMasks
from streamguard_kernels.advance import (
    COMMIT,
    ENDS,
    FIRST,
    LAST,
    SILENT,
    UNSEEN,
    close_prompts,
    end_groups,
    walk_kernel,
)
from streamguard_kernels.lookahead import (
    RANGES_AND_REGEXES,
    RANGES_SUFFICE,
    WALKED,
    apply_ranges,
    mark_forbidden,
    pack_ranges,
)
from streamguard_kernels.packing import address
from streamguard_kernels.regex_masks import states_before_tokens
from streamguard_kernels.slots import Slots, pack_slots, settle
from streamguard_kernels.tables import pack_tables
from streamguard_kernels.utf8 import MAX_MAPPED_BYTES

_EVENTS = _ROWS = 4096
#: Combinations of states that a session with policies of several tracks keeps; a power of two.
_KEPT = 4096
_INT64 = np.dtype(np.int64)  # the instance: numpy takes 0.2 µs to find it by its type


class Session:
    """Matching state of `num_slots` concurrent texts over one compiled program.

    Cost: one table read per byte and track; about 16 bytes of state a slot and track, and some 1.3 MB
    of remembered walks where a policy has several tracks. Not thread-safe: one session belongs to one
    sampler.
    """

    def __init__(self, program: Program, num_slots: int) -> None:
        if num_slots < 1:
            raise ShapeError(f"num_slots is {num_slots}; a session needs at least 1 slot.")
        self.program = program
        self.num_slots = num_slots
        self._tables = program.tables
        self._packed = pack_tables(program.tables)
        self._tables_at = address(self._packed)
        self._packed_ranges: dict[int, NDArray[np.int64]] = {}
        self._ranges_at: dict[int, int] = {}
        kept = _KEPT if program.max_tracks > 2 else 0
        self._slots = Slots(
            policy=np.full(num_slots, -1, np.int64),
            plain=np.zeros(num_slots, np.uint8),
            hidden=np.ones(num_slots, np.uint8),
            end_tokens=np.full((num_slots, 8), -1, np.int64),
            end_bits=np.full(num_slots, UNSEEN | LAST, np.uint8),
            state=np.zeros((num_slots, program.max_tracks), np.int64),
            synced=np.full(num_slots, -1, np.int64),
            pending=np.zeros(num_slots, np.int64),
            events=np.zeros((_EVENTS, 2), np.int64),
            num_events=np.zeros(1, np.int64),
            buffer=np.zeros(MAX_MAPPED_BYTES, np.uint8),
            scratch=np.zeros(program.max_tracks, np.int64),
            row_last=np.zeros(_ROWS, np.uint8),
            best=np.zeros(_ROWS, np.int64),
            memo_states=np.zeros((kept, program.max_tracks), np.uint32),
            memo_places=np.zeros(2 * kept, np.int64),
            memo_walks=np.zeros((8 * kept, 3), np.int64),
            num_memo=np.zeros(2, np.int64),
        )
        # What a walk that completes nothing returns, and where the last other one of as many rows wrote:
        # to make an array takes as long as to walk forty rows.
        self._nothing = self._best = np.zeros(0, np.int64)
        self._advance_call, self._prompt_call, self._peek_call = np.zeros((3, 6), np.int64)
        self._advance_call[COMMIT] = self._prompt_call[COMMIT] = 1
        self._prompt_call[SILENT] = 1  # what a prompt holds is no event, and could be a million
        self._replace()
        # Compiled for flat arrays and for nothing else: others are converted in `_walk`. To look at
        # their shapes and strides before each call would cost as much as the walk at batch 1.
        walk_kernel(self._advance_call, *np.zeros((2, 0), np.int64))
        walk_kernel.disable_compile()
        self._mask_rules = np.array([r.group == MASK for r in program.rules], np.uint8)
        self._stop_rules = np.array([r.group == STOP for r in program.rules], np.uint8)
        # Per policy; see `apply_ranges`.
        t = self._tables
        spans = list(zip(t.policy_tracks[:-1].tolist(), t.policy_tracks[1:].tolist(), strict=True))
        wraps = np.array([bool(t.mapping_wrap[t.track_mapping[lo:hi]].any()) for lo, hi in spans])
        self._shrinks = [bool(t.mapping_shrinks[t.track_mapping[lo:hi]].any()) for lo, hi in spans]
        self._has_regexes = np.array([bool(t.track_regex[lo:hi].any()) for lo, hi in spans])
        self._regex_masks = RegexMasks(program)
        self._masks = np.array([program.uses(MASK, p) for p in range(len(wraps))])
        self._stops = np.array([program.uses(STOP, p) for p in range(len(wraps))])
        self._masking = np.where(
            self._stops | (wraps & ~self._has_regexes),
            WALKED,
            np.where(self._has_regexes, RANGES_AND_REGEXES, RANGES_SUFFICE),
        )
        self._masking = (self._masking * self._masks).astype(np.uint8)

    def reset(
        self,
        slot: int,
        prompt_token_ids: Sequence[int] = (),
        *,
        policy: str | None = None,
        hide_special_tokens: bool = True,
        end_token_ids: Sequence[int] | None = None,
        show_end_token: bool = False,
    ) -> None:
        """Begin a new text in a slot; forget its former occupant.

        prompt_token_ids     what stands before the text; a pattern may begin in its tail.
        policy               name; the default policy if None.
        hide_special_tokens  whether the reader skips special tokens (vLLM's skip_special_tokens).
        end_token_ids        tokens after which the text is over; the vocabulary's EOS if None.
        show_end_token       whether the reader sees the text of the end token too.
        Raises ShapeError for an unknown slot, policy or token id.
        """
        self._check_slots(np.array([slot]))
        program, t = self.program, self._tables
        if policy is None:
            p = program.default_policy
        elif policy in program.policies:
            p = program.policies.index(policy)
        else:
            raise ShapeError(
                f"policy {policy!r} is not in this session; it has: {', '.join(program.policies)}."
            )
        ends = program.vocabulary.eos_token_ids if end_token_ids is None else end_token_ids
        end_tokens = np.array(sorted(set(ends)), np.int64)
        prompt = np.asarray(prompt_token_ids, np.int64)
        self._check_tokens(end_tokens)
        self._check_tokens(prompt)
        missing = len(end_tokens) - self._slots.end_tokens.shape[1]
        if missing > 0:
            more = ((0, 0), (0, missing))
            self._replace(end_tokens=np.pad(self._slots.end_tokens, more, constant_values=-1))
        mine = self._slots
        mine.policy[slot], mine.plain[slot], mine.synced[slot] = p, 1, -1
        mine.hidden[slot] = hide_special_tokens
        mine.end_bits[slot] = LAST if show_end_token else UNSEEN | LAST
        mine.pending[slot] = 0
        lo, hi = t.policy_tracks[p], t.policy_tracks[p + 1]
        mine.state[slot, : hi - lo] = t.track_start[lo:hi]
        mine.end_tokens[slot] = -1  # what ends the text does not end its prompt
        tail = self._tail(p, prompt, hide_special_tokens)
        if len(tail):
            if len(tail) < len(prompt):
                # In the middle of a text nothing is known of the character before the tail.
                mine.state[slot, : hi - lo] = t.track_base[lo:hi]
            for at in range(0, len(tail), _ROWS):
                piece = tail[at : at + _ROWS]
                self._walk(self._prompt_call, np.full(len(piece), slot), piece)
            settle(self._tables_at, self._slots_at, int(slot))
            mine.synced[slot] = -1
            states = mine.state[slot, : hi - lo]
            twin = t.track_twin[lo:hi] == 1
            states[twin] = t.track_start[lo:hi][twin]
            # A word that stands whole at the prompt's end is not the model's, whatever follows it.
            close_prompts(self._tables_at, lo, states)
        mine.end_tokens[slot, : len(end_tokens)] = end_tokens
        mine.plain[slot] = t.token_special[end_tokens].all()
        mine.num_events[0] = 0  # of whoever was asked about before

    def snapshot(self, slot: int) -> tuple[NDArray[np.int64], int]:
        """Copy of a slot's track states (int64[max_tracks]) and its unfinished character."""
        settle(self._tables_at, self._slots_at, int(slot))
        return self._slots.state[slot].copy(), int(self._slots.pending[slot])

    def end_bits(self, slot: int) -> int:
        """What a token that ends the slot's text does: `advance.UNSEEN`, `advance.LAST`."""
        return int(self._slots.end_bits[slot])

    def release(self, slot: int) -> None:
        """Leave a slot unguarded until its next `reset`: its rows never hit."""
        self._slots.policy[slot], self._slots.plain[slot] = -1, 0
        self._slots.synced[slot] = -1

    def advance(self, slots: ArrayLike, token_ids: ArrayLike) -> NDArray[np.int64]:
        """Commit one token per row; several rows may feed the same slot, in order.

        slots, token_ids  int[num_rows]. Returns int64[num_rows]: index + 1 of the most severe rule
        that the token completed, 0 = none; it is not to be written to. Cost: 11 to 20 ns a row
        at batch 256; int64 arrays are not copied.
        Raises ShapeError for ids out of range or lengths that differ; nothing is committed then.
        """
        return self._walk(self._advance_call, slots, token_ids)

    def peek(
        self, slots: ArrayLike, token_ids: ArrayLike, last: ArrayLike | None = None
    ) -> NDArray[np.int64]:
        """What `advance` would return, without committing.

        last  bool[num_rows]: the text is over after this token, whatever it is (a length limit).
        """
        tokens = np.asarray(token_ids, np.int64)
        if tokens.size and tokens.min() < 0:
            self._check_tokens(tokens)
        return self._peek(slots, tokens, last)

    def is_invisible(self, slot: int, token: int) -> bool:
        """Whether the slot's reader does not see this token's text: hidden special tokens."""
        return bool(self._slots.hidden[slot] and self._tables.token_special[token])

    def would_close(self, slots: ArrayLike) -> NDArray[np.bool_]:
        """Whether the text of each slot, if it ended here, would show a match.

        Of mask, halt and redirect rules only; bool[num_rows]. Such a match lacks nothing but the
        boundary behind it: what was written last must not be shown before more is known.
        """
        rows = np.ascontiguousarray(slots, np.int64)
        nothing, last = np.full(len(rows), -1, np.int64), np.ones(len(rows), np.uint8)
        self._peek(rows, nothing, last)
        closes = np.zeros(len(rows), bool)
        for row, rule in self.events():
            closes[row] |= bool(self._mask_rules[rule] or self._stop_rules[rule])
        return closes

    def events(self) -> list[tuple[int, int]]:
        """(row, rule index) of every rule that completed in the last `advance` or `peek`."""
        seen = self._slots.events[: self._slots.num_events[0]].tolist()
        return sorted({(row, rule) for row, rule in seen})

    def forbidden(self, slot: int, *, last: bool = False) -> NDArray[np.int64]:
        """Token ids that would now complete a match of a mask, halt or redirect rule, sorted.

        A caller that never appends one of them never emits a match. Tokens that end the text count
        (they close a word). last = the next token is the last one, whatever it is: exact, but every
        token is walked, which takes about 1 ms per 50,000 tokens.
        """
        self._check_slots(np.array([slot]))
        forbidden = np.zeros(len(self.program.vocabulary), np.uint8)
        if self._slots.policy[slot] >= 0:
            self._mark(slot, MASK, forbidden, last)
            stop = np.zeros_like(forbidden)
            self._mark(slot, STOP, stop, last)
            forbidden |= stop
        return np.flatnonzero(forbidden).astype(np.int64)

    def needs_mask(self, slots: ArrayLike) -> NDArray[np.bool_]:
        """Whether the policy of each slot has mask rules: bool[num_rows]."""
        policy = self._slots.policy[np.asarray(slots, np.int64)]
        return (policy >= 0) & self._masks[policy]

    def apply_mask(
        self, logits: NDArray[np.float32], rows: ArrayLike, slots: ArrayLike, last: ArrayLike
    ) -> None:
        """Write -inf to tokens that would complete a mask rule and nothing more severe, in place.

        logits  float32[num_logits_rows, >= num_tokens]; rows, slots, last [num_rows] name the rows
        to edit. A token that completes a halt or redirect rule too stays possible: choosing it has
        to halt as often as the unguarded model would have chosen it.
        """
        edited, mine = np.ascontiguousarray(rows, _INT64), np.ascontiguousarray(slots, _INT64)
        if edited.shape != mine.shape or logits.shape[1] < len(self.program.vocabulary):
            raise ShapeError(
                f"rows has shape {edited.shape}, slots {mine.shape}, logits {logits.shape}; rows and "
                f"slots need the same length, logits {len(self.program.vocabulary)} columns at least."
            )
        left = np.empty(len(edited), _INT64)
        num_left = apply_ranges(
            self._tables_at, self._slots_at, self._ranges(MASK), self._masking, edited, mine, logits,
            left,
        )  # fmt: skip
        if num_left == 0:
            return
        if num_left < 0:
            self._check_slots(mine)
            raise ShapeError(
                f"rows range over {edited.min()}..{edited.max()}; allowed: 0..{len(logits) - 1}."
            )
        is_last = np.asarray(last, bool)
        for k in left[:num_left].tolist():
            if k < 0 and not is_last[~k]:
                self._apply_regexes(logits[edited[~k]], mine[~k])
                continue
            # A regex may take the U+FFFD that the text's end makes of an unfinished character.
            k = max(k, ~k)
            forbidden = np.zeros(len(self.program.vocabulary), np.uint8)
            self._mark(mine[k], MASK, forbidden, is_last[k])
            stop = np.zeros_like(forbidden)
            self._mark(mine[k], STOP, stop, is_last[k])
            forbidden[stop != 0] = 0
            logits[edited[k], : len(forbidden)][forbidden != 0] = -np.inf

    def _apply_regexes(self, row: NDArray[np.float32], slot: int) -> None:
        """Mask what regexes forbid, where ranges have masked the rest."""
        for tokens in self._regex_tokens(slot, MASK):
            row[tokens] = -np.inf
        if self._end_completes(slot, MASK):
            ends = self._slots.end_tokens[slot]
            row[ends[ends >= 0]] = -np.inf

    def _end_completes(self, slot: int, group: int) -> bool:
        """Whether the end of the text, which shows nothing more, would complete a match."""
        t, p = self._tables, self._slots.policy[slot]
        lo, hi = t.policy_tracks[p], t.policy_tracks[p + 1]
        settle(self._tables_at, self._slots_at, int(slot))
        states = self._slots.state[slot, : hi - lo]
        return bool(end_groups(self._tables_at, lo, states) & group)

    def _mark(self, slot: int, group: int, forbidden: NDArray[np.uint8], last: bool) -> None:
        p = int(self._slots.policy[slot])
        if (self._masks if group == MASK else self._stops)[p]:
            if self._has_regexes[p] and not last:  # first: tokens that must be walked come after
                for tokens in self._regex_tokens(slot, group):
                    forbidden[tokens] = 1
            mark_forbidden(
                self._tables_at, self._slots_at, self._ranges(group), int(slot), int(last),
                self._mask_rules if group == MASK else self._stop_rules,
                np.zeros_like(forbidden), forbidden,
            )  # fmt: skip

    def _regex_tokens(self, slot: int, group: int) -> Iterator[NDArray[np.integer]]:
        """Ordinary tokens that complete a match of a regex, for each of the slot's regex tracks."""
        t, p = self._tables, self._slots.policy[slot]
        lo, hi = int(t.policy_tracks[p]), int(t.policy_tracks[p + 1])
        states = np.zeros(self._slots.state.shape[1], np.int64)
        states_before_tokens(self._tables_at, self._slots_at, slot, states)
        before = -1
        for track in range(lo, hi):
            state = int(states[track - lo])
            if t.track_regex[track] and not (t.track_twin[track] and state == before):
                tokens = self._regex_masks.tokens(track, state, group)
                if len(tokens):
                    yield tokens
            before = state

    def _ranges(self, group: int) -> int:
        if group not in self._packed_ranges:
            program = self.program
            ranges = program.mask_ranges if group == MASK else program.stop_ranges
            self._packed_ranges[group] = pack_ranges(ranges)
            self._ranges_at[group] = address(self._packed_ranges[group])
        return self._ranges_at[group]

    def _peek(
        self, slots: ArrayLike, tokens: ArrayLike, last: ArrayLike | None
    ) -> NDArray[np.int64]:
        self._peek_call[ENDS] = last is not None
        if last is not None:
            ends = np.asarray(last, np.uint8)
            if ends.shape != np.shape(slots):
                raise ShapeError(
                    f"last has shape {ends.shape} for slots of shape {np.shape(slots)}; give one "
                    f"entry a row."
                )
            self._make_room(len(ends))
            self._slots.row_last[: len(ends)] = ends
        return self._walk(self._peek_call, slots, tokens)

    def _walk(
        self, call: NDArray[np.int64], slots: ArrayLike, tokens: ArrayLike
    ) -> NDArray[np.int64]:
        try:
            if slots.dtype is tokens.dtype is _INT64:  # type: ignore[union-attr]
                done, num_rows = walk_kernel(call, slots, tokens), len(tokens)  # type: ignore[arg-type]
                if done == num_rows == len(self._nothing):
                    return self._nothing
                if done > num_rows == len(self._best):
                    return self._best.copy()
            else:
                slots, tokens = _as_rows(slots, tokens)
                done = walk_kernel(call, slots, tokens)
        except (AttributeError, TypeError):
            # Lists; two dimensions or gaps, which is rare: it takes numba 0.5 ms to say so.
            slots, tokens = _as_rows(slots, tokens)
            done = walk_kernel(call, slots, tokens)
        return self._finish(call, slots, tokens, done)  # type: ignore[arg-type]

    def _finish(
        self,
        call: NDArray[np.int64],
        slots: NDArray[np.int64],
        tokens: NDArray[np.int64],
        done: int,
    ) -> NDArray[np.int64]:
        """Complete a walk that met something: hits, a lack of room, or ids out of range."""
        num_rows = len(tokens)
        while done < num_rows:
            if done >= 0:
                events = np.resize(self._slots.events, (2 * len(self._slots.events), 2))
                self._replace(events=events)
            else:
                _as_rows(slots, tokens)
                self._check_slots(slots)
                self._check_tokens(tokens)
                self._make_room(num_rows)
            call[FIRST] = max(done, 0)
            done = walk_kernel(call, slots, tokens)
            call[FIRST] = 0
        if done > num_rows:
            self._best = self._slots.best[:num_rows]
            return self._best.copy()
        self._nothing = np.zeros(num_rows, _INT64)
        self._nothing.flags.writeable = False
        return self._nothing

    def _make_room(self, num_rows: int) -> None:
        if num_rows > len(self._slots.best):
            most = 2 * num_rows
            best = np.resize(self._slots.best, most)
            self._replace(best=best, row_last=np.zeros(most, np.uint8))

    def _replace(self, **arrays: NDArray[Any]) -> None:
        """Put larger arrays in place of some of the slots' own."""
        self._slots = self._slots._replace(**arrays)
        self._best = self._slots.best[:0]
        self._packed_slots = pack_slots(self._slots)
        self._slots_at = address(self._packed_slots)
        for call in (self._advance_call, self._prompt_call, self._peek_call):
            call[:2] = self._tables_at, self._slots_at

    def _tail(self, p: int, prompt: NDArray[np.int64], hidden: bool) -> NDArray[np.int64]:
        """The last tokens of the prompt that can still matter: they hold as much as a pattern."""
        t = self._tables
        if self._shrinks[p]:
            return prompt  # a pattern may begin any number of skipped characters ago
        num_bytes = t.raw_offsets[prompt + 1] - t.raw_offsets[prompt]
        if hidden:
            num_bytes[t.token_special[prompt] != 0] = 0
        # A character takes 4 bytes at most and maps to 1 at least; 8 more for one cut in two.
        enough = 4 * (self.program.max_depth + 8)
        return prompt[-1 - int(np.searchsorted(np.cumsum(num_bytes[::-1]), enough)) :]

    def _check_slots(self, slots: NDArray[np.int64]) -> None:
        if len(slots) and not 0 <= slots.min() <= slots.max() < self.num_slots:
            raise ShapeError(
                f"slots range over {slots.min()}..{slots.max()}; allowed: 0..{self.num_slots - 1}."
            )

    def _check_tokens(self, tokens: NDArray[np.int64]) -> None:
        size = len(self.program.vocabulary)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < size:
            raise ShapeError(
                f"token ids range over {tokens.min()}..{tokens.max()}; allowed: 0..{size - 1}."
            )


def _as_rows(slots: ArrayLike, tokens: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both as the kernel takes them, which may be the same. Raises ShapeError if their shapes differ."""
    rows, fed = np.array(slots, _INT64, order="C"), np.array(tokens, _INT64, order="C")
    if rows.ndim != 1 or rows.shape != fed.shape:
        raise ShapeError(
            f"slots has shape {rows.shape}, token_ids {fed.shape}; both need one dimension and the "
            f"same length."
        )
    return rows, fed
