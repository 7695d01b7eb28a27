"""Compile a set of policies against a vocabulary into the frozen tables that every engine walks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from streamguard.compiler.automaton import MAX_TABLE_BYTES, Automaton, build_literals, build_regexes
from streamguard.compiler.mapping import Mapping, character_tables
from streamguard.compiler.regexes import tracks_of
from streamguard.compiler.rules import MASK, OBSERVE, STOP, CompiledRule, RuleTable
from streamguard.compiler.shortcuts import synchronise
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.errors import PolicyError
from streamguard.policy import PolicySet, Rule
from streamguard.policy_regexes import regexes_of
from streamguard_kernels.hold import UNKNOWN, hold_depths
from streamguard_kernels.lookahead import (
    Ranges,
    build_own_ranges,
    quiet_ranges,
    token_order,
    tokens_with_whole_patterns,
)
from streamguard_kernels.packing import address
from streamguard_kernels.shortcuts import walk_tokens
from streamguard_kernels.tables import LOOK_CLOSER, NO_TAIL, Tables, pack_tables
from streamguard_kernels.utf8 import NUM_PREFIXES, map_tokens

#: A regex takes about as long to compile as so many literals.
_REGEX = 30_000


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
    _automata: tuple[Automaton, ...] = field(repr=False)
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
                shortest: int, automaton: Automaton = automaton, wanted: np.ndarray = wanted,
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


def compile_program(
    policies: PolicySet,
    vocabulary: Vocabulary | None = None,
    *,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Program:
    """Build the automata of all policies over one vocabulary (None: to scan text only).

    on_progress  is told now and then what share is done: 0 to 1.
    Raises PolicyError if the tables would exceed MAX_TABLE_BYTES.
    """
    started = time.perf_counter()
    work = _Work(policies, on_progress)
    vocabulary = vocabulary or Vocabulary.empty()
    table = RuleTable.from_policies(policies, vocabulary)
    names, rules = table.policies, table.rules
    rank = np.array([r.rank for r in rules], np.int32)
    group = np.array([r.group for r in rules], np.uint8)

    mappings: list[Mapping] = []
    automata: list[Automaton] = []
    tracks: list[tuple[int, bool]] = []  # automaton, twin
    policy_tracks = [0]
    num_entries = 0
    for name in names:
        mine = [(i, r.rule) for i, r in enumerate(rules) if r.policy == name]
        for mapping, literals in _literals_of(mine).items():
            if mapping not in mappings:
                mappings.append(mapping)
            automaton = build_literals(
                mapping, literals, rank, group, num_entries, policies.policies[name].source,
                work.part(sum(len(found) for _, found in literals)),
            )  # fmt: skip
            num_entries += automaton.packed.size
            tracks.append((len(automata), False))
            if automaton.twin:
                tracks.append((len(automata), True))
            automata.append(automaton)
        regex_rules = [(i, regex) for i, rule in mine for regex in regexes_of(rule)]
        # What only observes holds no text back: apart from what withholds.
        withheld = {regex for i, regex in regex_rules if rules[i].group != OBSERVE}
        observed = {regex: None for _, regex in regex_rules if regex not in withheld}
        held = [regex for _, regex in regex_rules if regex in withheld]
        for track in (
            *tracks_of(held, work.part(_REGEX * len(held))),
            *tracks_of(list(observed), work.part(_REGEX * len(observed))),
        ):
            automaton = build_regexes(track, regex_rules, rank, group, num_entries)
            if automaton.mapping not in mappings:
                mappings.append(automaton.mapping)
            num_entries += automaton.packed.size
            tracks.append((len(automata), False))
            if automaton.twin:
                tracks.append((len(automata), True))
            automata.append(automaton)
        if len(tracks) == policy_tracks[-1]:
            # Probe rules only: a track that never matches, so that every policy has one.
            nothing = Mapping((), "none")
            if nothing not in mappings:
                mappings.append(nothing)
            automata.append(
                build_literals(nothing, [], rank, group, num_entries, name, work.part(0))
            )
            num_entries += automata[-1].packed.size
            tracks.append((len(automata) - 1, False))
        if 4 * num_entries > MAX_TABLE_BYTES:
            raise PolicyError(
                f"{policies.policies[name].source}: with its regexes the transition tables are "
                f"larger than {MAX_TABLE_BYTES >> 20} MiB, the limit of this version. Drop some."
            )
        policy_tracks.append(len(tracks))

    tables = _join(vocabulary, mappings, automata, tracks, policy_tracks, rank)
    on_progress(1.0)
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


class _Work:
    """Turns the shares of parts into the share of the whole; the tokens' part is left out as small."""

    def __init__(self, policies: PolicySet, on_progress: Callable[[float], None]) -> None:
        rules = [rule for policy in policies.policies.values() for rule in policy.rules]
        units = sum(len(rule.literals) + _REGEX * len(rule.regexes) for rule in rules)
        self._total, self._done, self._tell = max(units, 1), 0, on_progress

    def part(self, units: int) -> Callable[[float], None]:
        """What is told the share of the next part, of so many literals, as it is worked on."""
        begun, self._done = self._done, self._done + units
        return lambda share: self._tell((begun + share * units) / self._total)


