"""The walk on the device: Triton kernels that agree bit for bit with `advance` and `lookahead`.

Three launches a step: `advance_slots` brings each slot up to its committed tokens, `mask_rows`
edits the logits of mask rules, `decide_rows` turns a sampled token that completes a match into a
verdict. None of them copies to the host, allocates or depends on data for its grid, so they suit an
engine that schedules ahead. Only the platform that runs them imports this module: it needs torch
and triton.

One walk serves all three. Its *lanes* are the tracks of one slot (`advance_slots`, `decide_rows`:
all automata of a policy move at once, so the latency is that of one) or neighbouring tokens of the
vocabulary (`mask_rows`). What differs between lanes is masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from streamguard_kernels import advance

# Groups of rules, the bits of `Tables.groups`.
MASK = tl.constexpr(1)
STOP = tl.constexpr(2)
OBSERVE = tl.constexpr(4)
#: verdict_rule: no verdict has been given; one was given, but its rule is not known any more.
NO_VERDICT = tl.constexpr(-1)
UNKNOWN_RULE = tl.constexpr(-2)
#: Places in `spare_ids`: what ends a text; what begins a verdict whose rule the next token names.
STOP_SPARE = tl.constexpr(0)
MARKER_SPARE = tl.constexpr(1)

_UNSEEN = tl.constexpr(advance.UNSEEN)
_LAST = tl.constexpr(advance.LAST)
_REPLACEMENT = tl.constexpr(advance.REPLACEMENT)
_BEFORE_NONWORD = tl.constexpr(0xFF)
_AFTER_NONWORD = tl.constexpr(0xFE)
_STATE_MASK = tl.constexpr(0x7FFFFFFF)
_NO_RANK = tl.constexpr(0x7FFFFFFF)
_PAGES = tl.constexpr(0x1100)
#: Rules that completed are gathered in the bits of an int64; the last bit says that there are more.
_PAGE = tl.constexpr(63)
# What a walk records of the matches: nothing, the most severe rule, or all of them.
_STATES, _BEST, _ALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_TRACK_FIELDS = tl.constexpr(8)


class DeviceTables(NamedTuple):
    """`advance.Tables` on a device, with what a verdict needs; frozen. Made by `to_device`.

    trans            int32[num_entries]: as in `Tables`, bit 31 is the sign
    class_of         uint8[num_tracks, 256]
    tracks           int32[num_tracks, 8]: base, classes, first state, mapping, form, wrap, twin, -
    policy_tracks    int32[num_policies + 1]
    policy_rule      int32[num_policies]: the policy's first rule
    mask_rule        int32[num_policies]: its most severe mask rule, -1 = it has none
    best_rank        int32[num_states]: rank of the most severe rule that completes, _NO_RANK = none
    first_pattern, suffix_link int32[num_states]; next_pattern, pattern_rule int32[num_patterns]
    rule_of_rank     int32[num_rules]; rank_group uint8[num_rules]: both by rank
    token_offsets    int32[num_mappings, num_tokens + 1]; token_data uint8[num_bytes]
    token_pending    int32[num_tokens]; token_special uint8[num_tokens]
    raw_offsets      int32[num_tokens + 1]; raw_data uint8[num_raw_bytes]
    page_of int32[num_forms, 0x1100], entries int32[num_pages, 256],
    map_offsets int32[num_strings + 1], map_data uint8[num_map_bytes]: see `utf8.map_character`
    spare_index      int32[num_tokens]: place of a reserved id in `spare_ids`, -1 = another token
    spare_ids        int32[num_spare]: STOP_SPARE, MARKER_SPARE, then those of rules
    verdict_rule_of  int32[num_policies, num_spare]: the rule that a reserved id names, -1 = none
    code_index       int32[num_tokens]: what a token after MARKER_SPARE says, -1 = nothing
    code_rules       int32[num_policies, width]: the rule that it means, -1 = none
    script_offsets   int32[num_rules + 1]; script_tokens int32[]: what a verdict says, id first
    eos_token        int32[1]
    """

    trans: torch.Tensor
    class_of: torch.Tensor
    tracks: torch.Tensor
    policy_tracks: torch.Tensor
    policy_rule: torch.Tensor
    mask_rule: torch.Tensor
    best_rank: torch.Tensor
    first_pattern: torch.Tensor
    suffix_link: torch.Tensor
    next_pattern: torch.Tensor
    pattern_rule: torch.Tensor
    rule_of_rank: torch.Tensor
    rank_group: torch.Tensor
    token_offsets: torch.Tensor
    token_data: torch.Tensor
    token_pending: torch.Tensor
    token_special: torch.Tensor
    raw_offsets: torch.Tensor
    raw_data: torch.Tensor
    page_of: torch.Tensor
    entries: torch.Tensor
    map_offsets: torch.Tensor
    map_data: torch.Tensor
    spare_index: torch.Tensor
    spare_ids: torch.Tensor
    verdict_rule_of: torch.Tensor
    code_index: torch.Tensor
    code_rules: torch.Tensor
    script_offsets: torch.Tensor
    script_tokens: torch.Tensor
    eos_token: torch.Tensor


class Slots(NamedTuple):
    """Matching state of the slots, and the counts. Each may be int32 or int64, counts int64 only.

    The caller sets all but the counts when a request enters a slot, also when it resumes there.

    policy        [num_slots]: -1 = not guarded
    hidden        [num_slots]: 1 = the reader skips special tokens
    seen          [num_slots], in/out: tokens of the slot walked so far; at first the prompt's
    state         [num_slots, max_tracks], in/out: as `Session` keeps it
    pending       [num_slots], in/out: unfinished character
    verdict_rule  [num_slots], in/out: rule of the verdict being said, NO_VERDICT, UNKNOWN_RULE
    verdict_step  [num_slots], in/out: tokens of its script that are committed
    pending_rule  [num_slots], in/out: rule of the slot's last verdict; UNKNOWN_RULE at first
    limit         [num_slots]: the text has at most this many tokens, prompt included
    end_tokens    [num_slots, width]: tokens that end the text, -1 in unused places
    end_bits      [num_slots]: advance.UNSEEN and advance.LAST as they hold for them
    counts        int64[num_rules], in/out: tokens sampled that completed each rule
    """

    policy: torch.Tensor
    hidden: torch.Tensor
    seen: torch.Tensor
    state: torch.Tensor
    pending: torch.Tensor
    verdict_rule: torch.Tensor
    verdict_step: torch.Tensor
    pending_rule: torch.Tensor
    limit: torch.Tensor
    end_tokens: torch.Tensor
    end_bits: torch.Tensor
    counts: torch.Tensor


def new_slots(
    num_slots: int,
    max_tracks: int,
    num_rules: int,
    device: torch.device | str,
    *,
    end_width: int = 8,
) -> Slots:
    """Unguarded slots: int64 state and counts, int32 otherwise."""

    def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    return Slots(
        policy=full(-1, num_slots),
        hidden=full(1, num_slots),
        seen=full(0, num_slots),
        state=full(0, num_slots, max_tracks, dtype=torch.int64),
        pending=full(0, num_slots),
        verdict_rule=full(NO_VERDICT.value, num_slots),
        verdict_step=full(0, num_slots),
        pending_rule=full(UNKNOWN_RULE.value, num_slots),
        limit=full(0x7FFFFFFF, num_slots),
        end_tokens=full(-1, num_slots, end_width),
        end_bits=full(advance.UNSEEN | advance.LAST, num_slots),
        counts=full(0, num_rules, dtype=torch.int64),
    )


def to_device(
    tables: advance.Tables,
    *,
    rule_group: Sequence[int],
    rule_policy: Sequence[int],
    stop_id: int,
    marker_id: int,
    rule_of: Sequence[Mapping[int, int]],
    scripts: Sequence[Sequence[int]],
    code_of: Mapping[int, int],
    code_rules: Sequence[Sequence[int]],
    eos_token: int,
    device: torch.device | str,
) -> DeviceTables:
    """Copy the tables to a device, once at start.

    rule_group   [num_rules]: MASK, STOP or OBSERVE; rule_policy [num_rules]: the policy's index.
    stop_id      reserved id that ends a text; marker_id: reserved id that begins a verdict whose
                 rule the next token names.
    rule_of      per policy: the rule whose verdict a reserved id begins by itself.
    scripts      per rule the tokens of its verdict; may be empty for observe rules only.
    code_of      token after the marker -> index into the policy's list of rules in code_rules.
    eos_token    stands in for a reserved id that the model itself chose.
    Raises ValueError if ranks do not order stop, mask, observe, if the rules of a policy are not
    consecutive, or a script is missing. Offsets are 32-bit: the compiler's own limits are below.
    """
    group, policy = np.asarray(rule_group, np.uint8), np.asarray(rule_policy, np.int32)
    num_tokens = len(tables.token_special)
    num_policies = len(tables.policy_tracks) - 1
    rule_of_rank = np.argsort(tables.rule_rank)
    order = {STOP.value: 0, MASK.value: 1, OBSERVE.value: 2}
    severity = [order[int(g)] for g in group[rule_of_rank]]
    if severity != sorted(severity):
        raise ValueError(
            f"groups by rank are {group[rule_of_rank].tolist()}; ranks must put stop rules (2) "
            f"before mask (1) before observe rules (4): the kernels see the lowest rank alone."
        )
    if (np.diff(policy) < 0).any():
        raise ValueError(
            f"rule_policy is {policy.tolist()}; the rules of a policy must be consecutive and in "
            f"the order of the policies: the kernels count them from the policy's first."
        )
    for rule, script in enumerate(scripts):
        if not len(script) and group[rule] != OBSERVE.value:
            raise ValueError(f"scripts[{rule}] is empty; a verdict needs at least one token.")

    mask_rule = np.full(num_policies, -1, np.int32)
    for rule in rule_of_rank[::-1]:
        if group[rule] == MASK.value:
            mask_rule[policy[rule]] = rule
    spare_ids = [stop_id, marker_id]
    spare_ids += sorted(set().union(*rule_of) - set(spare_ids))
    spare_index = np.full(num_tokens, -1, np.int32)
    spare_index[spare_ids] = np.arange(len(spare_ids))
    verdict_rule_of = [[rules.get(token, -1) for token in spare_ids] for rules in rule_of]
    code_index = np.full(num_tokens, -1, np.int32)
    code_index[list(code_of)] = list(code_of.values())
    padded = np.full((num_policies, max(1, *map(len, code_rules))), -1, np.int32)
    for p, rules in enumerate(code_rules):
        padded[p, : len(rules)] = rules
    mapping = tables.track_mapping
    tracks = np.zeros((len(mapping), _TRACK_FIELDS.value), np.int32)
    for i, column in enumerate(
        (
            tables.track_base, tables.track_classes, tables.track_states, mapping,
            tables.mapping_form[mapping], tables.mapping_wrap[mapping], tables.track_twin,
        )
    ):  # fmt: skip
        tracks[:, i] = column
    best_rank = np.full(len(tables.best_rule), _NO_RANK.value, np.int32)
    accepting = tables.best_rule >= 0
    best_rank[accepting] = tables.rule_rank[tables.best_rule[accepting]]

    def put(array: Any, dtype: type = np.int32) -> torch.Tensor:
        # An own copy: `Tables` may be mapped from a file, read-only.
        return torch.from_numpy(np.array(array, dtype)).to(device)

    return DeviceTables(
        trans=put(tables.trans.view(np.int32)),
        class_of=put(tables.class_of, np.uint8),
        tracks=put(tracks),
        policy_tracks=put(tables.policy_tracks),
        policy_rule=put(np.searchsorted(policy, np.arange(num_policies))),
        mask_rule=put(mask_rule),
        best_rank=put(best_rank),
        first_pattern=put(tables.first_pattern),
        suffix_link=put(tables.suffix_link),
        next_pattern=put(tables.next_pattern),
        pattern_rule=put(tables.pattern_rule),
        rule_of_rank=put(rule_of_rank),
        rank_group=put(group[rule_of_rank], np.uint8),
        token_offsets=put(tables.token_offsets),
        token_data=put(tables.token_data, np.uint8),
        token_pending=put(tables.token_pending),
        token_special=put(tables.token_special, np.uint8),
        raw_offsets=put(tables.raw_offsets),
        raw_data=put(tables.raw_data, np.uint8),
        page_of=put(tables.page_of),
        entries=put(tables.entries),
        map_offsets=put(tables.map_offsets),
        map_data=put(tables.map_data, np.uint8),
        spare_index=put(spare_index),
        spare_ids=put(spare_ids),
        verdict_rule_of=put(verdict_rule_of),
        code_index=put(code_index),
        code_rules=put(padded),
        script_offsets=put(np.cumsum([0, *map(len, scripts)])),
        script_tokens=put([token for script in scripts for token in script]),
        eos_token=put([eos_token]),
    )


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


def mask_rows(
    t: DeviceTables,
    s: Slots,
    logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    total_len: torch.Tensor,
    *,
    block: int = 1024,
) -> None:
    """Write -inf to every token that would complete a mask rule and nothing more severe.

    What `Session.apply_mask` does, by walking the whole vocabulary: the cost is its mapped bytes a
    row, whatever the number of patterns. Skip the launch if no request of the batch has mask rules.

    logits  float32[num_rows, >= num_tokens], in/out, rows as in `idx_mapping`; the rest as above.
    block   tokens a program walks, a power of two.
    """
    num_tokens = t.token_special.shape[0]
    _mask_kernel[(idx_mapping.shape[0], triton.cdiv(num_tokens, block))](
        t, s, logits, logits.stride(0), idx_mapping, total_len,
        s.state.stride(0), s.end_tokens.stride(0), s.end_tokens.shape[1], num_tokens,
        BLOCK=block, num_warps=8,
    )  # fmt: skip


def decide_rows(
    t: DeviceTables,
    s: Slots,
    sampled: torch.Tensor,
    idx_mapping: torch.Tensor,
    pos: torch.Tensor,
    total_len: torch.Tensor,
    processed: torch.Tensor | None = None,
) -> None:
    """Replace each sampled token that a verdict forbids, before it is committed.

    A slot whose verdict has begun gets the next token of its script. A reserved id that the model
    chose by itself becomes `eos_token`. A token that completes a match of a stop or mask rule
    becomes the first token of the script of the most severe such rule.

    Counts every rule that the sampled token completes, observe rules included, once a token: here
    and not in `advance_slots`, which never sees the last token of a text and sees those before it
    again after a resume.

    sampled    int64[num_rows], in/out; pos int[num_rows]: position of each row's input token. A
               row with pos + 1 < total_len is part of a prompt: its sample will be discarded, and
               nothing counts.
    processed  float[num_rows, >= num_tokens], the logits that were sampled from: where the sampled
               one is not finite, no token was possible, and the policy's most severe mask rule
               gives the verdict. None = not looked at.
    """
    _decide_kernel[(sampled.shape[0],)](
        t, s, sampled, idx_mapping, pos, total_len,
        sampled if processed is None else processed,
        0 if processed is None else processed.stride(0),
        s.state.stride(0), s.end_tokens.stride(0), s.end_tokens.shape[1],
        t.token_special.shape[0], LOOK=processed is not None,
        TRACKS=triton.next_power_of_2(s.state.shape[1]), num_warps=1,
    )  # fmt: skip


@triton.jit
def _any(lanes):
    return tl.max(lanes.to(tl.int32), axis=0) > 0


@triton.jit
def _utf8_step(pending, byte):
    """`utf8.utf8_step`, without branches."""
    count = pending >> 24
    lead = pending & 0xFF
    low = tl.where(lead == 0xE0, 0xA0, tl.where(lead == 0xF0, 0x90, 0x80))
    high = tl.where(lead == 0xED, 0x9F, tl.where(lead == 0xF4, 0x8F, 0xBF))
    low = tl.where(count == 1, low, 0x80)
    high = tl.where(count == 1, high, 0xBF)
    goes_on = (pending != 0) & (byte >= low) & (byte <= high)
    need = tl.where(lead < 0xE0, 2, tl.where(lead < 0xF0, 3, 4))
    complete = goes_on & (count + 1 == need)
    last = byte & 0x3F
    second = (pending >> 8) & 0x3F
    third = (pending >> 16) & 0x3F
    two = ((lead & 0x1F) << 6) | last
    three = ((lead & 0x0F) << 12) | (second << 6) | last
    four = ((lead & 0x07) << 18) | (second << 12) | (third << 6) | last
    finished = tl.where(need == 2, two, tl.where(need == 3, three, four))
    begins = (byte >= 0xC2) & (byte <= 0xF4)
    alone = tl.where(byte < 0x80, byte, tl.where(begins, -1, _REPLACEMENT))
    longer = ((count + 1) << 24) | (pending & 0xFFFFFF) | (byte << (8 * count))
    after = tl.where(goes_on, tl.where(complete, 0, longer), tl.where(begins, (1 << 24) | byte, 0))
    code_point = tl.where(goes_on, tl.where(complete, finished, -1), alone)
    return after, (pending != 0) & (goes_on == 0), code_point


@triton.jit
def _lane(t, track):
    """What a walk needs to know of its tracks: one of each a lane."""
    fields = t.tracks + track * _TRACK_FIELDS
    return (
        track,
        tl.load(fields),
        tl.load(fields + 1),
        tl.load(fields + 2),
        tl.load(fields + 3),
        tl.load(fields + 4),
        tl.load(fields + 5),
    )


@triton.jit
def _completed(t, lane, index, hit, seen, window):
    """Gather the rules in the output chains of accept states: bit n is rule window + n."""
    first_state = lane[3]
    while _any(hit):
        pattern = tl.load(t.first_pattern + first_state + index, mask=hit, other=-1)
        listed = hit & (pattern >= 0)
        while _any(listed):
            rule = tl.load(t.pattern_rule + pattern, mask=listed, other=0)
            place = tl.minimum(rule - window, _PAGE)
            bit = tl.full(seen.shape, 1, tl.int64) << tl.maximum(place, 0).to(tl.int64)
            seen |= tl.where(listed & (place >= 0), bit, 0)
            pattern = tl.load(t.next_pattern + pattern, mask=listed, other=-1)
            listed = listed & (pattern >= 0)
        index = tl.load(t.suffix_link + first_state + index, mask=hit, other=0)
        hit = hit & (index != 0)
    return seen


@triton.jit
def _move(t, lane, state, byte, live, best, seen, window, RECORD: tl.constexpr):
    """Move the live lanes by one byte each."""
    kind = tl.load(t.class_of + lane[0] * 256 + byte, mask=live, other=0).to(tl.int32)
    entry = tl.load(t.trans + state + kind, mask=live, other=0)
    state = tl.where(live, entry & _STATE_MASK, state)
    if RECORD != _STATES:
        hit = live & (entry < 0)
        index = (state - lane[1]) // lane[2]
        rank = tl.load(t.best_rank + lane[3] + index, mask=hit, other=_NO_RANK)
        best = tl.minimum(best, rank)
        if RECORD == _ALL:
            seen = _completed(t, lane, index, hit, seen, window)
    return state, best, seen


@triton.jit
def _feed_bytes(t, lane, state, begin, count, live, best, seen, window, RECORD: tl.constexpr):
    """Walk the live lanes over token_data[begin : begin + count]."""
    count = tl.where(live, count, 0)
    for i in range(tl.max(count, axis=0)):
        moves = i < count
        byte = tl.load(t.token_data + begin + i, mask=moves, other=0).to(tl.int32)
        state, best, seen = _move(t, lane, state, byte, moves, best, seen, window, RECORD)
    return state, best, seen


@triton.jit
def _feed_character(t, lane, state, code_point, live, best, seen, window, RECORD: tl.constexpr):
    """Walk the live lanes over the mapped bytes of one character; see `utf8.map_character`."""
    code_point = tl.where(live, code_point, 0)
    table = tl.load(t.page_of + tl.maximum(lane[5], 0) * _PAGES + (code_point >> 8))
    entry = tl.load(t.entries + table * 256 + (code_point & 0xFF))
    marks = entry & 1
    string = entry >> 1
    begin = tl.load(t.map_offsets + string)
    size = 1 + (code_point >= 0x80).to(tl.int32) + (code_point >= 0x800).to(tl.int32)
    size += (code_point >= 0x10000).to(tl.int32)
    inner = tl.where(string != 0, tl.load(t.map_offsets + string + 1) - begin, size)
    count = tl.where(live, inner + 2 * marks, 0)
    for i in range(tl.max(count, axis=0)):
        moves = i < count
        j = i - marks
        folded = moves & (string != 0) & (j >= 0) & (j < inner)
        rest = code_point >> (6 * tl.minimum(tl.maximum(size - 1 - j, 0), 3))
        lead = ((0xF00 >> size) & 0xFF) | (code_point >> (6 * (size - 1)))
        plain = tl.where(size == 1, code_point, tl.where(j <= 0, lead, 0x80 | (rest & 0x3F)))
        byte = tl.load(t.map_data + begin + j, mask=folded, other=0).to(tl.int32)
        byte = tl.where(string != 0, byte, plain)
        byte = tl.where(j < 0, _BEFORE_NONWORD, tl.where(j >= inner, _AFTER_NONWORD, byte))
        byte = tl.where(moves, byte, 0)
        state, best, seen = _move(t, lane, state, byte, moves, best, seen, window, RECORD)
    return state, best, seen


@triton.jit
def _feed_token(
    t, lane, state, pending, token, num_tokens, live, best, seen, window, RECORD: tl.constexpr
):
    """Walk the live lanes over one visible token each; see `advance.feed_token`.

    Returns (state, pending, best, seen).
    """
    form = lane[5]
    raw_begin = tl.load(t.raw_offsets + token)
    raw_count = tl.load(t.raw_offsets + token + 1) - raw_begin
    first = tl.load(t.raw_data + raw_begin, mask=raw_count > 0, other=0).to(tl.int32)
    unfinished = live & (pending != 0) & (raw_count > 0)
    goes_on = unfinished & (first >= 0x80) & (first < 0xC0)
    breaks = unfinished & (goes_on == 0) & (form >= 0)
    if _any(breaks):
        state, best, seen = _feed_character(
            t, lane, state, _REPLACEMENT, breaks, best, seen, window, RECORD
        )
    at = t.token_offsets + lane[4] * (num_tokens + 1) + token
    begin = tl.load(at)
    whole = live & ((goes_on == 0) | (form < 0))
    state, best, seen = _feed_bytes(
        t, lane, state, begin, tl.load(at + 1) - begin, whole, best, seen, window, RECORD
    )
    stays = (pending != 0) & (raw_count == 0)
    after = tl.where(stays, pending, tl.load(t.token_pending + token))
    after = tl.where(live, after, pending)
    if _any(goes_on):
        # The token begins inside a character: decode it byte by byte.
        decoded = tl.where(goes_on, pending, 0)
        count = tl.where(goes_on, raw_count, 0)
        for i in range(tl.max(count, axis=0)):
            moves = i < count
            source = t.raw_data + raw_begin + tl.where(moves, i, 0)
            byte = tl.load(source, mask=moves, other=0).to(tl.int32)
            step, broken, code_point = _utf8_step(decoded, byte)
            decoded = tl.where(moves, step, decoded)
            moves = moves & (form >= 0)
            if _any(moves & broken):
                state, best, seen = _feed_character(
                    t, lane, state, _REPLACEMENT, moves & broken, best, seen, window, RECORD
                )
            if _any(moves & (code_point >= 0)):
                state, best, seen = _feed_character(
                    t,
                    lane,
                    state,
                    code_point,
                    moves & (code_point >= 0),
                    best,
                    seen,
                    window,
                    RECORD,
                )
        after = tl.where(goes_on, decoded, after)
    return state, after, best, seen


@triton.jit
def _feed_end(t, lane, state, pending, live, best, seen, window, RECORD: tl.constexpr):
    """Tell the live lanes that the text ends; see `advance.feed_end`."""
    live = live & (lane[5] >= 0)
    if _any(live & (pending != 0)):
        state, best, seen = _feed_character(
            t, lane, state, _REPLACEMENT, live & (pending != 0), best, seen, window, RECORD
        )
    closes = live & (lane[6] != 0)
    byte = tl.where(closes, _BEFORE_NONWORD, 0)
    return _move(t, lane, state, byte, closes, best, seen, window, RECORD)


@triton.jit
def _end_bits(s, slot, token, end_stride, end_width):
    """What a token does to the text's end; token is one or one a lane."""
    bits = token * 0
    for i in range(end_width):
        bits |= (tl.load(s.end_tokens + slot * end_stride + i) == token).to(tl.int32)
    return bits * tl.load(s.end_bits + slot).to(tl.int32)


