"""Probe rules on the device: scores in the forward pass's own memory to alarms, in one launch.

Agrees bit for bit with `probe.read_scores`, the host's (float32, the same operations in the same
order). The launch copies nothing to the host, allocates nothing and has a grid that depends on shapes
alone. `device.decide_rows` takes the alarms into account.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from streamguard_kernels import probe
from streamguard_kernels.device_tables import FAILED_ALARM, NO_RANK, Slots

_WINDOW = tl.constexpr(probe.WINDOW)
_CONSECUTIVE = tl.constexpr(probe.CONSECUTIVE)
_EMA = tl.constexpr(probe.EMA)
_CUSUM = tl.constexpr(probe.CUSUM)


class DeviceProbes(NamedTuple):
    """What policies watch scores for, on a device; frozen. Made by `probes_to_device`.

    monitors  int32[num_policies, width, 8]: rule (-1 = none here nor behind), column, kind, size,
              warmup, stage (1 = prompt), stop, rank of the rule. The most severe comes first.
    levels    float32[num_policies, width, 4]: weight, drift, threshold, hysteresis
    block     int32[num_policies]: 1 = a failure ends the response, 0 = it goes on without its probes
    """

    monitors: torch.Tensor
    levels: torch.Tensor
    block: torch.Tensor


class ProbeSlots(NamedTuple):
    """What monitors remember of the slots; see `probe.MonitorSlots`. Made by `new_probe_slots`.

    prompt_len  int32[num_slots]; expected int32[num_slots]: next position to be read. `enter_slots`
                sets both when a request begins or resumes.
    value       float32[num_slots, width]; ring float32[num_slots, width, size]
    above       int32[num_slots, width]: 1 = the threshold was reached; a stop rule's stays
    pending     int32[num_slots, width]: 1 = a crossing that was not counted yet
    failed      int32[num_slots]: 1 = scores were missing or no numbers
    alarm       int32[num_slots]: rank of the most severe stop rule that fired, NO_RANK = none;
                FAILED_ALARM = scores failed and the policy blocks
    """

    prompt_len: torch.Tensor
    expected: torch.Tensor
    value: torch.Tensor
    ring: torch.Tensor
    above: torch.Tensor
    pending: torch.Tensor
    failed: torch.Tensor
    alarm: torch.Tensor


def probes_to_device(
    monitors: Any, rank: Any, block: Sequence[bool], device: torch.device | str
) -> DeviceProbes:
    """Copy the tables to a device, once at start.

    monitors  has the fields of `probe.Monitors`; rank int[num_policies, width]: of the rules.
    block     per policy whether `on_error` is block.
    """
    m = monitors
    whole = (m.rule, m.column, m.kind, m.size, m.warmup, m.stage, m.stop, rank)
    levels = (m.weight, m.drift, m.threshold, m.hysteresis)
    return DeviceProbes(
        torch.from_numpy(np.stack(whole, axis=-1).astype(np.int32)).to(device),
        torch.from_numpy(np.stack(levels, axis=-1).astype(np.float32)).to(device),
        torch.tensor([int(each) for each in block], dtype=torch.int32, device=device),
    )


def new_probe_slots(
    num_slots: int, num_monitors: int, size: int, device: torch.device | str
) -> ProbeSlots:
    """Slots that have read nothing. num_monitors: most of a policy; size: largest of a statistic."""

    def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    return ProbeSlots(
        prompt_len=full(0, num_slots),
        expected=full(0, num_slots),
        value=full(0, num_slots, num_monitors, dtype=torch.float32),
        ring=full(0, num_slots, num_monitors, size, dtype=torch.float32),
        above=full(0, num_slots, num_monitors),
        pending=full(0, num_slots, num_monitors),
        failed=full(0, num_slots),
        alarm=full(NO_RANK.value, num_slots),
    )


def enter_slots(
    q: ProbeSlots, index: torch.Tensor, prompt_len: torch.Tensor, expected: torch.Tensor
) -> None:
    """Begin texts, or begin them again.

    index       int64[n] on the device: their slots.
    prompt_len  int[n]; expected int[n]: 0 if the policy reads the prompt, else prompt_len.
    """
    q.prompt_len[index] = prompt_len.to(torch.int32)
    q.expected[index] = expected.to(torch.int32)
    for array in (q.value, q.above, q.pending, q.failed):
        array.index_fill_(0, index, 0)
    q.alarm.index_fill_(0, index, NO_RANK.value)


def read_scores(
    p: DeviceProbes,
    q: ProbeSlots,
    s: Slots,
    scores: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    idx_mapping: torch.Tensor,
    total_len: torch.Tensor,
    counter: torch.Tensor,
    last_counter: torch.Tensor,
) -> None:
    """Take the scores of this step's forward pass into the monitors of each row's slot.

    A slot fails for good if a position is missing, if a score that its policy reads is NaN or
    infinite, and in all rows if `counter` has not grown since the last call: the scores are then those
    of an earlier step. Crossings of observe rules count (in `decide_rows`) if they are at the newest
    committed token, those of a prompt with the first sample.

    scores           float32[>= num_tokens, num_columns], by token of the batch.
    query_start_loc  int[>= num_rows + 1]: row r owns tokens query_start_loc[r] .. [r + 1].
    positions        int[>= num_tokens]: each token's place in its text, prompt included, from 0.
    idx_mapping      int[num_rows]: the row's slot, < 0 = none; a slot stands in one row at most.
    total_len        int[num_slots]: committed tokens, prompt included.
    counter          int64[1]: how often scores were written; last_counter int64[1], in/out.
    """
    width = q.value.shape[1]
    _read_kernel[(idx_mapping.shape[0],)](
        p, q, s, scores, scores.stride(0), query_start_loc, positions, idx_mapping, total_len,
        counter, last_counter, width, q.ring.shape[2],
        MONITORS=triton.next_power_of_2(width), num_warps=1,
        # A product and a sum in one rounding would not be what the host computes.
        enable_fp_fusion=False,
    )  # fmt: skip
    # After the launch: no program may see its own step's number as the last one.
    last_counter.copy_(counter)


@triton.jit
def _read_kernel(
    p,
    q,
    s,
    scores,
    score_stride,
    query_start_loc,
    positions,
    idx_mapping,
    total_len,
    counter,
    last_counter,
    width,
    ring_size,
    MONITORS: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(idx_mapping + row).to(tl.int64)
    if slot < 0:
        return
    policy = tl.load(s.policy + slot).to(tl.int32)
    if policy < 0:
        return
    table = p.monitors + policy * width * 8
    if tl.load(table) < 0:
        return
    if tl.load(q.failed + slot) != 0:
        return
    k = tl.arange(0, MONITORS)
    inside = k < width
    fields = table + k * 8
    live = inside & (tl.load(fields, mask=inside, other=-1) >= 0)
    column = tl.load(fields + 1, mask=live, other=0)
    kind = tl.load(fields + 2, mask=live, other=_CUSUM)
    size = tl.load(fields + 3, mask=live, other=1)
    warmup = tl.load(fields + 4, mask=live, other=1)
    stage = tl.load(fields + 5, mask=live, other=0)
    stop = tl.load(fields + 6, mask=live, other=0) != 0
    rank = tl.load(fields + 7, mask=live, other=NO_RANK)
    levels = p.levels + (policy * width + k) * 4
    weight = tl.load(levels, mask=live, other=0.0)
    drift = tl.load(levels + 1, mask=live, other=0.0)
    threshold = tl.load(levels + 2, mask=live, other=0.0)
    lower = threshold - tl.load(levels + 3, mask=live, other=0.0)
    ringed = live & ((kind == _WINDOW) | (kind == _CONSECUTIVE))

    prompt_len = tl.load(q.prompt_len + slot)
    expected = tl.load(q.expected + slot)
    total = tl.load(total_len + slot).to(tl.int32)
    first = tl.load(query_start_loc + row).to(tl.int32)
    num_rows = tl.load(query_start_loc + row + 1).to(tl.int32) - first
    start = tl.load(positions + first, mask=num_rows > 0, other=0).to(tl.int32)
    fresh = tl.load(counter) > tl.load(last_counter)
    failed = ((fresh == 0) | ((num_rows > 0) & (start > expected))).to(tl.int32)
    at = slot * width + k
    value = tl.load(q.value + at, mask=live, other=0.0)
    above = tl.load(q.above + at, mask=live, other=0)
    pending = tl.load(q.pending + at, mask=live, other=0)
    ring = q.ring + at * ring_size

    for position in range(tl.maximum(start, expected), start + num_rows):
        if failed == 0:
            prompt = (position < prompt_len).to(tl.int32)
            reads = live & (stage == prompt)
            source = scores + (first + position - start).to(tl.int64) * score_stride + column
            score = tl.load(source, mask=reads, other=0.0).to(tl.float32)
            finite = (score == score) & (tl.abs(score) != float("inf"))
            failed = tl.max((reads & (finite == 0)).to(tl.int32), axis=0)
            if failed == 0:
                count = position - tl.where(prompt != 0, 0, prompt_len)
                place = count % size
                tl.store(ring + place, score, mask=reads & ringed)
                known = tl.minimum(count + 1, size)
                total_score = tl.zeros((MONITORS,), tl.float32)
                least = tl.full((MONITORS,), float("inf"), tl.float32)
                for i in range(tl.max(tl.where(reads & ringed, known, 0), axis=0)):
                    some = reads & ringed & (i < known)
                    # The newest one from the register: another thread's store may not be seen yet.
                    old = tl.load(ring + i, mask=some & (i != place), other=0.0)
                    one = tl.where(i == place, score, old)
                    total_score = tl.where(some, total_score + one, total_score)
                    least = tl.where(some & (one < least), one, least)
                tl.debug_barrier()  # before other threads read what was stored
                mean = tl.div_rn(total_score, known.to(tl.float32))
                run = tl.where(known < size, float("-inf"), least)
                average = tl.where(count > 0, value + weight * (score - value), score)
                sum_ = value + score - drift
                sum_ = tl.where(sum_ < 0, 0.0, sum_)
                statistic = tl.where(kind == _WINDOW, mean, run)
                statistic = tl.where(kind == _EMA, average, statistic)
                statistic = tl.where(kind == _CUSUM, sum_, statistic)
                value = tl.where(reads & (ringed == 0), statistic, value)
                failed = tl.max((reads & (statistic != statistic)).to(tl.int32), axis=0)
                decides = reads & (count + 1 >= warmup)
                reached = decides & (statistic >= threshold)
                newest = tl.where(prompt != 0, prompt_len, position + 1)
                counts = reached & (stop == 0) & (above == 0) & (newest >= total)
                pending = tl.where(counts, 1, pending)
                above = tl.where(reached, 1, above)
                sinks = decides & (stop == 0) & (statistic < lower)
                above = tl.where(sinks, 0, above)
                expected += (failed == 0).to(tl.int32)

    # A prompt that was not read to its end has no first sample to count with.
    pending = tl.where((stage != 0) & (expected < prompt_len) & (failed != 0), 0, pending)
    tl.store(q.value + at, value, mask=live)
    tl.store(q.above + at, above, mask=live)
    tl.store(q.pending + at, pending, mask=live)
    tl.store(q.expected + slot, expected)
    tl.store(q.failed + slot, failed)
    alarm = tl.min(tl.where(live & stop & (above != 0), rank, NO_RANK), axis=0)
    blocks = (failed != 0) & (tl.load(p.block + policy) != 0)
    tl.store(q.alarm + slot, tl.where(blocks, FAILED_ALARM, alarm))


@triton.jit
def count_alarms(p, q, s, slot, policy, width, MONITORS: tl.constexpr):
    """Count, with a sample that will be committed, the stop rules that fired and what is pending."""
    k = tl.arange(0, MONITORS)
    inside = k < width
    fields = p.monitors + (policy * width + k) * 8
    rule = tl.load(fields, mask=inside, other=-1)
    live = inside & (rule >= 0)
    stop = tl.load(fields + 6, mask=live, other=0) != 0
    at = slot * width + k
    pending = tl.load(q.pending + at, mask=live, other=0) != 0
    above = tl.load(q.above + at, mask=live, other=0) != 0
    fires = live & ((stop & above) | pending)
    one = tl.full((MONITORS,), 1, tl.int64)
    tl.atomic_add(s.counts + tl.where(fires, rule, 0), one, mask=fires, sem="relaxed")
    tl.store(q.pending + at, tl.zeros((MONITORS,), tl.int32), mask=live & pending)
