"""Walk slots over tokens, to commit them or only to see what they would complete."""

from __future__ import annotations

import numpy as np

from streamguard_kernels.compiled import borrowing, compiled
from streamguard_kernels.memo import remember, remembered
from streamguard_kernels.slots import (
    BORROWED,
    DETOUR,
    EXCEPTIONS,
    INSIDE,
    KEPT,
    settle,
    unpack_slots,
)
from streamguard_kernels.tables import (
    HIT_BIT,
    LOOK_CLOSER,
    NUMBER_BITS,
    STATE_MASK,
    STEP_BIT,
    move,
    move_cold,
    output_place,
    state_number,
    unpack_tables,
)
from streamguard_kernels.utf8 import (
    BEFORE_NONWORD,
    NUM_PREFIXES,
    REPLACEMENT,
    SEPARATOR_BYTE,
    map_character,
    prefix_number,
    utf8_step,
)

#: What the end of a text does to its token: its own text is not read; nothing follows it.
UNSEEN, LAST = 1, 2
#: Places in the `call` of `walk_kernel`, after the two addresses.
COMMIT, ENDS, FIRST, SILENT = 2, 3, 4, 5
# Constants are passed on as np.int64(…): numba compiles a function anew for every literal it gets.


@borrowing
def _record(packed, packed_slots, track, state, best, row):
    """Fold the rules of an accept state into `best`; append (row, rule) events while they fit."""
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    index = output_place(packed, track, state)
    first_place = t.track_places[track]
    rule = np.int64(t.best_rule[first_place + index])
    if best < 0 or t.rule_rank[rule] < t.rule_rank[best]:
        best = rule
    if row < 0:
        return best
    while True:
        pattern = t.first_pattern[first_place + index]
        while pattern >= 0:
            at = 2 * s.num_events[0]
            if at < s.events.shape[0]:
                s.events[at] = row
                s.events[at + 1] = t.pattern_rule[pattern]
            s.num_events[0] += 1
            pattern = t.next_pattern[pattern]
        index = np.int64(t.suffix_link[first_place + index])
        if index == 0:
            break
    return best


@borrowing
def _feed_mapped(packed, packed_slots, track, state, data, begin, end, best, row):
    """Walk one track over data[begin:end]; return (state, best)."""
    t = unpack_tables(packed)
    for i in range(begin, end):
        entry = np.int64(move(packed, track, state, t.class_of[track * 256 + data[i]]))
        state = entry & STATE_MASK
        if entry & HIT_BIT:
            best = _record(packed, packed_slots, track, state, best, row)
    return state, best


@borrowing
def _feed_character(packed, packed_slots, lo, hi, code_point, best, row):
    """Walk every mapped track of [lo, hi) over one character."""
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    for track in range(lo, hi):
        mapping = t.track_mapping[track]
        form = t.mapping_form[mapping]
        if form < 0:
            continue
        n = map_character(
            code_point, t.page_of[form * 0x1100 : (form + 1) * 0x1100],
            t.entries, t.map_offsets, t.map_data, s.buffer,
        )  # fmt: skip
        s.scratch[track - lo], best = _feed_mapped(
            packed, packed_slots, track, s.scratch[track - lo], s.buffer, np.int64(0), n, best, row
        )
    return best


@borrowing
def _feed_bytes(packed, packed_slots, lo, hi, pending, token, best, row):
    """Walk all tracks over a token that begins inside a character; return (pending, best)."""
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    begin, end = t.raw_offsets[token], t.raw_offsets[token + 1]
    for track in range(lo, hi):
        if t.mapping_form[t.track_mapping[track]] < 0:
            s.scratch[track - lo], best = _feed_mapped(
                packed,
                packed_slots,
                track,
                s.scratch[track - lo],
                t.raw_data,
                begin,
                end,
                best,
                row,
            )
    for i in range(begin, end):
        pending, broken, code_point = utf8_step(pending, np.int64(t.raw_data[i]))
        if broken:
            best = _feed_character(packed, packed_slots, lo, hi, np.int64(REPLACEMENT), best, row)
        if code_point >= 0:
            best = _feed_character(packed, packed_slots, lo, hi, code_point, best, row)
    return pending, best


