"""The look-ahead mask on the device: tokens that would complete a mask rule become impossible.

As on the host (`lookahead`), a slot's state names ranges of the sorted vocabulary, and with a static
list they hold every token that can complete a match: a row costs what it masks. Which of three ways a
row goes is decided on the device, by programs that return at once where the other kernel has it:

SUFFICE     what ranges name is masked as it is.
CANDIDATES  what ranges name, and what ends the text, is walked: a more severe rule may share a state,
            and the text's end may complete a word.
EVERY       all tokens are walked: regexes, word lists in packed tables, an unfinished character,
            visible special tokens, the last token before the length limit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from streamguard_kernels.device_tables import (
    CANDIDATES,
    EVERY,
    MASK,
    NO_RANK,
    NO_VERDICT,
    NOTHING,
    SUFFICE,
    TRACK_FIELDS,
    DeviceTables,
    Slots,
)
from streamguard_kernels.device_walk import BEST, LAST, end_bits, lanes_of, state_number, walk

#: Programs that share a row's ranges.
_PARTS = 4
#: Rows that one program of the walking kernel looks after: most need nothing, and that is seen at once.
_ROWS = 16


def mask_rows(
    t: DeviceTables,
    s: Slots,
    logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    total_len: torch.Tensor,
    *,
    block: int = 1024,
    range_block: int = 256,
) -> None:
    """Write -inf to every token that would complete a mask rule and nothing more severe.

    What `Session.apply_mask` does. The cost of a row is the number of tokens that its ranges name, or
    the mapped bytes of the whole vocabulary where all tokens are walked (see above), whatever the
    number of patterns. Skip the launches if no request of the batch has mask rules.

    logits       float32[num_rows, >= num_tokens], in/out, rows as in `idx_mapping`.
    idx_mapping  int[num_rows]: the row's slot, < 0 = none; a slot stands in one row at most.
    total_len    int[num_slots]: committed tokens, prompt included.
    block        tokens that a program takes at a time where all are walked, a power of two;
    range_block  the same where ranges name them.
    """
    num_rows, num_tokens = idx_mapping.shape[0], t.token_special.shape[0]
    shared = (
        t, s, logits, logits.stride(0), idx_mapping, total_len,
        s.state.stride(0), s.end_tokens.stride(0), s.end_tokens.shape[1], num_tokens,
    )  # fmt: skip
    _ranges_kernel[(num_rows, _PARTS)](*shared, BLOCK=range_block, num_warps=4)
    _walking_kernel[(triton.cdiv(num_rows, _ROWS), triton.cdiv(num_tokens, block))](
        *shared, num_rows, ROWS=_ROWS, BLOCK=block, num_warps=8
    )


@triton.jit
def _way(t, s, slot, total_len):
    """NOTHING, EVERY, SUFFICE or CANDIDATES, for a slot or for one a lane; see `mark_forbidden`."""
    there = slot >= 0
    slot = tl.maximum(slot, 0)
    policy = tl.load(s.policy + slot).to(tl.int32)
    there = there & (policy >= 0)
    policy = tl.maximum(policy, 0)
    there = there & (tl.load(t.mask_rule + policy) >= 0)
    there = there & (tl.load(s.verdict_rule + slot).to(tl.int32) == NO_VERDICT)
    way = tl.load(t.masking + policy)
    plain = tl.load(s.plain + slot).to(tl.int32)
    limit = tl.load(s.limit + slot).to(tl.int32)
    last = tl.load(total_len + slot).to(tl.int32) + 1 >= limit
    hidden = tl.load(s.hidden + slot).to(tl.int32)
    pending = tl.load(s.pending + slot).to(tl.int32)
    way = tl.where((way == SUFFICE) & (plain == 0), CANDIDATES, way)
    way = tl.where((way == CANDIDATES) & last, EVERY, way)
    way = tl.where((hidden != 0) & (pending == 0), way, EVERY)
    return tl.where(there, way, NOTHING)


@triton.jit
def _masks(
    t, s, slot, token, live, total_len, state_stride, end_stride, end_width, num_tokens,
):  # fmt: skip
    """Walk one token a lane from the slot's state: whether a mask rule's match is the worst of it."""
    policy = tl.load(s.policy + slot).to(tl.int32)
    hidden = tl.load(s.hidden + slot).to(tl.int32)
    pending = tl.load(s.pending + slot).to(tl.int32)
    ends = end_bits(s, slot, token, end_stride, end_width)
    limit = tl.load(s.limit + slot).to(tl.int32)
    last = tl.load(total_len + slot).to(tl.int32) + 1 >= limit
    ends = tl.where(last, ends | LAST, ends)
    best = tl.full(token.shape, NO_RANK, tl.int32)
    seen = tl.zeros(token.shape, tl.int64)
    low = tl.load(t.policy_tracks + policy)
    before = -1
    for track in range(low, tl.load(t.policy_tracks + policy + 1)):
        now = tl.load(s.state + slot * state_stride + track - low).to(tl.int32)
        twin = tl.load(t.tracks + track * TRACK_FIELDS + 6)
        if (twin == 0) | (now != before):  # twins that have met complete the same
            state = tl.full(token.shape, 0, tl.int32) + now
            _, _, best, seen = walk(
                t, s, slot, lanes_of(t, token * 0 + track), live, state, pending, token, ends,
                hidden, num_tokens, best, seen, 0, BEST,
            )  # fmt: skip
        before = now
    group = tl.load(t.rank_group + best, mask=best != NO_RANK, other=0)
    # Ranks put stop rules first: the lowest being a mask rule's, no stop rule completes.
    return live & (group == MASK)


@triton.jit
def _token_in_ranges(t, mapping, begin, end, nth, live, num_tokens):
    """The nth token of ranges begin .. end, one a lane: which range it is in is looked up by halves."""
    low = begin + nth * 0
    high = end + nth * 0
    while tl.max(high - low, axis=0) > 1:
        middle = (low + high) // 2
        reached = tl.load(t.own_before + middle, mask=live, other=0) <= nth
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    place = tl.load(t.own_first + low, mask=live, other=0) + nth
    place -= tl.load(t.own_before + low, mask=live, other=0)
    return tl.load(t.order + mapping.to(tl.int64) * num_tokens + place, mask=live, other=0)


@triton.jit
def _ranges_kernel(
    t,
    s,
    logits,
    logits_stride,
    idx_mapping,
    total_len,
    state_stride,
    end_stride,
    end_width,
    num_tokens,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(idx_mapping + row).to(tl.int64)
    way = _way(t, s, slot, total_len)
    if (way == NOTHING) | (way == EVERY):
        return
    policy = tl.load(s.policy + slot).to(tl.int32)
    low = tl.load(t.policy_tracks + policy)
    high = tl.load(t.policy_tracks + policy + 1)
    before = -1
    for track in range(low, high + 1):
        # After the tracks come the tokens that end the text, as if they were one more.
        ending = track == high
        now = tl.load(s.state + slot * state_stride + track - low, mask=track < high, other=-1)
        now = now.to(tl.int32)
        fields = t.tracks + tl.minimum(track, high - 1) * TRACK_FIELDS
        twin = tl.load(fields + 6)
        index = state_number(now, tl.load(fields), tl.load(fields + 1), tl.load(fields + 11))
        index = tl.where(ending, 0, index)
        going = ending | (twin == 0) | (now != before)
        while going:
            # The state's own ranges; where its failure path ends, the track's static list.
            own = t.own_offsets + tl.load(fields + 7) + index
            begin = tl.load(own, mask=index != 0, other=0)
            end = tl.load(own + 1, mask=index != 0, other=0)
            passed = tl.load(t.own_before + begin)
            count = (tl.load(t.own_before + end) - passed).to(tl.int32)
            whole = tl.load(fields + 9)
            count = tl.where(index != 0, count, tl.load(fields + 10) - whole)
            count = tl.where(ending, tl.where(way == CANDIDATES, end_width, 0), count)
            at = tl.program_id(1) * BLOCK
            while at < count:
                i = at + tl.arange(0, BLOCK)
                live = i < count
                if ending:
                    token = tl.load(s.end_tokens + slot * end_stride + i, mask=live, other=-1)
                    token = token.to(tl.int32)
                elif index != 0:
                    token = _token_in_ranges(
                        t, tl.load(fields + 3), begin, end, passed + i, live, num_tokens
                    )
                else:
                    token = tl.load(t.whole + whole + i, mask=live, other=0)
                live = live & (token >= 0)
                token = tl.maximum(token, 0)
                masked = live
                if way == CANDIDATES:
                    masked = _masks(
                        t, s, slot, token, live, total_len, state_stride, end_stride, end_width,
                        num_tokens,
                    )  # fmt: skip
                tl.store(logits + row * logits_stride + token, float("-inf"), mask=masked)
                at += tl.num_programs(1) * BLOCK
            going = index != 0
            index = tl.load(t.link + tl.load(fields + 8) + index)
        before = now


# A batch size must not make another kernel: it changes from step to step.
@triton.jit(do_not_specialize=["num_rows"])
def _walking_kernel(
    t,
    s,
    logits,
    logits_stride,
    idx_mapping,
    total_len,
    state_stride,
    end_stride,
    end_width,
    num_tokens,
    num_rows,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slots = tl.load(idx_mapping + rows, mask=rows < num_rows, other=-1).to(tl.int64)
    walked = _way(t, s, slots, total_len) == EVERY
    if tl.max(walked.to(tl.int32), axis=0) == 0:
        return
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.minimum(place, num_tokens - 1)
    for k in range(ROWS):
        row = tl.program_id(0) * ROWS + k
        if tl.max(tl.where(rows == row, walked.to(tl.int32), 0), axis=0) != 0:
            slot = tl.load(idx_mapping + row).to(tl.int64)
            masked = _masks(
                t, s, slot, token, place < num_tokens, total_len, state_stride, end_stride,
                end_width, num_tokens,
            )  # fmt: skip
            start = logits + row.to(tl.int64) * logits_stride
            tl.store(start + place, float("-inf"), mask=masked)
