"""Compile a set of policies against a vocabulary into the frozen tables that every engine walks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from streamguard.compiler.mapping import Mapping, character_tables
from streamguard.compiler.regex_outputs import outputs_of
from streamguard.compiler.regexes import Regex, RegexTrack, tracks_of
from streamguard.compiler.rules import MASK, OBSERVE, STOP, CompiledRule, RuleTable
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.errors import PolicyError
from streamguard.policy import PolicySet
from streamguard.policy_regexes import regexes_of
from streamguard_kernels.advance import (
    STATE_MASK,
    Tables,
    find_calm,
    first_classes,
    pack_tables,
    walk_tokens,
)
from streamguard_kernels.automaton import (
    COLD_FIELDS,
    accepting_groups,
    build_trie,
    byte_classes,
    collect_outputs,
    link_trie,
    pack_cold,
    pack_rows,
    sort_patterns,
)
from streamguard_kernels.hold import UNKNOWN, hold_depths
from streamguard_kernels.lookahead import (
    Ranges,
    build_own_ranges,
    quiet_ranges,
    token_order,
    tokens_with_whole_patterns,
)
from streamguard_kernels.packing import address
from streamguard_kernels.utf8 import AFTER_NONWORD, BEFORE_NONWORD, SEPARATOR_BYTE, map_tokens

#: Most bytes that the transition tables of one policy set may take.
MAX_TABLE_BYTES = 1 << 30
#: A track's table is dense as long as all dense ones fit in here; else packed, with rows for as many
#: states as fit in here. More rows gain nothing: only the shallow states are visited often.
DENSE_BYTES = 256 << 20
HOT_BYTES = 32 << 20
CALM_BYTES = 2 << 20
WIDTHS = (4, 3, 2)


@dataclass(frozen=True)
class _Automaton:
    """One track's own tables, before they are joined.

    start    entry of the state at the start of a text. longest: mapped bytes of its longest match.
    twin     whether a second track reads the output as a text of its own.
    regex    whether it was made from regexes: it has no pattern bytes and no failure links then.
    cold     records of the states without a row, accepts the numbers of accept states; both empty if
             the layout is dense.
    """

    mapping: Mapping
    pattern_data: np.ndarray
    pattern_offsets: np.ndarray
    pattern_rule: np.ndarray
    class_of: np.ndarray
    packed: np.ndarray
    num_states: int
    num_classes: int
    failure: np.ndarray
    first_pattern: np.ndarray
    next_pattern: np.ndarray
    suffix_link: np.ndarray
    best_rule: np.ndarray
    groups: np.ndarray
    quiet: np.ndarray
    pattern_length: np.ndarray
    start: int
    longest: int
    twin: bool
    regex: bool = False
    cold: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    accepts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def num_walked(self) -> int:
        """States that patterns lead to; quiet ones follow them."""
        return len(self.failure)

    @property
    def num_cold(self) -> int:
        return len(self.cold) // COLD_FIELDS


@dataclass(frozen=True)
class Program:
    """What the engines need of a policy set and a vocabulary. Make one with `compile_program`.

    table       the rules; tables: see `Tables`; max_tracks, max_depth: most tracks of a policy,
                longest mapped pattern.
    """

    table: RuleTable
    tables: Tables
    policy_sha256: str
    compile_seconds: float
    max_tracks: int
    max_depth: int
    _automata: tuple[_Automaton, ...] = field(repr=False)
    _track_automaton: tuple[int, ...] = field(repr=False)
    #: Per policy what all readings of text share; `scanner` fills it.
    scan_plans: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def first_states(self) -> np.ndarray:
        """int64[num_tracks + 1]: where a track's states begin if those of all are counted.

        Twins share theirs. The last entry is the number of all.
        """
        t = self.tables
        num_rows = (t.track_limit - t.track_base) // t.track_classes
        num_states = np.where(t.track_twin == 1, 0, num_rows + t.track_num_cold)
        first = np.cumsum(num_states) - num_states
        twins = np.flatnonzero(t.track_twin)
        first[twins] = first[twins - 1]
        return np.append(first, num_states.sum())

    @property
    def num_states(self) -> int:
        return int(self.first_states[-1])

    def outputs_of_track(self, track: int) -> slice:
        """A track's stretch of the arrays that have an entry a place; see `Tables`."""
        t = self.tables
        first = int(t.track_places[track])
        if t.track_num_cold[track]:
            begin, end = t.track_accepts[track].tolist()
            return slice(first, first + 1 + end - begin)
        num_states = (t.track_limit[track] - t.track_base[track]) // t.track_classes[track]
        return slice(first, first + int(num_states))

    @property
    def size_bytes(self) -> int:
        """Bytes of all tables, token bytes included."""
        return sum(array.nbytes for array in self.tables)

    @property
    def rules(self) -> tuple[CompiledRule, ...]:
        return self.table.rules

    @property
    def policies(self) -> tuple[str, ...]:
        return self.table.policies

    @property
    def default_policy(self) -> int:
        return self.table.default_policy

    @property
    def vocabulary(self) -> Vocabulary:
        return self.table.vocabulary

    def uses(self, group: int, policy: int | None = None) -> bool:
        """Whether any rule (of one policy) belongs to the group."""
        return self.table.uses(group, policy)

    @cached_property
    def mask_ranges(self) -> Ranges:
        """Look-ahead of the mask rules."""
        return self._ranges(MASK)

    @cached_property
    def stop_ranges(self) -> Ranges:
        """Look-ahead of the halt and redirect rules."""
        return self._ranges(STOP)

    @cached_property
    def hold_depths(self) -> np.ndarray:
        """int32[num_states]: mapped bytes at the end of the text that may still begin a match.

        Of mask, halt and redirect rules; see `hold.hold_depths` and `first_states`. Read off the
        tables alone. Of a regex only whether a match is under way: `hold.UNKNOWN` then.
        """
        t, packed = self.tables, pack_tables(self.tables)
        withholds = np.array([r.group in (MASK, STOP) for r in self.rules], np.uint8)
        depths = np.zeros(self.num_states, np.int32)
        ends = np.append(np.unique(self.first_states), self.num_states)
        for track, first in enumerate(self.first_states[:-1].tolist()):
            if t.track_twin[track]:
                continue
            mine = depths[first : ends[np.searchsorted(ends, first, "right")]]
            if t.track_regex[track]:
                pattern, withheld = t.first_pattern[self.outputs_of_track(track)], False
                while len(pattern := pattern[pattern >= 0]):
                    withheld |= bool(withholds[t.pattern_rule[pattern]].any())
                    pattern = t.next_pattern[pattern]
                idle = t.quiet[self.outputs_of_track(track)] < 0
                mine[:] = np.where(idle, 0, UNKNOWN) if withheld else 0
            else:
                hold_depths(address(packed), track, withholds, mine)
        return depths

    @cached_property
    def _orders(self) -> list[np.ndarray]:
        t = self.tables
        return [token_order(offsets, t.token_data, t.token_special) for offsets in t.token_offsets]

    def _ranges(self, group: int) -> Ranges:
        t, packed = self.tables, pack_tables(self.tables)
        tables_at = address(packed)
        rule_group = np.array([r.group for r in self.rules], np.uint8)
        num_tokens = len(self.vocabulary)
        orders = self._orders
        order = np.full((len(orders), num_tokens), -1, np.int32)
        for mapping, tokens in enumerate(orders):
            order[mapping, : len(tokens)] = tokens
        own_offsets: list[np.ndarray] = []
        own: list[np.ndarray] = []
        links: list[np.ndarray] = []
        whole: list[np.ndarray] = []
        own_base: list[int] = []
        state_base: list[int] = []
        whole_span: list[tuple[int, int]] = []
        num_own = num_whole = num_states = num_offsets = 0
        for track, automaton_index in enumerate(self._track_automaton):
            if t.track_twin[track]:
                own_base.append(own_base[-1])
                state_base.append(state_base[-1])
                whole_span.append(whole_span[-1])
                continue
            automaton = self._automata[automaton_index]
            mapping = int(t.track_mapping[track])
            tokens, offsets = orders[mapping], t.token_offsets[mapping]
            if automaton.regex:  # `regex_masks` finds its tokens; there are no ranges
                own_base.append(num_offsets)
                state_base.append(num_states)
                own_offsets.append(np.full(automaton.num_states + 1, num_own, np.int32))
                own.append(np.zeros((0, 2), np.int32))
                links.append(np.zeros(automaton.num_states, np.int32))
                whole.append(np.zeros(0, np.int32))
                whole_span.append((num_whole, num_whole))
                num_states += automaton.num_states
                num_offsets += automaton.num_states + 1
                continue
            wanted = (rule_group[automaton.pattern_rule] & group).astype(np.uint8)

            def own_ranges(
                shortest: int, automaton: _Automaton = automaton, wanted: np.ndarray = wanted,
                track: int = track, tokens: np.ndarray = tokens, offsets: np.ndarray = offsets,
            ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
                ranges: tuple[np.ndarray, np.ndarray, np.ndarray] = build_own_ranges(
                    tables_at, track, automaton.pattern_data, automaton.pattern_offsets, wanted,
                    shortest, automaton.num_walked, automaton.failure, tokens, offsets, t.token_data,
                )  # fmt: skip
                return ranges

            track_offsets, track_own, track_link = own_ranges(1)
            if automaton.quiet.any():
                # From a quiet state the mark, or a separator, alone completes nothing.
                quiet = np.flatnonzero(automaton.quiet).astype(np.int32)
                more_offsets, more_own = quiet_ranges(quiet, *own_ranges(2))
                track_offsets = np.concatenate([track_offsets, more_offsets[1:] + len(track_own)])
                track_own = np.concatenate([track_own, more_own])
                track_link = np.concatenate([track_link, np.zeros(len(quiet), np.int32)])
            track_whole = tokens_with_whole_patterns(
                tables_at, track, group, tokens, offsets, t.token_data
            )
            own_base.append(num_offsets)
            state_base.append(num_states)
            own_offsets.append(track_offsets + num_own)
            own.append(track_own)
            links.append(track_link)
            whole.append(track_whole)
            whole_span.append((num_whole, num_whole + len(track_whole)))
            num_own += len(track_own)
            num_whole += len(track_whole)
            num_states += automaton.num_states
            num_offsets += automaton.num_states + 1
        continues = np.array(
            [bool(b) and 0x80 <= b[0] < 0xC0 for b in self.vocabulary.token_bytes], np.uint8
        )
        return Ranges(
            np.concatenate(own_offsets),
            np.array(own_base, np.int64),
            np.concatenate(own),
            np.concatenate(links),
            np.array(state_base, np.int64),
            order,
            np.array([len(tokens) for tokens in orders], np.int64),
            np.array(whole_span, np.int64).reshape(-1, 2),
            np.concatenate(whole),
            np.flatnonzero(continues & ~t.token_special).astype(np.int32),
            continues,
            np.flatnonzero(t.token_special).astype(np.int32),
            np.array([group], np.int64),
        )


def compile_program(policies: PolicySet, vocabulary: Vocabulary | None = None) -> Program:
    """Build the automata of all policies over one vocabulary (None: to scan text only).

    Raises PolicyError if the tables would exceed MAX_TABLE_BYTES.
    """
    started = time.perf_counter()
    vocabulary = vocabulary or Vocabulary.empty()
    table = RuleTable.from_policies(policies, vocabulary)
    names, rules = table.policies, table.rules
    rank = np.array([r.rank for r in rules], np.int32)
    group = np.array([r.group for r in rules], np.uint8)

    mappings: list[Mapping] = []
    automata: list[_Automaton] = []
    tracks: list[tuple[int, bool]] = []  # automaton, twin
    policy_tracks = [0]
    num_entries = 0
    for name in names:
        mine = [(i, r.rule) for i, r in enumerate(rules) if r.policy == name]
        with_literals = [rule for _, rule in mine if rule.literals]
        for mapping in sorted({Mapping(rule.normalize, rule.boundary) for rule in with_literals}):
            if mapping not in mappings:
                mappings.append(mapping)
            literals = [
                (i, rule.literals)
                for i, rule in mine
                if Mapping(rule.normalize, rule.boundary) == mapping
            ]
            automaton = _build(
                mapping, literals, rank, group, num_entries, policies.policies[name].source
            )
            num_entries += automaton.packed.size
            tracks.append((len(automata), False))
            if automaton.twin:
                tracks.append((len(automata), True))
            automata.append(automaton)
        regex_rules = [(i, regex) for i, rule in mine for regex in regexes_of(rule)]
        # What only observes holds no text back: apart from what withholds.
        withheld = {regex for i, regex in regex_rules if rules[i].group != OBSERVE}
        observed = {regex: None for _, regex in regex_rules if regex not in withheld}
        for track in (
            *tracks_of([regex for _, regex in regex_rules if regex in withheld]),
            *tracks_of(list(observed)),
        ):
            automaton = _build_regexes(track, regex_rules, rank, group, num_entries)
            if automaton.mapping not in mappings:
                mappings.append(automaton.mapping)
            num_entries += automaton.packed.size
            tracks.append((len(automata), False))
            if automaton.twin:
                tracks.append((len(automata), True))
            automata.append(automaton)
        if 4 * num_entries > MAX_TABLE_BYTES:
            raise PolicyError(
                f"{policies.policies[name].source}: with its regexes the transition tables are "
                f"larger than {MAX_TABLE_BYTES >> 20} MiB, the limit of this version. Drop some."
            )
        policy_tracks.append(len(tracks))

    tables = _join(vocabulary, mappings, automata, tracks, policy_tracks, rank)
    return Program(
        table,
        tables,
        policies.sha256,
        time.perf_counter() - started,
        int(np.diff(tables.policy_tracks).max()),
        max(a.longest for a in automata),
        tuple(automata),
        tuple(index for index, _ in tracks),
    )


def _build(
    mapping: Mapping,
    literals: list[tuple[int, tuple[str, ...]]],
    rank: np.ndarray,
    group: np.ndarray,
    base: int,
    source: str,
) -> _Automaton:
    found = [mapping.all_patterns(of_rule) for _, of_rule in literals]
    patterns = [pattern for of_rule in found for pattern in of_rule]
    rules = np.array([rule for rule, _ in literals], np.int32)
    pattern_rule = np.repeat(rules, [len(of_rule) for of_rule in found])
    data = np.frombuffer(bytearray(b"".join(patterns)), np.uint8)
    offsets = np.concatenate(
        [np.zeros(1, np.int64), np.cumsum(np.fromiter(map(len, patterns), np.int64))]
    )
    # A class of its own for separators, though no pattern may hold one: they begin words.
    every = np.append(data, np.uint8(SEPARATOR_BYTE)) if mapping.separators else data
    class_of, num_classes = byte_classes(every)
    most = (MAX_TABLE_BYTES - 4 * base) // (4 * COLD_FIELDS)
    label, children, end_state = build_trie(
        data, offsets, sort_patterns(data, offsets), class_of, most
    )
    if not len(label):
        raise PolicyError(
            f"{source}: {len(patterns):,} patterns of {len(data):,} bytes need {int(children[0]):,} "
            f"states; allowed: {most:,} ({MAX_TABLE_BYTES >> 20} MiB of tables). Split the list "
            f"over several policies, or drop long patterns."
        )
    num_states = len(label)
    num_hot = num_states
    if 4 * (base + num_states * num_classes) > DENSE_BYTES:
        num_hot = min(num_states - 1, max(1, HOT_BYTES // (4 * num_classes)))
    separator = int(class_of[SEPARATOR_BYTE]) if mapping.separators else -1
    # A separator begins a word as well as the mark does.
    alias = separator if mapping.wrap else -1
    failure, rows = link_trie(
        label, children, num_hot, num_classes, alias, int(class_of[AFTER_NONWORD])
    )
    groups = accepting_groups(end_state, pattern_rule, group, failure)
    packed = pack_rows(rows, groups, label, base, separator)
    start = int(packed[class_of[AFTER_NONWORD]]) & STATE_MASK if mapping.wrap else base
    cold, accepts = np.zeros(0, np.uint32), np.zeros(0, np.int32)
    place = np.arange(num_states, dtype=np.int32)
    num_places = num_states
    quiet = np.zeros(num_states, np.int32)
    if num_hot < num_states:
        cold = pack_cold(label, children, failure, groups, num_hot, num_classes, base)
        accepts = np.flatnonzero(groups).astype(np.int32)
        place = np.where(groups, np.cumsum(groups != 0), 0).astype(np.int32)
        num_places = len(accepts) + 1
        quiet = np.zeros(num_places, np.int32)
        groups = np.concatenate([np.zeros(1, np.uint8), groups[accepts]])
    elif mapping.wrap:
        ends = [BEFORE_NONWORD, SEPARATOR_BYTE] if mapping.separators else [BEFORE_NONWORD]
        packed, quiet = _add_quiet_states(packed, num_classes, class_of[ends])
    first, following, suffix, best = collect_outputs(
        place, num_places, end_state, pattern_rule, rank, failure
    )
    more = len(quiet) - num_places
    length = np.diff(offsets) - mapping.wrap
    return _Automaton(
        mapping, data, offsets, pattern_rule, class_of, packed, num_states + more, num_classes,
        failure, np.pad(first, (0, more), constant_values=-1), following, np.pad(suffix, (0, more)),
        np.pad(best, (0, more), constant_values=-1), np.pad(groups, (0, more)), quiet, length, start,
        int(length.max()) + mapping.wrap, mapping.wrap, cold=cold, accepts=accepts,
    )  # fmt: skip


def _build_regexes(
    track: RegexTrack,
    regex_rules: list[tuple[int, Regex]],
    rank: np.ndarray,
    group: np.ndarray,
    base: int,
) -> _Automaton:
    dfa, no_bytes = track.dfa, np.zeros(0, np.uint8)
    num_states, num_classes = dfa.goto.shape
    rules = [[i for i, owned in regex_rules if owned == regex] for regex in track.regexes]
    out = outputs_of(dfa, rules, rank, group)
    # Characters, not raw bytes: to a reader a broken byte is a U+FFFD, which classes may take.
    mapping = Mapping((), "word") if track.marks else Mapping(characters=True)
    return _Automaton(
        mapping, no_bytes, np.zeros(1, np.int64), out.pattern_rule, dfa.class_of,
        pack_rows(dfa.goto, out.groups, np.zeros(0, np.uint8), base, -1), num_states, num_classes,
        np.zeros(num_states, np.int32), out.first_pattern, out.next_pattern,
        np.zeros(num_states, np.int32), out.best_rule, out.groups,
        np.where(dfa.idle, -1, dfa.quiet).astype(np.int32), out.pattern_length,
        base + dfa.start * num_classes, track.longest, track.marks or track.starts, regex=True,
    )  # fmt: skip


def _add_quiet_states(
    packed: np.ndarray, num_classes: int, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Copy each state in which a word lacks only what ends it; the copy's move on that is silent.

    A prompt that ends in a whole word leaves its track in such a copy: whatever follows closes that
    word, which the model did not write, and longer patterns go on.
    packed  uint32[num_states * num_classes]; ends: byte classes of what ends words.
    Returns the same with the copies behind, and int32[num_states]: the copy of each state, 0 = none.
    """
    rows = packed.reshape(-1, num_classes)
    closed = np.flatnonzero((rows[:, ends] >> 31).any(axis=1))
    copies = rows[closed].copy()
    copies[:, ends] &= STATE_MASK
    quiet = np.zeros(len(rows) + len(closed), np.int32)
    quiet[closed] = len(rows) + np.arange(len(closed))
    return np.concatenate([packed, copies.reshape(-1)]), quiet


def _join(
    vocabulary: Vocabulary,
    mappings: list[Mapping],
    automata: list[_Automaton],
    tracks: list[tuple[int, bool]],
    policy_tracks: list[int],
    rank: np.ndarray,
) -> Tables:
    mapped = tuple(m for m in mappings if not m.is_identity)
    characters = character_tables(mapped)
    token_offsets = np.zeros((len(mappings), len(vocabulary) + 1), np.int32)
    token_data: list[np.ndarray] = []
    pending = np.zeros(len(vocabulary), np.uint32)
    used = 0
    for m, mapping in enumerate(mappings):
        if mapping.is_identity:
            data, offsets = vocabulary.data, vocabulary.offsets
        else:
            data, offsets, pending = map_tokens(
                vocabulary.data, vocabulary.offsets, int(mapping.separators),
                characters.page_of[mapped.index(mapping)], characters.entries,
                characters.map_offsets, characters.map_data,
            )  # fmt: skip
        token_offsets[m] = offsets + used
        token_data.append(data)
        used += len(data)

    bases = np.cumsum([0] + [a.packed.size for a in automata])
    cold = np.cumsum([0] + [a.num_cold for a in automata])
    places = np.cumsum([0] + [len(a.groups) for a in automata])
    accepts = np.cumsum([0] + [len(a.accepts) for a in automata])
    patterns = np.cumsum([0] + [len(a.pattern_rule) for a in automata])

    def shift(array: np.ndarray, by: int) -> np.ndarray:
        return np.where(array >= 0, array + by, array).astype(np.int32)

    def per_track(values: list[int] | np.ndarray) -> np.ndarray:
        return np.array([values[index] for index, _ in tracks], np.int64)

    tables = Tables(
        trans=np.concatenate([a.packed for a in automata]),
        cold=np.concatenate([a.cold for a in automata]),
        class_of=np.stack([automata[index].class_of for index, _ in tracks]),
        track_base=per_track(bases),
        track_classes=per_track([a.num_classes for a in automata]),
        track_limit=per_track(bases[1:]),
        track_cold=per_track(cold),
        track_num_cold=per_track([a.num_cold for a in automata]),
        track_places=per_track(places),
        track_accepts=np.stack([per_track(accepts), per_track(accepts[1:])], axis=1),
        accepts=np.concatenate([a.accepts for a in automata]),
        track_mapping=per_track([mappings.index(a.mapping) for a in automata]),
        track_start=per_track([a.start for a in automata]),
        track_twin=np.array([twin for _, twin in tracks], np.uint8),
        policy_tracks=np.array(policy_tracks, np.int64),
        first_pattern=np.concatenate(
            [shift(a.first_pattern, n) for a, n in zip(automata, patterns, strict=False)]
        ),
        next_pattern=np.concatenate(
            [shift(a.next_pattern, n) for a, n in zip(automata, patterns, strict=False)]
        ),
        suffix_link=np.concatenate([a.suffix_link for a in automata]),
        best_rule=np.concatenate([a.best_rule for a in automata]),
        groups=np.concatenate([a.groups for a in automata]),
        quiet=np.concatenate([a.quiet for a in automata]),
        pattern_rule=np.concatenate([a.pattern_rule for a in automata]),
        pattern_length=np.concatenate([a.pattern_length for a in automata]).astype(np.int32),
        rule_rank=rank,
        token_offsets=token_offsets,
        token_data=np.concatenate(token_data),
        token_walk=np.zeros((len(vocabulary), len(tracks)), np.int64),
        token_sync=np.zeros((len(policy_tracks) - 1, len(vocabulary)), np.int64),
        calm=np.zeros(0, np.uint8),
        token_pending=pending,
        token_special=vocabulary.special,
        raw_offsets=vocabulary.offsets,
        raw_data=vocabulary.data,
        mapping_form=np.array(
            [-1 if m.is_identity else mapped.index(m) for m in mappings], np.int64
        ),
        mapping_wrap=np.array([m.wrap for m in mappings], np.int64),
        mapping_shrinks=np.array([m.separators + 2 * m.deletes for m in mappings], np.int64),
        page_of=characters.page_of,
        entries=characters.entries,
        map_offsets=characters.map_offsets,
        map_data=characters.map_data,
        track_regex=np.array([automata[index].regex for index, _ in tracks], np.uint8),
    )
    packed = pack_tables(tables)
    for track, (_, twin) in enumerate(tracks):
        if twin:
            tables.token_walk[:, track] = tables.token_walk[:, track - 1]
        else:
            walk_tokens(address(packed), track, tables.token_walk)
    calm = [np.zeros(0, np.uint8)]
    for policy, (lo, hi) in enumerate(pairwise(policy_tracks)):
        apart = np.array([track for track in range(lo, hi) if not tracks[track][1]], np.int64)
        rows = _sync(tables, address(packed), apart, tables.token_sync[policy])
        tables.token_sync[policy][tables.token_sync[policy] >= 0] += sum(map(len, calm))
        calm.append(rows.reshape(-1))
    return tables._replace(calm=np.concatenate(calm))


def _sync(tables: Tables, packed: int, tracks: np.ndarray, token_sync: np.ndarray) -> np.ndarray:
    """Fill in `Tables.token_sync` of a policy and return its rows of `calm`, from where 0 is.

    tracks  int64[]: of the policy, without twins, which are in step with the track before them if
    both are in step with the root.
    """
    walks = tables.token_walk[:, tracks]
    ordinary = np.flatnonzero(~(walks >> 31 & 1).any(axis=1))
    walks = walks[ordinary]
    states, row = distinct_rows(walks & STATE_MASK)
    for width in (*WIDTHS, 1):
        firsts = [first_classes(packed, track, ordinary, width) for track in tracks.tolist()]
        classes, column = distinct_rows(np.concatenate(firsts, axis=1))
        if len(states) * len(classes) <= 8 * CALM_BYTES:
            break
    calm = np.full((len(states), (len(classes) + 7) // 8), 0xFF, np.uint8)
    for k, track in enumerate(tracks.tolist()):
        mine, which = np.unique(states[:, k], return_inverse=True)
        first = np.ascontiguousarray(classes[:, width * k : width * (k + 1)])
        calm &= find_calm(packed, track, mine, first)[which]
    token_sync[:] = -1
    token_sync[ordinary] = row * calm.shape[1] | column << 32
    return calm


def distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of int64[num_rows, width], and which of them each row is.

    By hash, since sorting whole rows takes ten times as long; a collision would be noticed.
    """
    factors = np.random.default_rng(0).integers(1, 1 << 62, rows.shape[1], np.int64) | 1
    _, first, which = np.unique(rows @ factors, return_index=True, return_inverse=True)
    if (rows[first][which] == rows).all():
        return np.ascontiguousarray(rows[first]), which
    found, which = np.unique(rows, axis=0, return_inverse=True)
    return found, which.reshape(-1)