@borrowing
def feed_token(packed, packed_slots, lo, hi, pending, token, best, row):
    """Walk all tracks [lo, hi) of `scratch` over one visible token; return (pending, best).

    row = where its events belong, -1 = events are not wanted. The caller has dealt with hidden
    special tokens.
    """
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    if pending != 0:
        return _feed_bytes(packed, packed_slots, lo, hi, pending, token, best, row)
    num_tokens = t.token_special.shape[0]
    before = np.int64(-1)
    for track in range(lo, hi):
        state = s.scratch[track - lo]
        if t.track_twin[track] and state == before:
            s.scratch[track - lo] = s.scratch[track - lo - 1]  # the twins have met
            continue
        before = state
        at = t.track_mapping[track] * (num_tokens + 1) + token
        s.scratch[track - lo], best = _feed_mapped(
            packed, packed_slots, track, state, t.token_data, np.int64(t.token_offsets[at]),
            np.int64(t.token_offsets[at + 1]), best, row,
        )  # fmt: skip
    return np.int64(t.token_pending[token]), best


@borrowing
def feed_end(packed, packed_slots, lo, hi, pending, best, row):
    """Tell all tracks that the text ends here: an unfinished character breaks, a word closes."""
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    if pending != 0:
        best = _feed_character(packed, packed_slots, lo, hi, np.int64(REPLACEMENT), best, row)
    for track in range(lo, hi):
        mapping = t.track_mapping[track]
        if t.mapping_form[mapping] >= 0 and t.mapping_wrap[mapping]:
            s.buffer[0] = BEFORE_NONWORD
            s.scratch[track - lo], best = _feed_mapped(
                packed, packed_slots, track, s.scratch[track - lo], s.buffer, np.int64(0),
                np.int64(1), best, row,
            )  # fmt: skip
    return best


@borrowing
def _known(packed, packed_slots, slot, known):
    """What `Slots.synced` is to say of a slot whose `state` and `pending` are up to date.

    known = what it says of these very states already, whatever it says of a character; -1 = nothing.
    """
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    mine = np.uintp(slot)
    if known == -1 and s.plain[mine]:
        p = np.uintp(s.policy[mine])
        lo, hi = np.uintp(t.policy_tracks[p]), np.uintp(t.policy_tracks[p + np.uintp(1)])
        first, shape = mine * np.uintp(s.scratch.shape[0]), np.uintp(4) * p
        state = s.state[first]
        place = np.uintp((state - t.track_base[lo]) >> t.calm_shape[shape + np.uintp(3)])
        if place < np.uintp(t.calm_shape[shape + np.uintp(2)]):
            alone = hi - lo == np.uintp(1)
            if alone or s.state[first + np.uintp(1)] == state:  # one track and its twin
                known = t.calm_rows[np.uintp(t.calm_shape[shape + np.uintp(1)]) + place]
    if known == -1:
        return known
    known &= ~DETOUR
    borrowed = known & EXCEPTIONS != 0
    number = prefix_number(s.pending[mine]) + 1 if s.pending[mine] else np.int64(0)
    if number > NUM_PREFIXES or (borrowed and number):
        return np.int64(-1)
    return known | BORROWED if borrowed else known | number << np.int64(16)


@compiled
def close_prompts(packed, lo, states):
    """Go over to the quiet copy of each state that the end of a word would complete; in place.

    states int64[num_tracks of the policy]. What stands whole at the end of a prompt is not the
    model's, whatever follows it.
    """
    t = unpack_tables(packed)
    for k in range(states.shape[0]):
        track, state = lo + k, states[k]
        if t.track_num_cold[track] == 0:
            number = state_number(packed, track, state)
            quiet = np.int64(t.quiet[t.track_places[track] + number])
            if quiet > 0:
                states[k] = t.track_base[track] + quiet * t.track_classes[track]
        elif t.mapping_wrap[t.track_mapping[track]]:
            entry = move(packed, track, state, t.class_of[track * 256 + BEFORE_NONWORD])
            if t.mapping_shrinks[t.track_mapping[track]] & 1:
                entry |= move(packed, track, state, t.class_of[track * 256 + SEPARATOR_BYTE])
            if entry >> 31:
                number = state_number(packed, track, state)
                states[k] = t.track_limit[track] + t.track_num_cold[track] + number


