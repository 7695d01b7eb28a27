/* The loop that `walk_kernel` of kernels/streamguard_kernels/advance.py is measured against: the same
 * tables, the same shortcuts, the same results, written in C by hand.
 *
 * Only for dense tracks, one a policy, without normal forms, and for tokens that begin and end between
 * characters. The layout of the arrays is that of `Tables` and `Slots` there; bench_c_loop.py fills the
 * struct, whose order is that of FIELDS.
 */
#include <stdint.h>

struct loop {
    const uint32_t *trans;       /* next row start | bit 31 = the move completes a match */
    const uint8_t *class_of;     /* [256] */
    const int64_t *token_walk;   /* [num_tokens] state behind the token, read from the root | bit 31 |
                                  * class of the token's first byte << 32 */
    const int64_t *token_sync;   /* [num_tokens] row of `calm` behind the token | bit of a word << 32 | the
                                  * word is the row behind << 37 | word << 50; or < 0 */
    const uint32_t *calm;        /* rows. Bits: from the row's state the token's first classes lead where
                                  * they lead from the root; rows behind one class; the row's state */
    const int64_t *calm_shape;   /* [4] place of the state; of calm_rows: 0, size, shift */
    const int64_t *calm_rows;    /* row of the state that is so far from the root, shifted, << 32 | two
                                  * bytes: 1 + classes behind which the row does not hold; or -1 */
    const int32_t *token_offsets;
    const uint8_t *token_data;
    const int32_t *first_pattern, *next_pattern, *suffix_link, *best_rule; /* per state; per pattern */
    const int32_t *pattern_rule, *rule_rank;
    const int64_t *policy;       /* [num_slots] -1 = not guarded */
    const uint8_t *plain;        /* [num_slots] only special tokens end the text */
    const int64_t *pending;      /* [num_slots] unfinished character: none here */
    int64_t *state;              /* [num_slots] where the next is negative */
    int64_t *synced;             /* [num_slots] as in calm_rows; negative if it names classes */
    int64_t *events;             /* [capacity, 2] (row, rule) */
    int64_t *num_events;
    int64_t root, num_classes, num_slots, num_tokens, capacity;
};

static int64_t record(const struct loop *l, int64_t state, int64_t best, int64_t row)
{
    int64_t index = (state - l->root) / l->num_classes;
    int64_t rule = l->best_rule[index];
    if (best < 0 || l->rule_rank[rule] < l->rule_rank[best])
        best = rule;
    do {
        for (int32_t p = l->first_pattern[index]; p >= 0; p = l->next_pattern[p]) {
            int64_t at = (*l->num_events)++;
            if (at < l->capacity) {
                l->events[2 * at] = row;
                l->events[2 * at + 1] = l->pattern_rule[p];
            }
        }
        index = l->suffix_link[index];
    } while (index);
    return best;
}

static int64_t row_of(const struct loop *l, int64_t state)
{
    int64_t place = (state - l->root) >> l->calm_shape[3];
    if (place >= l->calm_shape[2])
        return -1;
    return l->calm_rows[place] & 0xffff ? l->calm_rows[place] | INT64_MIN : l->calm_rows[place];
}

/* Returns the number of rows done; -1 if an id is out of range, -2 for a row that is beyond this loop. */
int64_t advance(const struct loop *l, int64_t num_rows, const int64_t *slots, const int64_t *tokens,
                int64_t *best)
{
    for (int64_t row = 0; row < num_rows; row++)
        if (slots[row] < 0 || slots[row] >= l->num_slots || tokens[row] < 0
            || tokens[row] >= l->num_tokens)
            return -1;
    *l->num_events = 0;
    for (int64_t row = 0; row < num_rows; row++) {
        int64_t slot = slots[row], token = tokens[row];
        int64_t here = l->token_sync[token], before = l->synced[slot];
        best[row] = 0;
        if ((uint32_t)before == 0 && here >= 0) {
            uint32_t word = l->calm[(before >> 32) + (here >> 50)];
            int64_t behind = (here >> 37 & 1 ? word : (uint32_t)here) & 0x7fffffff;
            if (word >> (here >> 32 & 31) & 1) {
                l->synced[slot] = behind << 32;
                continue;
            }
        }
        if (l->policy[slot] < 0)
            continue;
        if (!l->plain[slot] || l->pending[slot])
            return -2;
        int64_t synced = here < 0 ? -1 : (here & 0x7fffffff) << 32;
        if (before < -1 && here >= 0) { /* a borrowed row */
            int64_t walk = l->token_walk[token], first = 1 + (walk >> 32);
            uint32_t word = l->calm[((before & INT64_MAX) >> 32) + (here >> 50)];
            int64_t behind = (here >> 37 & 1 ? word : (uint32_t)here) & 0x7fffffff;
            if (!(walk >> 31 & 1) && first != (before & 0xff) && first != (before >> 8 & 0xff)
                && (word >> (here >> 32 & 31) & 1)) {
                l->synced[slot] = behind << 32;
                continue;
            }
        }
        if (before >= 0)
            l->state[slot] = l->calm[(before >> 32) + l->calm_shape[0]];
        int64_t begin = l->token_offsets[token], end = l->token_offsets[token + 1];
        uint32_t state = (uint32_t)l->state[slot], whole = (uint32_t)l->token_walk[token], hit = whole;
        if (!(whole >> 31)) {
            uint32_t root = (uint32_t)l->root, class = (uint32_t)(l->token_walk[token] >> 32);
            uint32_t entry = l->trans[state + class], behind = l->trans[root + class];
            if (entry != behind) {
                uint32_t live = entry & 0x7fffffff;
                hit = entry;
                root = behind;
                for (int64_t i = begin + 1; live != root && i < end; i++) {
                    class = l->class_of[l->token_data[i]];
                    entry = l->trans[live + class];
                    hit |= entry;
                    live = entry & 0x7fffffff;
                    root = l->trans[root + class];
                }
                if (live != root) {
                    whole = live;
                    synced = -1;
                }
            }
        }
        if (!(hit >> 31)) {
            l->state[slot] = whole;
            l->synced[slot] = synced < 0 ? row_of(l, whole) : synced;
            continue;
        }
        int64_t rule = -1;
        for (int64_t i = begin; i < end; i++) {
            uint32_t entry = l->trans[state + l->class_of[l->token_data[i]]];
            state = entry & 0x7fffffff;
            if (entry >> 31)
                rule = record(l, state, rule, row);
        }
        l->state[slot] = state;
        l->synced[slot] = row_of(l, state);
        best[row] = rule + 1;
    }
    return num_rows;
}
