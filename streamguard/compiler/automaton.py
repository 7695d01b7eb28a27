"""One track's automaton, from the literals of a mapping or from regexes, before tracks are joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from streamguard.compiler.mapping import Mapping
from streamguard.compiler.regex_outputs import outputs_of
from streamguard.compiler.regexes import Regex, RegexTrack
from streamguard.errors import PolicyError
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
from streamguard_kernels.tables import STATE_MASK
from streamguard_kernels.utf8 import AFTER_NONWORD, BEFORE_NONWORD, SEPARATOR_BYTE

#: Most bytes that the transition tables of one policy set may take.
MAX_TABLE_BYTES = 1 << 30
#: A track's table is dense as long as all dense ones fit in here; else packed, with rows for as many
#: states as fit in here. More rows gain nothing: only the shallow states are visited often.
DENSE_BYTES = 256 << 20
HOT_BYTES = 32 << 20


@dataclass(frozen=True)
class Automaton:
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


def build_literals(
    mapping: Mapping,
    literals: list[tuple[int, tuple[str, ...]]],
    rank: np.ndarray,
    group: np.ndarray,
    base: int,
    source: str,
    on_progress: Callable[[float], None],
) -> Automaton:
    """The automaton of all literals of a mapping.

    literals  per rule its global index and its literals; no rule makes an automaton of one state.
    rank int32, group uint8[num_rules].
    base      entries of the tables before this one; source: whose policy it is, for errors.
    on_progress  is told what share is done. Raises PolicyError beyond MAX_TABLE_BYTES.
    """
    found = [mapping.all_patterns(of_rule) for _, of_rule in literals]
    rules = np.array([rule for rule, _ in literals], np.int32)
    pattern_rule = np.repeat(rules, [len(lengths) for _, lengths in found])
    data = np.frombuffer(bytearray(b"".join([pattern_data for pattern_data, _ in found])), np.uint8)
    offsets = np.concatenate([np.zeros(1, np.int64), *(lengths for _, lengths in found)]).cumsum()
    # A class of its own for separators, though no pattern may hold one: they begin words.
    every = np.append(data, np.uint8(SEPARATOR_BYTE)) if mapping.separators else data
    class_of, num_classes = byte_classes(every)
    most = (MAX_TABLE_BYTES - 4 * base) // (4 * COLD_FIELDS)
    on_progress(0.3)
    order = sort_patterns(data, offsets)
    on_progress(0.5)
    label, children, end_state = build_trie(data, offsets, order, class_of, most)
    if not len(label):
        raise PolicyError(
            f"{source}: {len(pattern_rule):,} patterns of {len(data):,} bytes need {int(children[0]):,} "
            f"states; allowed: {most:,} ({MAX_TABLE_BYTES >> 20} MiB of tables). Split the list "
            f"over several policies, or drop long patterns."
        )
    on_progress(0.7)
    num_states = len(label)
    num_hot = num_states
    if 4 * (base + num_states * num_classes) > DENSE_BYTES:
        num_hot = max(1, min(num_states - 1, HOT_BYTES // (4 * num_classes)))
    separator = int(class_of[SEPARATOR_BYTE]) if mapping.separators else -1
    # A separator begins a word as well as the mark does.
    alias = separator if mapping.wrap else -1
    failure, rows = link_trie(
        label, children, num_hot, num_classes, alias, int(class_of[AFTER_NONWORD])
    )
    on_progress(0.8)
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
    on_progress(1.0)
    more = len(quiet) - num_places
    length = np.diff(offsets) - mapping.wrap
    return Automaton(
        mapping, data, offsets, pattern_rule, class_of, packed, num_states + more, num_classes,
        failure, np.pad(first, (0, more), constant_values=-1), following, np.pad(suffix, (0, more)),
        np.pad(best, (0, more), constant_values=-1), np.pad(groups, (0, more)), quiet, length, start,
        int(length.max(initial=0)) + mapping.wrap, mapping.wrap, cold=cold, accepts=accepts,
    )  # fmt: skip


def build_regexes(
    track: RegexTrack,
    regex_rules: list[tuple[int, Regex]],
    rank: np.ndarray,
    group: np.ndarray,
    base: int,
) -> Automaton:
    dfa, no_bytes = track.dfa, np.zeros(0, np.uint8)
    num_states, num_classes = dfa.goto.shape
    rules = [[i for i, owned in regex_rules if owned == regex] for regex in track.regexes]
    out = outputs_of(dfa, rules, rank, group)
    # Characters, not raw bytes: to a reader a broken byte is a U+FFFD, which classes may take.
    mapping = Mapping((), "word") if track.marks else Mapping(characters=True)
    return Automaton(
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