@borrowing
def end_groups(packed, lo, states):
    """Groups of what the end of a word, or of the text, would complete in any of a policy's tracks."""
    t = unpack_tables(packed)
    groups = 0
    for k in range(states.shape[0]):
        track = lo + k
        if t.mapping_wrap[t.track_mapping[track]]:
            class_ = t.class_of[track * 256 + BEFORE_NONWORD]
            entry = np.int64(move(packed, track, states[k], class_))
            if entry & HIT_BIT:
                place = output_place(packed, track, entry & STATE_MASK)
                groups |= t.groups[t.track_places[track] + place]
    return groups


@borrowing
def _walk_row(packed, packed_slots, slot, token, ends, row):
    """Walk a slot's tracks, copied to `scratch`, over any token; return (pending, rule or -1).

    ends = UNSEEN | LAST bits that hold whatever the token is; token = -1 is none at all.
    """
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    settle(packed, packed_slots, slot)
    pending, rule = s.pending[slot], np.int64(-1)
    lo, hi = t.policy_tracks[s.policy[slot]], t.policy_tracks[s.policy[slot] + 1]
    max_tracks, num_ends = s.scratch.shape[0], s.end_tokens.shape[0] // s.policy.shape[0]
    for i in range(max_tracks):
        s.scratch[i] = s.state[slot * max_tracks + i]
    for i in range(slot * num_ends, (slot + 1) * num_ends):
        if token >= 0 and s.end_tokens[i] == token:
            ends |= s.end_bits[slot]
    unseen = token < 0 or ends & UNSEEN or (s.hidden[slot] and t.token_special[token])
    if not unseen:
        pending, rule = feed_token(packed, packed_slots, lo, hi, pending, token, rule, row)
    if ends & LAST:
        rule = feed_end(packed, packed_slots, lo, hi, pending, rule, row)
        pending = np.int64(0)
    return pending, rule


@borrowing
def _row_behind(packed, known, here):
    """What `Slots.synced` says behind a token, of its entry in `token_sync`; -1 = it is to be walked.

    known = what it says before, with a row, and not BORROWED. Without a branch: which of the two kinds
    of words a token needs is as hard to guess as the text.
    """
    t = unpack_tables(packed)
    word = t.calm[np.uintp(known >> np.int64(32)) + np.uintp(here >> np.int64(50))]
    bit = np.uint32(here >> np.int64(32)) & np.uint32(31)
    behind = (np.int64(word) if here & np.int64(STEP_BIT) else here) & np.int64(STATE_MASK)
    number = here >> np.int64(22) & INSIDE
    return behind << np.int64(32) | number if (word >> bit) & np.uint32(1) else np.int64(-1)


@borrowing
def _continued(packed, p, known, token):
    """What a token does that begins inside a character: an entry as of `character_sync`.

    known = what `Slots.synced` says before. LOOK_CLOSER also if it says more than that character.
    p, token: np.uintp.
    """
    t = unpack_tables(packed)
    number, pages = known >> np.int64(16) & NUMBER_BITS, p * np.uintp(NUM_PREFIXES + 1)
    page = np.uintp(t.character_page[pages + np.uintp(number)])
    here = t.character_sync[page + np.uintp(t.token_tail[token])]
    if here != LOOK_CLOSER or t.token_special[token]:
        return here
    at, end = np.uintp(t.raw_offsets[token]), np.uintp(t.raw_offsets[token + np.uintp(1)])
    while at < end:  # a token of several bytes
        byte = t.raw_data[at]
        if number == 0 or byte & 0xC0 != 0x80:
            return np.int64(LOOK_CLOSER)
        page = np.uintp(t.character_page[pages + np.uintp(number)])
        here = t.character_sync[page + np.uintp(byte & 0x3F)]
        if here == LOOK_CLOSER:
            break
        number = here >> np.int64(38) & NUMBER_BITS
        at += np.uintp(1)
    return here


