"""The walk on the device: Triton kernels that agree bit for bit with `advance` and `lookahead`.

At most five launches a step: `advance_slots` brings each slot up to its committed tokens,
`device_probe.read_scores` takes in what probes say of them, `device_mask.mask_rows` edits the logits of
mask rules (two), `decide_rows` turns a sampled token that completes a match, or that a probe forbids,
into a verdict. None of them copies to the host, allocates or depends on data for
its grid, so they suit an engine that schedules ahead, and can be captured in a graph. Only the
platform that runs them imports this module: it needs torch and triton.

One walk (`device_walk`) serves all. Its *lanes* are the tracks of one slot (`advance_slots`,
`decide_rows`) or tokens of the vocabulary (`mask_rows`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from streamguard_kernels.device_probe import DeviceProbes, ProbeSlots, count_alarms
from streamguard_kernels.device_tables import (
    FAILED_ALARM,
    MARKER_SPARE,
    MASK,
    NO_RANK,
    NO_VERDICT,
    STOP,
    STOP_SPARE,
    UNKNOWN_RULE,
    DeviceTables,
    Slots,
)
from streamguard_kernels.device_walk import ALL, LAST, PAGE, STATES, end_bits, lanes_of, walk


def advance_slots(
    t: DeviceTables,
    s: Slots,
    idx_mapping: torch.Tensor,
    all_token_ids: torch.Tensor,
    total_len: torch.Tensor,
) -> None:
    """Walk each slot over its committed tokens seen .. total_len, and remember that it did.

    After a reserved id that begins a verdict the tokens are the verdict's own: they are counted
    (verdict_step), no longer matched.

    idx_mapping    int[num_rows]: the row's slot, < 0 = none; a slot stands in one row at most.
    all_token_ids  int[num_slots, >= total_len]; total_len int[num_slots].
    """
    _advance_kernel[(idx_mapping.shape[0],)](
        t, s, idx_mapping, all_token_ids, all_token_ids.stride(0), total_len,
        s.state.stride(0), s.end_tokens.stride(0), s.end_tokens.shape[1],
        t.token_special.shape[0], t.spare_ids.shape[0], t.code_rules.shape[1],
        TRACKS=triton.next_power_of_2(s.state.shape[1]), num_warps=1,
    )  # fmt: skip


def decide_rows(
    t: DeviceTables,
    s: Slots,
    sampled: torch.Tensor,
    idx_mapping: torch.Tensor,
    pos: torch.Tensor,
    total_len: torch.Tensor,
    processed: torch.Tensor | None = None,
    *,
    probes: DeviceProbes | None = None,
    scored: ProbeSlots | None = None,
) -> None:
    """Replace each sampled token that a verdict forbids, before it is committed.

    A slot whose verdict has begun gets the next token of its script. A reserved id that the model
    chose by itself becomes `eos_token`. A token that completes a match of a stop or mask rule
    becomes the first token of the script of the most severe such rule, and so does any token if a
    stop rule has fired on the scores read. Where scores failed and the policy blocks, the text ends.

    Counts every rule that the sampled token completes, observe rules included, once a token: here
    and not in `advance_slots`, which never sees the last token of a text and sees those before it
    again after a resume.

    sampled    int64[num_rows], in/out; pos int[num_rows]: position of each row's input token. A
               row with pos + 1 < total_len is part of a prompt: its sample will be discarded, and
               nothing counts.
    processed  float[num_rows, >= num_tokens], the logits that were sampled from: where the sampled
               one is not finite, no token was possible, and the policy's most severe mask rule
               gives the verdict. None = not looked at.
    probes, scored  after `device_probe.read_scores`; None = no policy has probe rules, or tokens are
               only tried.
    """
    width = 0 if scored is None else scored.value.shape[1]
    _decide_kernel[(sampled.shape[0],)](
        t, s, probes or t, scored or s, width, sampled, idx_mapping, pos, total_len,
        sampled if processed is None else processed,
        0 if processed is None else processed.stride(0),
        s.state.stride(0), s.end_tokens.stride(0), s.end_tokens.shape[1],
        t.token_special.shape[0], LOOK=processed is not None,
        MONITORS=triton.next_power_of_2(width) if width else 0,
        TRACKS=triton.next_power_of_2(s.state.shape[1]), num_warps=1,
    )  # fmt: skip


@triton.jit
def _advance_kernel(
    t,
    s,
    idx_mapping,
    all_token_ids,
    token_stride,
    total_len,
    state_stride,
    end_stride,
    end_width,
    num_tokens,
    num_spare,
    num_codes,
    TRACKS: tl.constexpr,
):
    slot = tl.load(idx_mapping + tl.program_id(0)).to(tl.int64)
    if slot < 0:
        return
    policy = tl.load(s.policy + slot).to(tl.int32)
    if policy < 0:
        return
    low = tl.load(t.policy_tracks + policy)
    high = tl.load(t.policy_tracks + policy + 1)
    k = tl.arange(0, TRACKS)
    live = k < high - low
    lane = lanes_of(t, tl.minimum(low + k, high - 1))
    states = s.state + slot * state_stride + k
    state = tl.load(states, mask=live, other=0).to(tl.int32)
    hidden = tl.load(s.hidden + slot).to(tl.int32)
    pending = tl.load(s.pending + slot).to(tl.int32)
    verdict = tl.load(s.verdict_rule + slot).to(tl.int32)
    step = tl.load(s.verdict_step + slot).to(tl.int32)
    remembered = tl.load(s.pending_rule + slot).to(tl.int32)
    marker = tl.load(t.spare_ids + MARKER_SPARE)
    best = tl.full((TRACKS,), NO_RANK, tl.int32)
    seen = tl.zeros((TRACKS,), tl.int64)
    total = tl.load(total_len + slot).to(tl.int32)
    for at in range(tl.load(s.seen + slot).to(tl.int32), total):
        token = tl.load(all_token_ids + slot * token_stride + at).to(tl.int32)
        known = (token >= 0) & (token < num_tokens)
        if verdict == NO_VERDICT:
            spare = tl.load(t.spare_index + token, mask=known, other=-1)
            verdict = tl.load(
                t.verdict_rule_of + policy * num_spare + spare, mask=spare >= 0, other=NO_VERDICT
            )
            verdict = tl.where(spare == MARKER_SPARE, remembered, verdict)
            step = tl.where(verdict == NO_VERDICT, step, 1)
            if known & (verdict == NO_VERDICT):
                ends = end_bits(s, slot, token, end_stride, end_width)
                state, carried, best, seen = walk(
                    t, s, slot, lane, live, state, pending, token, ends, hidden, num_tokens, best,
                    seen, 0, STATES,
                )  # fmt: skip
                pending = tl.max(tl.where(live, carried, 0), axis=0)
        else:
            begin = tl.load(t.script_offsets + tl.maximum(verdict, 0))
            began = tl.load(t.script_tokens + begin, mask=verdict >= 0, other=-1)
            named = (verdict == UNKNOWN_RULE) | (began == marker)
            code = tl.load(t.code_index + token, mask=known & named & (step == 1), other=-1)
            coded = (code >= 0) & (code < num_codes)
            rule = tl.load(t.code_rules + policy * num_codes + code, mask=coded, other=-1)
            verdict = tl.where(rule >= 0, rule, verdict)
            step += 1
    tl.store(states, state.to(tl.int64), mask=live)
    tl.store(s.pending + slot, pending)
    tl.store(s.verdict_rule + slot, verdict)
    tl.store(s.verdict_step + slot, step)
    tl.store(s.seen + slot, total)


@triton.jit
def _decide_kernel(
    t,
    s,
    p,
    q,
    width,
    sampled,
    idx_mapping,
    pos,
    total_len,
    processed,
    processed_stride,
    state_stride,
    end_stride,
    end_width,
    num_tokens,
    LOOK: tl.constexpr,
    MONITORS: tl.constexpr,
    TRACKS: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(idx_mapping + row).to(tl.int64)
    if slot < 0:
        return
    policy = tl.load(s.policy + slot).to(tl.int32)
    if policy < 0:
        return
    verdict = tl.load(s.verdict_rule + slot).to(tl.int32)
    if verdict != NO_VERDICT:
        rule = tl.maximum(verdict, 0)
        step = tl.load(s.verdict_step + slot).to(tl.int32)
        end = tl.load(t.script_offsets + rule + 1)
        at = tl.minimum(tl.load(t.script_offsets + rule) + step, end - 1)
        said = tl.load(t.script_tokens + at, mask=verdict >= 0, other=0)
        stop = tl.load(t.spare_ids + STOP_SPARE)
        tl.store(sampled + row, tl.where(verdict >= 0, said, stop).to(tl.int64))
        return
    alarm = NO_RANK
    if MONITORS:
        alarm = tl.load(q.alarm + slot)
        if alarm == FAILED_ALARM:
            tl.store(sampled + row, tl.load(t.spare_ids + STOP_SPARE).to(tl.int64))
            return
    token = tl.load(sampled + row).to(tl.int32)
    known = (token >= 0) & (token < num_tokens)
    if known == 0:
        return
    sampled_token = token
    if tl.load(t.spare_index + token) >= 0:
        token = tl.load(t.eos_token)
    total = tl.load(total_len + slot).to(tl.int32)
    committed = tl.load(pos + row).to(tl.int32) + 1 >= total
    low = tl.load(t.policy_tracks + policy)
    high = tl.load(t.policy_tracks + policy + 1)
    k = tl.arange(0, TRACKS)
    live = k < high - low
    lane = lanes_of(t, tl.minimum(low + k, high - 1))
    hidden = tl.load(s.hidden + slot).to(tl.int32)
    pending = tl.load(s.pending + slot).to(tl.int32)
    ends = end_bits(s, slot, token, end_stride, end_width)
    limit = tl.load(s.limit + slot).to(tl.int32)
    ends = tl.where(total + 1 >= limit, ends | LAST, ends)
    best = tl.full((TRACKS,), NO_RANK, tl.int32)
    first = tl.load(t.policy_rule + policy)
    more = 1
    while more != 0:  # a second time only if rules completed that are far apart
        state = tl.load(s.state + slot * state_stride + k, mask=live, other=0).to(tl.int32)
        seen = tl.zeros((TRACKS,), tl.int64)
        state, _, best, seen = walk(
            t, s, slot, lane, live, state, pending, token, ends, hidden, num_tokens, best, seen,
            first, ALL,
        )  # fmt: skip
        bit = tl.arange(0, 64)
        found = tl.max(((seen[:, None] >> bit[None, :].to(tl.int64)) & 1).to(tl.int32), axis=0)
        found *= committed.to(tl.int32)
        one = tl.full((64,), 1, tl.int64)
        tl.atomic_add(s.counts + first + bit, one, mask=(found != 0) & (bit < PAGE), sem="relaxed")
        more = tl.max(tl.where(bit == PAGE, found, 0), axis=0)
        first += PAGE
    rank = tl.min(best, axis=0)
    if MONITORS:
        rank = tl.minimum(rank, alarm)
        if committed:
            count_alarms(p, q, s, slot, policy, width, MONITORS)
    some = rank != NO_RANK
    group = tl.load(t.rank_group + rank, mask=some, other=0).to(tl.int32)
    stops = (group & (MASK | STOP)) != 0
    rule = tl.load(t.rule_of_rank + rank, mask=stops, other=-1)
    if LOOK:
        if stops == 0:
            logit = tl.load(processed + row.to(tl.int64) * processed_stride + sampled_token)
            logit = logit.to(tl.float32)
            possible = (logit == logit) & (tl.abs(logit) != float("inf"))
            rule = tl.where(possible, -1, tl.load(t.mask_rule + policy))
            if (rule >= 0) & committed:
                tl.atomic_add(s.counts + rule, 1, sem="relaxed")
    if rule >= 0:
        token = tl.load(t.script_tokens + tl.load(t.script_offsets + rule))
        tl.store(s.pending_rule + slot, rule)
    tl.store(sampled + row, token.to(tl.int64))
