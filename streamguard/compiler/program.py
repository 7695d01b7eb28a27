"""Compile a set of policies against a vocabulary into the frozen tables that every engine walks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from streamguard.compiler.mapping import Mapping, character_tables
from streamguard.compiler.regex_outputs import outputs_of
from streamguard.compiler.regexes import Regex, RegexTrack, tracks_of
from streamguard.compiler.rules import MASK, STOP, CompiledRule, RuleTable
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.errors import PolicyError
from streamguard.policy import PolicySet
from streamguard.policy_regexes import regexes_of
from streamguard_kernels.advance import Tables, token_shortcuts
from streamguard_kernels.automaton import (
    build_trie,
    byte_classes,
    collect_outputs,
    fold_failure_links,
    pack_transitions,
)
from streamguard_kernels.lookahead import (
    Ranges,
    build_own_ranges,
    token_order,
    tokens_with_whole_patterns,
)
from streamguard_kernels.utf8 import AFTER_NONWORD, map_tokens

#: Most bytes that the transition tables of one policy set may take.
MAX_TABLE_BYTES = 1 << 30


@dataclass(frozen=True)
class _Automaton:
    """One track's own tables, before they are joined.

    start    entry of the state at the start of a text. longest: mapped bytes of its longest match.
    twin     whether a second track reads the output as a text of its own.
    regex    whether it was made from regexes: it has no pattern bytes and no failure links then.
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
    pattern_length: np.ndarray
    start: int
    longest: int
    twin: bool
    regex: bool = False


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

    @property
    def num_states(self) -> int:
        return len(self.tables.groups)

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

    def states_of_track(self, track: int) -> int:
        """Number of states of a track's automaton."""
        return self._automata[self._track_automaton[track]].num_states

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
    def _orders(self) -> list[np.ndarray]:
        t = self.tables
        return [token_order(offsets, t.token_data, t.token_special) for offsets in t.token_offsets]

    def _ranges(self, group: int) -> Ranges:
        t = self.tables
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
            base = int(t.track_base[track])
            mapping = int(t.track_mapping[track])
            tokens, offsets = orders[mapping], t.token_offsets[mapping]
            if automaton.regex:  # `regex_masks` finds its tokens; there are no ranges
                own_base.append(num_offsets)
                state_base.append(num_states)
                own_offsets.append(np.full(automaton.num_states + 1, num_own, np.int64))
                own.append(np.zeros((0, 2), np.int32))
                links.append(np.zeros(automaton.num_states, np.int32))
                whole.append(np.zeros(0, np.int32))
                whole_span.append((num_whole, num_whole))
                num_states += automaton.num_states
                num_offsets += automaton.num_states + 1
                continue
            wanted = (rule_group[automaton.pattern_rule] & group).astype(np.uint8)
            track_offsets, track_own, track_link = build_own_ranges(
                automaton.pattern_data, automaton.pattern_offsets, wanted, t.trans, base,
                automaton.num_classes, automaton.num_states, automaton.class_of,
                automaton.failure, tokens, offsets, t.token_data,
            )  # fmt: skip
            track_whole = tokens_with_whole_patterns(
                t.trans, base, automaton.num_classes, automaton.class_of, t.groups,
                int(t.track_states[track]), group, tokens, offsets, t.token_data,
            )  # fmt: skip
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
                (i, literal)
                for i, rule in mine
                if Mapping(rule.normalize, rule.boundary) == mapping
                for literal in rule.literals
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
        for track in tracks_of([regex for _, regex in regex_rules]):
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
    literals: list[tuple[int, str]],
    rank: np.ndarray,
    group: np.ndarray,
    base: int,
    source: str,
) -> _Automaton:
    patterns = [mapping.pattern(literal) for _, literal in literals]
    pattern_rule = np.array([rule for rule, _ in literals], np.int32)
    data = np.frombuffer(bytearray(b"".join(patterns)), np.uint8)
    offsets = np.concatenate(
        [np.zeros(1, np.int64), np.cumsum(np.fromiter(map(len, patterns), np.int64))]
    )
    class_of, num_classes = byte_classes(data)
    max_states = (MAX_TABLE_BYTES // 4 - base) // num_classes
    goto, end_state = build_trie(data, offsets, class_of, num_classes, max_states)
    if not len(goto):
        raise PolicyError(
            f"{source}: {len(patterns)} patterns of {len(data)} bytes need a transition table above "
            f"{MAX_TABLE_BYTES >> 20} MiB, the limit of this version. Split the list, drop long "
            f"patterns, or give fewer distinct characters."
        )
    failure = fold_failure_links(goto)
    first, following, suffix, best, groups = collect_outputs(
        len(goto), end_state, pattern_rule, rank, group, failure
    )
    packed = pack_transitions(goto, groups, base)
    start = int(packed[class_of[AFTER_NONWORD]]) & 0x7FFFFFFF if mapping.wrap else base
    length = np.diff(offsets) - mapping.wrap
    return _Automaton(
        mapping, data, offsets, pattern_rule, class_of, packed, len(goto), num_classes, failure,
        first, following, suffix, best, groups, length, start, int(length.max()) + mapping.wrap,
        mapping.wrap,
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
        pack_transitions(dfa.goto, out.groups, base), num_states, num_classes,
        np.zeros(num_states, np.int32), out.first_pattern, out.next_pattern,
        np.zeros(num_states, np.int32), out.best_rule, out.groups, out.pattern_length,
        base + dfa.start * num_classes, track.longest, track.marks or track.starts, regex=True,
    )  # fmt: skip


def _join(
    vocabulary: Vocabulary,
    mappings: list[Mapping],
    automata: list[_Automaton],
    tracks: list[tuple[int, bool]],
    policy_tracks: list[int],
    rank: np.ndarray,
) -> Tables:
    forms = tuple(dict.fromkeys(m.normalize for m in mappings if not m.is_identity))
    characters = character_tables(forms)
    token_offsets = np.zeros((len(mappings), len(vocabulary) + 1), np.int32)
    token_data: list[np.ndarray] = []
    pending = np.zeros(len(vocabulary), np.uint32)
    used = 0
    for m, mapping in enumerate(mappings):
        if mapping.is_identity:
            data, offsets = vocabulary.data, vocabulary.offsets
        else:
            data, offsets, pending = map_tokens(
                vocabulary.data, vocabulary.offsets, int(mapping.wrap),
                characters.page_of[forms.index(mapping.normalize)], characters.entries,
                characters.map_offsets, characters.map_data,
            )  # fmt: skip
        token_offsets[m] = offsets + used
        token_data.append(data)
        used += len(data)

    bases = np.cumsum([0] + [a.packed.size for a in automata])
    states = np.cumsum([0] + [a.num_states for a in automata])
    patterns = np.cumsum([0] + [len(a.pattern_rule) for a in automata])

    def shift(array: np.ndarray, by: int) -> np.ndarray:
        return np.where(array >= 0, array + by, array).astype(np.int32)

    def per_track(values: list[int] | np.ndarray) -> np.ndarray:
        return np.array([values[index] for index, _ in tracks], np.int64)

    trans = np.concatenate([a.packed for a in automata])
    all_token_data = np.concatenate(token_data)
    shortcuts = [
        token_shortcuts(
            trans, base, automaton.class_of, token_offsets[mappings.index(automaton.mapping)],
            all_token_data, pending, vocabulary.special,
        )
        for base, automaton in zip(bases, automata, strict=False)
    ]  # fmt: skip
    return Tables(
        trans=trans,
        class_of=np.stack([automata[index].class_of for index, _ in tracks]),
        track_base=per_track(bases),
        track_classes=per_track([a.num_classes for a in automata]),
        track_states=per_track(states),
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
        pattern_rule=np.concatenate([a.pattern_rule for a in automata]),
        pattern_length=np.concatenate([a.pattern_length for a in automata]).astype(np.int32),
        rule_rank=rank,
        token_offsets=token_offsets,
        token_data=all_token_data,
        token_end=np.stack([shortcuts[index][0] for index, _ in tracks]),
        token_class=np.stack([shortcuts[index][1] for index, _ in tracks]),
        token_pending=pending,
        token_special=vocabulary.special,
        raw_offsets=vocabulary.offsets,
        raw_data=vocabulary.data,
        mapping_form=np.array(
            [-1 if m.is_identity else forms.index(m.normalize) for m in mappings], np.int64
        ),
        mapping_wrap=np.array([m.wrap for m in mappings], np.int64),
        page_of=characters.page_of,
        entries=characters.entries,
        map_offsets=characters.map_offsets,
        map_data=characters.map_data,
        track_regex=np.array([automata[index].regex for index, _ in tracks], np.uint8),
    )