@borrowing
def _unless_excepted(packed, p, known, token):
    """A token's entry in `token_sync`; LOOK_CLOSER where a borrowed row does not hold behind it.

    known = what `Slots.synced` says before. p, token: np.uintp.
    """
    t = unpack_tables(packed)
    num_tokens, num_tracks = np.uintp(t.token_special.shape[0]), np.uintp(t.track_base.shape[0])
    walk = t.token_walk[token * num_tracks + np.uintp(t.policy_tracks[p])]
    class_ = (walk >> np.int64(32)) + 1
    nothing = walk & np.int64(HIT_BIT)
    if nothing or class_ == known & 0xFF or class_ == known >> np.int64(8) & 0xFF:
        return np.int64(LOOK_CLOSER)
    return t.token_sync[p * num_tokens + token]


@borrowing
def _inside_or_not(packed, p, known, token):
    """A token's entry in `token_sync`, or of `_continued` as far as one look-up tells, LOOK_CLOSER beyond.

    known = what `Slots.synced` says before, not BORROWED. Without a branch; and the choice is written as
    arithmetic, because LLVM makes branches of those between two words that are read. p, token: np.uintp.
    """
    t = unpack_tables(packed)
    number = known >> np.int64(16) & NUMBER_BITS
    page = np.uintp(t.character_page[p * np.uintp(NUM_PREFIXES + 1) + np.uintp(number)])
    inside = t.character_sync[page + np.uintp(t.token_tail[token])]
    here = t.token_sync[p * np.uintp(t.token_special.shape[0]) + token]
    return here ^ (here ^ inside) & -number >> np.int64(63)


@borrowing
def _careful(packed, p, known, token):
    """`_row_behind` for a slot that is inside a character or has a borrowed row."""
    if known >= 0:
        here = _continued(packed, p, known, token)
    else:
        here = _unless_excepted(packed, p, known, token)
    return _row_behind(packed, known & ~BORROWED, here) if here >= 0 else np.int64(-1)


@borrowing
def _follow(packed, packed_slots, track, state, code_point):
    """Walk one mapped track over a character: the state, and bit 31 if anything was completed."""
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    form = t.mapping_form[t.track_mapping[track]]
    n = map_character(
        code_point, t.page_of[form * 0x1100 : (form + 1) * 0x1100],
        t.entries, t.map_offsets, t.map_data, s.buffer,
    )  # fmt: skip
    hit = np.int64(0)
    for i in range(n):
        entry = np.int64(move(packed, track, state, t.class_of[track * 256 + s.buffer[i]]))
        state = entry & STATE_MASK
        hit |= entry
    return state | hit & HIT_BIT


@borrowing
def _walk_inside(packed, packed_slots, slot, token, commit):
    """Walk a slot that is inside a character over an ordinary token, as long as it completes nothing.

    The slot is settled. Returns whether it completes nothing; if it does, nothing was done.
    """
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    lo, hi = t.policy_tracks[s.policy[slot]], t.policy_tracks[s.policy[slot] + 1]
    before, mine = s.synced[slot], slot * s.scratch.shape[0]
    known = before if before >= 0 else np.int64(-1)
    for k in range(hi - lo):
        s.scratch[k] = s.state[mine + k]
    pending, hit = s.pending[slot], np.int64(0)
    for i in range(t.raw_offsets[token], t.raw_offsets[token + 1]):
        byte = np.int64(t.raw_data[i])
        pending, broken, code_point = utf8_step(pending, byte)
        for track in range(lo, hi):
            state = s.scratch[track - lo]
            if t.mapping_form[t.track_mapping[track]] < 0:
                state = np.int64(move(packed, track, state, t.class_of[track * 256 + byte]))
            else:
                if broken:
                    state = _follow(packed, packed_slots, track, state, np.int64(REPLACEMENT))
                    hit |= state
                    state &= STATE_MASK
                if code_point >= 0:
                    state = _follow(packed, packed_slots, track, state, code_point)
            hit |= state
            s.scratch[track - lo] = state & STATE_MASK
    if hit & HIT_BIT:
        return False
    if commit:
        s.pending[slot] = pending
        for k in range(hi - lo):
            if s.state[mine + k] != s.scratch[k]:
                known = np.int64(-1)
            s.state[mine + k] = s.scratch[k]
        known = _known(packed, packed_slots, slot, known)
        s.synced[slot] = remember(packed, packed_slots, slot, before, token, known)
    return True


