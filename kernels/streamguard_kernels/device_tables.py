"""The tables and slots of the device kernels; see `device`. Needs torch and triton.

Only the platform that runs the kernels imports this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl

from streamguard_kernels import advance, lookahead
from streamguard_kernels.tables import Tables
from streamguard_kernels.utf8 import BEFORE_NONWORD, SEPARATOR_BYTE

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
#: best_rank of a state in which no rule completes.
NO_RANK = tl.constexpr(0x7FFFFFFF)
#: In place of the rank of a probe rule that fired: its scores cannot be trusted, the text must end.
FAILED_ALARM = tl.constexpr(-1)
TRACK_FIELDS = tl.constexpr(18)
#: How the tokens to mask in a row are found; see `device_mask`.
NOTHING, EVERY, SUFFICE, CANDIDATES = (tl.constexpr(way) for way in (-1, 0, 1, 2))


class DeviceTables(NamedTuple):
    """`tables.Tables` on a device, with what a verdict needs; frozen. Made by `to_device`.

    trans, cold      int32[num_entries], int32[num_cold * 3]: as in `Tables`, bit 31 is the sign
    class_of         uint8[num_tracks, 256]
    tracks           int32[num_tracks, 18]: base, classes, places, mapping, form, wrap, twin; where it
                     begins in own_offsets and in link; first, last + 1 in whole; limit, cold, number
                     of cold states, first, last + 1 in accepts, class of separators or -1, class of
                     the mark behind a word
    accepts          int32[num_accepts]
    policy_tracks    int32[num_policies + 1]
    policy_rule      int32[num_policies]: the policy's first rule
    mask_rule        int32[num_policies]: its most severe mask rule, -1 = it has none
    best_rank        int32[num_places]: rank of the most severe rule that completes, NO_RANK = none
    first_pattern, suffix_link int32[num_places]; next_pattern, pattern_rule int32[num_patterns]
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
    masking          int32[num_policies]: SUFFICE, CANDIDATES or EVERY
    own_offsets, link, order, whole: as in `lookahead.Ranges`, int32
    own_first        int32[num_ranges + 1]: first of each range, into the track's token order
    own_before       int64[num_ranges + 1]: tokens in the ranges before it
    """

    trans: torch.Tensor
    cold: torch.Tensor
    class_of: torch.Tensor
    tracks: torch.Tensor
    accepts: torch.Tensor
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
    masking: torch.Tensor
    own_offsets: torch.Tensor
    link: torch.Tensor
    order: torch.Tensor
    whole: torch.Tensor
    own_first: torch.Tensor
    own_before: torch.Tensor


class Slots(NamedTuple):
    """Matching state of the slots, and the counts. Each may be int32 or int64, counts int64 only.

    The caller sets all but the counts when a request enters a slot, also when it resumes there.

    policy        [num_slots]: -1 = not guarded
    plain         [num_slots]: 1 = only special tokens end the text
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
    plain: torch.Tensor
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
        plain=full(1, num_slots),
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
    tables: Tables,
    ranges: lookahead.Ranges | None,
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

    ranges       look-ahead of the mask rules; None = every token is walked, for want of such rules.
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
    tracks = np.zeros((len(mapping), TRACK_FIELDS.value), np.int32)
    for i, column in enumerate(
        (
            tables.track_base, tables.track_classes, tables.track_places, mapping,
            tables.mapping_form[mapping], tables.mapping_wrap[mapping], tables.track_twin,
        )
    ):  # fmt: skip
        tracks[:, i] = column
    separates = tables.mapping_shrinks[mapping] & 1 == 1
    for i, column in enumerate(
        (
            tables.track_limit, tables.track_cold, tables.track_num_cold, *tables.track_accepts.T,
            np.where(separates, tables.class_of[:, SEPARATOR_BYTE].astype(np.int32), -1),
            tables.class_of[:, BEFORE_NONWORD],
        )
    ):  # fmt: skip
        tracks[:, 11 + i] = column
    masking = np.zeros(num_policies, np.int32)
    if ranges is not None:
        tracks[:, 7], tracks[:, 8] = ranges.own_base, ranges.state_base
        tracks[:, 9:11] = ranges.whole_span
        stops = np.bincount(policy[group == STOP.value], minlength=num_policies) > 0
        masking[:] = _masking(tables, stops)
    best_rank = np.full(len(tables.best_rule), NO_RANK.value, np.int32)
    accepting = tables.best_rule >= 0
    best_rank[accepting] = tables.rule_rank[tables.best_rule[accepting]]

    def put(array: Any, dtype: type = np.int32) -> torch.Tensor:
        # An own copy: `Tables` may be mapped from a file, read-only.
        return torch.from_numpy(np.array(array, dtype)).to(device)

    return DeviceTables(
        trans=put(tables.trans.view(np.int32)),
        cold=put(np.append(tables.cold, np.uint32(0)).view(np.int32)),
        class_of=put(tables.class_of, np.uint8),
        tracks=put(tracks),
        accepts=put(np.append(tables.accepts, 0)),
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
        masking=put(masking),
        **{name: put(*column) for name, column in _range_columns(ranges).items()},
    )


def _masking(tables: Tables, stops: np.ndarray) -> list[int]:
    """How each policy is masked, as `lookahead.apply_ranges` has it; stops: it has stop rules."""
    found = []
    for p, (low, high) in enumerate(pairwise(tables.policy_tracks)):
        wraps = tables.mapping_wrap[tables.track_mapping[low:high]].any()
        way = CANDIDATES if stops[p] or wraps else SUFFICE
        # Of the quiet copies that a packed track has behind a prompt there are no ranges.
        every = tables.track_regex[low:high].any() or (
            wraps and tables.track_num_cold[low:high].any()
        )
        found.append((EVERY if every else way).value)
    return found


def _range_columns(ranges: lookahead.Ranges | None) -> dict[str, tuple[np.ndarray, type]]:
    """Arrays of `DeviceTables` that come from ranges, with their types; none is empty."""
    none = np.zeros(1, np.int32)
    if ranges is None:
        columns = dict.fromkeys(("own_offsets", "link", "order", "whole", "own_first"), none)
        return {**{n: (c, np.int32) for n, c in columns.items()}, "own_before": (none, np.int64)}
    first, last = ranges.own[:, 0], ranges.own[:, 1]
    return {
        "own_offsets": (ranges.own_offsets, np.int32),
        "link": (ranges.link, np.int32),
        "order": (ranges.order, np.int32),
        "whole": (np.append(ranges.whole, none), np.int32),
        "own_first": (np.append(first, none), np.int32),
        "own_before": (np.append(none, np.cumsum(last - first, dtype=np.int64)), np.int64),
    }