def _join(
    vocabulary: Vocabulary,
    mappings: list[Mapping],
    automata: list[Automaton],
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
        calm=np.zeros(0, np.uint32),
        calm_shape=np.zeros((len(policy_tracks) - 1, 4), np.int64),
        calm_rows=np.zeros(0, np.int64),
        character_page=np.zeros((len(policy_tracks) - 1, 1 + NUM_PREFIXES), np.int32),
        character_sync=np.zeros(0, np.int64),
        token_pending=pending,
        token_tail=_tails(vocabulary),
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
    calm, calm_rows = [np.zeros(0, np.uint32)], [np.zeros(0, np.int64)]
    pages = {np.full(NO_TAIL + 1, LOOK_CLOSER, np.int64).tobytes(): 0}
    for policy, (lo, hi) in enumerate(pairwise(policy_tracks)):
        apart = np.array([track for track in range(lo, hi) if not tracks[track][1]], np.int64)
        found = synchronise(
            tables, address(packed), policy, apart, automata[tracks[lo][0]].failure,
            sum(map(len, calm)),
        )  # fmt: skip
        tables.calm_shape[policy] = found.shape
        tables.calm_shape[policy, 1] = sum(map(len, calm_rows))
        calm.append(found.rows)
        calm_rows.append(found.at)
        for number, entries in enumerate(found.pages):
            page = pages.setdefault(entries.tobytes(), len(pages))
            tables.character_page[policy, number] = (NO_TAIL + 1) * page
    return tables._replace(
        calm=np.concatenate(calm),
        calm_rows=np.concatenate(calm_rows),
        character_sync=np.frombuffer(bytearray(b"".join(pages)), np.int64),
    )


def _literals_of(rules: list[tuple[int, Rule]]) -> dict[Mapping, list[tuple[int, tuple[str, ...]]]]:
    """A policy's literals by mapping, with the indices of their rules.

    Literals without forms are looked for in bytes where all rules are such, and else in characters,
    which is the same but for broken ones: then all tracks stand between the same characters.
    """
    found: dict[Mapping, list[tuple[int, tuple[str, ...]]]] = {}
    for i, rule in rules:
        if rule.literals:
            mapping = Mapping(rule.normalize, rule.boundary)
            found.setdefault(mapping, []).append((i, rule.literals))
    if Mapping() in found and (len(found) > 1 or any(rule.regexes for _, rule in rules)):
        found[Mapping(characters=True)] = found.pop(Mapping())
    return dict(sorted(found.items()))


def _tails(vocabulary: Vocabulary) -> np.ndarray:
    """`Tables.token_tail`."""
    single = (np.diff(vocabulary.offsets) == 1) & (vocabulary.special == 0)
    byte = vocabulary.data[vocabulary.offsets[:-1][single]]
    tails = np.full(len(vocabulary), NO_TAIL, np.uint8)
    tails[single] = np.where(byte & 0xC0 == 0x80, byte & 0x3F, NO_TAIL)
    return tails