@triton.jit
def _walk(
    t,
    s,
    slot,
    lane,
    live,
    state,
    pending,
    token,
    ends,
    hidden,
    num_tokens,
    best,
    seen,
    window,
    RECORD: tl.constexpr,
):
    """What `advance_kernel` does with one token: its text, then the text's end if it ends here."""
    # One value a lane from here on: the interpreter does not mix truth values of both shapes.
    token, pending, ends = token + state * 0, pending + state * 0, ends + state * 0
    skipped = hidden & tl.load(t.token_special + token).to(tl.int32)
    shown = live & ((ends & _UNSEEN) == 0) & (skipped == 0)
    state, pending, best, seen = _feed_token(
        t, lane, state, pending, token, num_tokens, shown, best, seen, window, RECORD
    )
    last = live & ((ends & _LAST) != 0)
    if _any(last):
        state, best, seen = _feed_end(t, lane, state, pending, last, best, seen, window, RECORD)
        pending = tl.where(last, 0, pending)
    return state, pending, best, seen


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
    lane = _lane(t, tl.minimum(low + k, high - 1))
    states = s.state + slot * state_stride + k
    state = tl.load(states, mask=live, other=0).to(tl.int32)
    hidden = tl.load(s.hidden + slot).to(tl.int32)
    pending = tl.load(s.pending + slot).to(tl.int32)
    verdict = tl.load(s.verdict_rule + slot).to(tl.int32)
    step = tl.load(s.verdict_step + slot).to(tl.int32)
    remembered = tl.load(s.pending_rule + slot).to(tl.int32)
    marker = tl.load(t.spare_ids + MARKER_SPARE)
    best = tl.full((TRACKS,), _NO_RANK, tl.int32)
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
                ends = _end_bits(s, slot, token, end_stride, end_width)
                state, carried, best, seen = _walk(
                    t, s, slot, lane, live, state, pending, token, ends, hidden, num_tokens, best,
                    seen, 0, _STATES,
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
    lane = _lane(t, tl.minimum(low + k, high - 1))
    hidden = tl.load(s.hidden + slot).to(tl.int32)
    pending = tl.load(s.pending + slot).to(tl.int32)
    ends = _end_bits(s, slot, token, end_stride, end_width)
    limit = tl.load(s.limit + slot).to(tl.int32)
    ends = tl.where(total + 1 >= limit, ends | _LAST, ends)
    best = tl.full((TRACKS,), _NO_RANK, tl.int32)
    first = tl.load(t.policy_rule + policy)
    more = 1
    while more != 0:  # a second time only if rules completed that are far apart
        state = tl.load(s.state + slot * state_stride + k, mask=live, other=0).to(tl.int32)
        seen = tl.zeros((TRACKS,), tl.int64)
        state, _, best, seen = _walk(
            t, s, slot, lane, live, state, pending, token, ends, hidden, num_tokens, best, seen,
            first, _ALL,
        )  # fmt: skip
        bit = tl.arange(0, 64)
        found = tl.max(((seen[:, None] >> bit[None, :].to(tl.int64)) & 1).to(tl.int32), axis=0)
        found *= committed.to(tl.int32)
        one = tl.full((64,), 1, tl.int64)
        tl.atomic_add(s.counts + first + bit, one, mask=(found != 0) & (bit < _PAGE), sem="relaxed")
        more = tl.max(tl.where(bit == _PAGE, found, 0), axis=0)
        first += _PAGE
    rank = tl.min(best, axis=0)
    some = rank != _NO_RANK
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


@triton.jit
def _mask_kernel(
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
    if slot < 0:
        return
    policy = tl.load(s.policy + slot).to(tl.int32)
    if policy < 0:
        return
    if tl.load(t.mask_rule + policy) < 0:
        return
    if tl.load(s.verdict_rule + slot).to(tl.int32) != NO_VERDICT:
        return
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = place < num_tokens
    token = tl.minimum(place, num_tokens - 1)
    hidden = tl.load(s.hidden + slot).to(tl.int32)
    pending = tl.load(s.pending + slot).to(tl.int32)
    ends = _end_bits(s, slot, token, end_stride, end_width)
    limit = tl.load(s.limit + slot).to(tl.int32)
    last = tl.load(total_len + slot).to(tl.int32) + 1 >= limit
    ends = tl.where(last, ends | _LAST, ends)
    best = tl.full((BLOCK,), _NO_RANK, tl.int32)
    seen = tl.zeros((BLOCK,), tl.int64)
    low = tl.load(t.policy_tracks + policy)
    before = -1
    for track in range(low, tl.load(t.policy_tracks + policy + 1)):
        now = tl.load(s.state + slot * state_stride + track - low).to(tl.int32)
        twin = tl.load(t.tracks + track * _TRACK_FIELDS + 6)
        if (twin == 0) | (now != before):  # twins that have met complete the same
            state = tl.full((BLOCK,), 0, tl.int32) + now
            _, _, best, seen = _walk(
                t, s, slot, _lane(t, token * 0 + track), live, state, pending, token, ends, hidden,
                num_tokens, best, seen, 0, _BEST,
            )  # fmt: skip
        before = now
    group = tl.load(t.rank_group + best, mask=best != _NO_RANK, other=0)
    # Ranks put stop rules first: the lowest being a mask rule's, no stop rule completes.
    tl.store(logits + row * logits_stride + place, float("-inf"), mask=live & (group == MASK))
