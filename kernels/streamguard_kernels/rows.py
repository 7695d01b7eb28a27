"""What a batch's rows need before and after the matcher, in one call each: `RowGuard` drives it.

A step of a small model leaves nothing of numpy in the caches, where every operation costs ten times
what it costs in a loop of its own.
"""

from __future__ import annotations

from streamguard_kernels.compiled import compiled


@compiled
def count_tokens(slots, tokens, committed, running, spare):
    """Count committed tokens by slot; return whether some may be of a script.

    slots, tokens  int64[num_rows]. A token out of range, which the matcher refuses, is counted too:
                   else it would come again with the next step, and fail the whole batch again.
    committed      int64[num_slots], in/out; running bool[num_slots]: a script runs.
    spare          bool[num_tokens]: tokens that scripts begin with.
    """
    scripted = False
    for i in range(slots.shape[0]):
        slot, token = slots[i], tokens[i]
        if 0 <= slot < committed.shape[0]:
            committed[slot] += 1
            scripted |= running[slot] or (0 <= token < spare.shape[0] and spare[token])
    return scripted


@compiled
def live_rows(
    slots, sampled, running, guarded, committed, limit, spare, eos, rows, live, chosen, last
):
    """Find the rows that are decided on: no script runs, and the slot is under a policy.

    slots, sampled    int64[n]; of the latter reserved tokens (spare bool[num_tokens]) become `eos`:
                      the model itself chose them, and to the reader that is no verdict.
    running, guarded  bool[num_slots]; committed, limit int64[num_slots].
    rows, live, chosen  int64[n], last uint8[n], out: numbers of those rows, their slots and samples,
                        and whether the text is over behind them. Returns how many there are.
    """
    found = 0
    for i in range(slots.shape[0]):
        slot = slots[i]
        if running[slot] or not guarded[slot]:
            continue
        if 0 <= sampled[i] < spare.shape[0] and spare[sampled[i]]:
            sampled[i] = eos
        rows[found], live[found], chosen[found] = i, slot, sampled[i]
        last[found] = committed[slot] + 1 >= limit[slot]
        found += 1
    return found