@borrowing
def walk_kernel(call, slots, tokens):
    """Walk each slot over its newest token; tokens of one slot may follow in order.

    At most two table reads per byte: failure links are folded into `trans`, so the cost follows the
    bytes fed, not the number of patterns. Mostly one byte is fed: a track that meets the walk of the
    same bytes from the root goes on as that does, and where that leads is in `token_walk`. And mostly
    all tracks do so, from where all of them were: one bit in `calm` says it, however many they are;
    or the token is a byte or two, and `calm` says where they lead. A character that tokens cut in two is
    looked up like a token when it is complete, and a state without a row in `calm` borrows one.

    call    int64[6]: the addresses of packed `Tables` and `Slots`; COMMIT: 1 = the slots go on behind
            the token, 0 = only look, and a token of -1 is none at all: if it is the last, that asks
            what the end of the text would complete; ENDS: 1 = `row_last` counts, 0 = no text ends;
            FIRST: row to begin with, and the events of rows before it are kept; SILENT: 1 = events
            are not wanted.
    slots, tokens int64[num_rows]; what completed is in `Slots.best`.
    Returns num_rows, or num_rows + 1 if anything completed. Less: the number of rows done, the events
    of the next one do not fit (make room and go on from that row). -1: an id is out of range, the
    lengths differ, or there are more than most_rows; nothing is done then.

    Few arguments, since each costs 0.1 µs: at batch 1 they are half of the time.
    """
    packed, packed_slots = call[0], call[1]
    commit, ends_count, first = call[COMMIT], call[ENDS], call[FIRST]
    silent = np.int64(-1)
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    num_slots, num_tokens = s.policy.shape[0], t.token_special.shape[0]
    max_tracks, num_tracks = s.scratch.shape[0], np.uintp(t.track_base.shape[0])
    lowest = 0 if commit else -1
    if slots.shape[0] != tokens.shape[0] or slots.shape[0] > s.best.shape[0]:
        return -1
    wrong = False
    for k in range(slots.shape[0]):  # without a branch: several rows at once
        wrong |= (slots[k] < 0) | (slots[k] >= num_slots)
        wrong |= (tokens[k] < lowest) | (tokens[k] >= num_tokens)
    if wrong:
        return -1
    if first == 0:
        s.num_events[0] = 0
    completed = np.int64(s.num_events[0] > 0)
    inside, often_inside = np.uintp(0), False
    row, num_rows = np.uintp(first), np.uintp(slots.shape[0])
    while row < num_rows:
        # Nearly every row: an ordinary token within the text that completes nothing, behind states with
        # a row in `calm`. A loop of its own, so that all it needs stays in registers.
        while not (ends_count or often_inside):
            slot, token = np.uintp(slots[row]), np.uintp(tokens[row])
            before = s.synced[slot]
            if np.uint32(before) != 0:
                break
            here = t.token_sync[np.uintp(s.policy[slot]) * np.uintp(num_tokens) + token]
            if here < 0:
                break
            synced = _row_behind(packed, before, here)
            if synced == -1:
                break
            if commit:
                s.synced[slot] = synced
            s.best[row] = 0
            row += np.uintp(1)
            if row == num_rows:
                return slots.shape[0] + completed
        # And where many rows are inside a character: each costs more, and none is a surprise. Not one
        # loop with a flag: it took a sixteenth longer, English too.
        while often_inside and not ends_count:
            slot, token = np.uintp(slots[row]), np.uintp(tokens[row])
            before = s.synced[slot]
            if np.uint16(before) != 0:  # borrowed, kept, or none
                break
            here = _inside_or_not(packed, np.uintp(s.policy[slot]), before, token)
            if here < 0:
                break
            synced = _row_behind(packed, before, here)
            if synced == -1:
                break
            if commit:
                s.synced[slot] = synced
            s.best[row] = 0
            row += np.uintp(1)
            if row == num_rows:
                return slots.shape[0] + completed
        slot, token = np.uintp(slots[row]), np.uintp(tokens[row])
        mine = slot * np.uintp(max_tracks)
        if s.policy[slot] < 0:
            s.best[row] = 0
            row += np.uintp(1)
            continue
        # An ordinary token again. What this part cannot settle, `_walk_row` does from the start.
        before = s.synced[slot]
        settled = (before != -1 or s.plain[slot]) and not ends_count
        if settled:
            p, synced = np.uintp(s.policy[slot]), np.int64(-1)
            if np.uint32(before) != 0 and before != -1 and before & EXCEPTIONS != KEPT:
                synced = _careful(packed, p, before, token)
                inside += np.uintp(before >= 0)
                if np.uintp(8) * inside > row + np.uintp(16):
                    often_inside = True
            if synced == -1 and before != -1:
                synced = remembered(packed_slots, before, token)
            if synced != -1:
                if commit:
                    s.synced[slot] = synced
                s.best[row] = 0
                row += np.uintp(1)
                continue
            settle(packed, packed_slots, np.int64(slot))
            if s.pending[slot]:
                if not t.token_special[token] and _walk_inside(
                    packed, packed_slots, np.int64(slot), np.int64(token), commit
                ):
                    s.best[row] = 0
                    row += np.uintp(1)
                    continue
                settled = False
        if settled:
            here = t.token_sync[p * np.uintp(num_tokens) + token]
            synced = (here & np.int64(STATE_MASK)) << np.int64(32) if here >= 0 else np.int64(-1)
            lo, hi = np.uintp(t.policy_tracks[p]), np.uintp(t.policy_tracks[p + np.uintp(1)])
            track, whole, last = lo, np.uint32(0), np.int64(-1)
            while track < hi:
                start = s.state[mine + track - lo]
                s.scratch[track - lo] = start
                if start == last and t.track_twin[track]:  # the twins have met
                    if commit:
                        s.state[mine + track - lo] = whole
                    track += np.uintp(1)
                    continue
                known = t.token_walk[token * num_tracks + track]
                whole = np.uint32(known)
                if whole >> np.uint32(31):
                    settled = False
                    break
                root = np.uintp(t.track_base[track])
                limit = np.uintp(t.track_limit[track])
                state, last = np.uintp(start), start
                class_ = np.uintp(known >> np.int64(32))
                behind = t.trans[root + class_]
                if state < limit:
                    entry = t.trans[state + class_]
                else:
                    entry = move_cold(packed, np.int64(track), np.int64(state), np.int64(class_))
                if entry != behind:
                    hit = entry
                    state, root = np.uintp(entry & STATE_MASK), np.uintp(behind)
                    at = np.uintp(t.track_mapping[track]) * np.uintp(num_tokens + 1) + token
                    i = np.uintp(t.token_offsets[at]) + np.uintp(1)
                    end = np.uintp(t.token_offsets[at + np.uintp(1)])
                    classes = track * np.uintp(256)
                    while state != root and i < end:
                        class_ = np.uintp(t.class_of[classes + np.uintp(t.token_data[i])])
                        entry = move(packed, track, state, class_)
                        hit |= entry
                        state = np.uintp(entry & STATE_MASK)
                        root = np.uintp(move(packed, track, root, class_))
                        i += np.uintp(1)
                    if hit >> np.uint32(31):
                        settled = False
                        break
                    if state != root:
                        whole = np.uint32(state)
                        synced = np.int64(-1)
                if commit:
                    s.state[mine + track - lo] = whole
                track += np.uintp(1)
            if settled:
                if commit:
                    s.pending[slot] = t.token_pending[token]
                    synced = _known(packed, packed_slots, np.int64(slot), synced)
                    s.synced[slot] = remember(packed, packed_slots, slot, before, token, synced)
                s.best[row] = 0
                row += np.uintp(1)
                continue
            while commit and track > lo:  # take it back
                track -= np.uintp(1)
                s.state[mine + track - lo] = s.scratch[track - lo]
        ends = np.int64(LAST) if ends_count and s.row_last[row] else np.int64(0)
        events = s.num_events[0]
        told = silent if call[SILENT] else np.int64(row)
        pending, rule = _walk_row(packed, packed_slots, slots[row], tokens[row], ends, told)
        if 2 * s.num_events[0] > s.events.shape[0]:
            s.num_events[0] = events
            return np.int64(row)
        if commit:
            s.pending[slot] = pending
            for k in range(max_tracks):
                s.state[mine + np.uintp(k)] = s.scratch[k]
            s.synced[slot] = _known(packed, packed_slots, np.int64(slot), np.int64(-1))
        s.best[row] = rule + 1
        completed |= np.int64(rule >= 0)
        row += np.uintp(1)
    return slots.shape[0] + completed
