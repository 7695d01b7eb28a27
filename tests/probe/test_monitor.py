"""The host's monitor: against the definition of what it does, and inside a RowGuard."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guard_cases import vocabulary
from probes import make_probe, save_probe
from score_schedule import LIMIT, Request, Schedule, policies, rule_table, statistics

from streamguard.compiler.program import compile_program
from streamguard.compiler.rules import OBSERVE, RuleTable
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.errors import ProbeError, ShapeError
from streamguard.metrics import SCORE_BOUNDS
from streamguard.policy import Policy, PolicySet
from streamguard.probe.aggregation import Aggregation
from streamguard.probe.artifact import Probe
from streamguard.probe.columns import ProbeTable
from streamguard.probe.monitor import Monitor
from streamguard.row_guard import Fired, RowGuard
from streamguard.verdict import FAILED, VerdictCodes

NUM_SLOTS = 5


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> RuleTable:
    return rule_table(tmp_path_factory.mktemp("probes"))


def naive(
    table: RuleTable, columns: ProbeTable, request: Request, last: int
) -> tuple[set[int], bool]:
    """What fires with the sample behind position `last`, and whether the text has failed by then."""
    name = table.policies[request.policy]
    mine = [(i, r) for i, r in enumerate(table.rules) if r.policy == name and r.rule.probe]
    read = 0 if columns.reads_prompt(request.policy) else request.prompt_len

    def spans(stage: str) -> tuple[int, int]:
        first, end = (0, request.prompt_len) if stage == "prompt" else (request.prompt_len, LIMIT)
        return first, min(end, last + 1)

    broken = LIMIT
    for _, compiled in mine:
        probe = compiled.rule.probe
        assert probe is not None
        column = columns.column_offset[probe.sha256] + probe.column
        first, end = spans(probe.stage)
        bad = [p for p in range(first, end) if not np.isfinite(request.scores[p, column])]
        broken = min([broken, *bad])
    if mine and read <= request.lost <= last:
        broken = min(broken, request.lost)
    fired = set()
    for index, compiled in mine:
        probe = compiled.rule.probe
        assert probe is not None
        column = columns.column_offset[probe.sha256] + probe.column
        first, end = spans(probe.stage)
        running = statistics(
            probe.aggregation, request.scores[first : min(end, broken), column].tolist()
        )
        above, crossings = False, []
        for i, statistic in enumerate(running):
            if i + 1 < probe.aggregation.warmup:
                continue
            if statistic >= probe.threshold:
                crossings += [] if above else [first + i]
                above = True
            elif statistic < probe.threshold - probe.hysteresis:
                above = False
        if compiled.group != OBSERVE:
            fires = bool(crossings)
        elif probe.stage == "prompt":
            fires = bool(crossings) and last == request.prompt_len - 1 < broken
        else:
            fires = last in crossings
        if fires:
            fired.add(index)
    return fired, broken <= last


def test_monitor_does_what_its_definition_says_on_random_schedules(
    table: RuleTable, seed: int
) -> None:
    columns = ProbeTable.from_table(table)
    rng = random.Random(seed)
    schedule, monitor = Schedule(columns, NUM_SLOTS, rng), Monitor(columns, NUM_SLOTS)
    seen = dict.fromkeys(("stops", "observed", "failed", "asked"), 0)
    for _ in range(2000):
        step = schedule.step()
        for reset in step.resets:
            monitor.reset(*reset)
        failed = monitor.feed(step.slots, step.starts, step.row_offsets, step.scores)
        asked = step.slots[step.valid]
        found = monitor.fired(asked)
        # Again, without new scores: stop rules only.
        again = [at for at in found if table.rules[at[1]].group != OBSERVE]
        assert monitor.fired(asked) == again
        for row, slot in enumerate(step.slots.tolist()):
            request = schedule.requests[slot]
            assert request is not None
            expected, broken = naive(table, columns, request, request.computed - 1)
            assert failed[row] == monitor.failed(slot) == broken, request
            seen["failed"] += broken
            if step.valid[row]:
                at = asked.tolist().index(slot)
                assert {rule for r, rule in found if r == at} == expected, request
                seen["asked"] += 1
                for rule in expected:
                    observes = table.rules[rule].group == OBSERVE
                    seen["observed" if observes else "stops"] += 1
    assert min(seen.values()) > 50, seen
    assert schedule.restarted > 50


def test_columns_of_all_probes_lie_side_by_side_and_each_probe_once(table: RuleTable) -> None:
    columns = ProbeTable.from_table(table)
    assert [len(probe.heads) for probe in columns.probes] == [5, 1, 5]
    assert list(columns.column_offset.values()) == [0, 5, 6]
    assert columns.num_columns == 11
    assert [columns.uses(p) for p in range(5)] == [True, True, False, True, True]
    assert [columns.reads_prompt(p) for p in range(5)] == [False, False, False, True, True]
    wide = table.policies.index("wide")
    names = [table.rules[i].rule.id for i in columns.rule[wide] if i >= 0]
    assert names == ["stop-sum", "see-sum", "see-mean", "one"]  # the most severe first
    assert columns.column[wide].tolist() == [4, 4, 1, 5]
    assert columns.stop[wide].tolist() == [True, False, False, False]


def test_a_table_without_probes_has_no_columns() -> None:
    rules = [{"id": "a", "literals": ["x"], "action": "halt"}]
    found = PolicySet.from_policies([Policy.from_dict({"version": 1, "rules": rules})])
    columns = ProbeTable.from_table(RuleTable.from_policies(found, Vocabulary.empty()))
    assert (columns.probes, columns.num_columns, columns.uses(0)) == ((), 0, False)


def test_probes_that_were_not_loaded_are_asked_for(tmp_path: Path) -> None:
    from dataclasses import replace

    found = policies(tmp_path).policies["default"]
    rules = tuple(
        replace(rule, probe=rule.probe and replace(rule.probe, probe=None)) for rule in found.rules
    )
    stored = PolicySet.from_policies([replace(found, rules=rules)])
    with pytest.raises(ProbeError, match=r'rule "see": the weights of out\.safetensors are not'):
        ProbeTable.from_table(RuleTable.from_policies(stored, Vocabulary.empty()))


def test_shapes_and_slots_that_do_not_fit_are_refused_before_anything_is_read(
    table: RuleTable,
) -> None:
    columns = ProbeTable.from_table(table)
    monitor = Monitor(columns, 2)
    monitor.reset(0, 0, 0)
    rows = np.ones((2, columns.num_columns), np.float32)
    for slots, starts, offsets, scores in (
        ([0], [0, 0], [0, 1], rows), ([0], [0], [0, 1, 2], rows), ([0], [0], [0, 3], rows),
        ([0], [0], [1, 0], rows), ([2], [0], [0, 1], rows), ([-1], [0], [0, 1], rows),
        ([0], [0], [0, 1], rows[:, 1:]), ([0], [0], [-1, 1], rows),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match="11 columns"):
            monitor.feed(slots, starts, offsets, scores)
    with pytest.raises(ShapeError, match=r"allowed: 0\.\.1 and 0\.\.4"):
        monitor.reset(0, 5, 0)
    with pytest.raises(ShapeError, match="at least 1 slot"):
        Monitor(columns, 0)
    rows.setflags(write=False)
    assert monitor.feed([0], [0], [0, 2], rows).tolist() == [False]


def test_finite_scores_whose_difference_is_not_are_no_failure(tmp_path: Path) -> None:
    save_probe(tmp_path, heads={"ema": Aggregation("ema", weight=0.5)})
    guard = row_guard(tmp_path, {"id": "p", "threshold": 1e30, "action": "halt"})
    guard.admit(0, (), policy="default", max_tokens=9)
    for position, score in enumerate((1e20, -3e38, 3e38, -3e38)):
        assert not feed(guard, 0, position, score)


# ------------------------------------------------------------------- inside a RowGuard

TOKENS = [b"bo", b"mb", b"x", b"no"]
SPECIALS = (b"<s>", b"</s>", *(f"<reserved {i}>".encode() for i in range(8)))
X = 2


def row_guard(folder: Path, *rules: dict[str, Any], probe: Probe | None = None) -> RowGuard:
    """A guard whose rules with a threshold read p.safetensors."""
    made = vocabulary(TOKENS, SPECIALS)
    spare = tuple(range(len(TOKENS) + 2, len(made)))
    words = Vocabulary(made.token_bytes, made.special, made.eos_token_ids, spare)
    entries = [{"probe": "p.safetensors", **r} if "threshold" in r else r for r in rules]
    found = Policy.from_dict({"version": 1, "rules": entries}, base_dir=folder)
    program = compile_program(PolicySet.from_policies([found]), words)
    codes = VerdictCodes.from_table(program.table, lambda _: [3], lambda _: "no")
    return RowGuard(program, codes, 3)


def feed(guard: RowGuard, slot: int, start: int, *scores: float, commits: bool = False) -> bool:
    rows = np.array(scores, np.float32)[:, None]
    return bool(guard.feed_scores([slot], [start], [0, len(rows)], rows, [commits])[0])


def decide(guard: RowGuard, slot: int, token: int = X) -> tuple[int, list[str]]:
    """The token that is left of a sampled one, and the rules that fired."""
    sampled = np.array([token])
    fired = guard.decide([slot], sampled)
    assert all(isinstance(entry, Fired) and entry.row == 0 for entry in fired)
    return int(sampled[0]), [guard.program.rules[entry.rule].rule.id for entry in fired]


WORD = {"id": "word", "literals": ["bomb"], "normalize": []}
SCORE = {"id": "score", "threshold": 1}
NO = {"message": "no"}


@pytest.mark.parametrize(
    ("word", "score", "winner"),
    [
        ({"action": "redirect", **NO}, {"action": "halt"}, "score"),
        ({"action": "halt"}, {"action": "redirect", **NO}, "word"),
        ({"action": "halt"}, {"action": "halt"}, "word"),
        ({"action": "mask"}, {"action": "redirect", **NO}, "score"),
        ({"action": "observe"}, {"action": "halt"}, "score"),
        ({"action": "halt"}, {"action": "observe"}, "word"),
    ],
)
def test_severity_decides_between_a_pattern_and_a_probe_and_both_count(
    word: dict[str, str], score: dict[str, str], winner: str, tmp_path: Path
) -> None:
    save_probe(tmp_path)
    guard = row_guard(tmp_path, {**WORD, **word}, {**SCORE, **score})
    guard.admit(0, (X,), policy="default", max_tokens=9)
    guard.commit([0], [0])  # bo
    assert not feed(guard, 0, 0, 0, 2)
    token, fired = decide(guard, 0, 1)  # mb
    rules = [rule.rule.id for rule in guard.program.rules]
    assert fired == ["word", "score"]
    assert token == guard.codes.scripts[rules.index(winner)][0]


def test_a_redirect_by_probe_says_its_message_and_is_not_disturbed(tmp_path: Path) -> None:
    save_probe(tmp_path)
    guard = row_guard(
        tmp_path, {**SCORE, "action": "redirect", **NO}, {"id": "see", "threshold": 2, "action": "observe"}
    )  # fmt: skip
    guard.admit(0, (X,), policy="default", max_tokens=9)
    assert not feed(guard, 0, 0, 9.0)  # of the prompt: not read
    assert decide(guard, 0) == (X, [])
    guard.commit([0], [X])
    assert not feed(guard, 0, 1, 1.0)
    script = guard.codes.scripts[0]
    token, fired = decide(guard, 0)
    assert (token, fired) == (script[0], ["score"])
    for step in range(1, len(script)):
        guard.commit([0], [token])
        assert not feed(guard, 0, 1 + step, 5.0)
        token, fired = decide(guard, 0)
        assert (token, fired) == (script[step], [])
    assert script[1:] == (3, guard.codes.stop_id)


def test_a_sample_that_is_thrown_away_leaves_the_alarm_standing(tmp_path: Path) -> None:
    save_probe(tmp_path)
    guard = row_guard(tmp_path, {**SCORE, "action": "halt"})
    guard.admit(0, (X,), policy="default", max_tokens=9)
    guard.commit([0], [X])
    feed(guard, 0, 0, 0.0, 1.0)
    halted = (guard.codes.scripts[0][0], ["score"])
    assert [decide(guard, 0) for _ in range(3)] == [halted] * 3
    feed(guard, 0, 0, 0.0, 1.0, -5.0)  # comes again, and more: latched
    assert decide(guard, 0) == halted


def test_an_observe_rule_counts_each_crossing_once_also_after_a_resume(tmp_path: Path) -> None:
    save_probe(tmp_path)
    guard = row_guard(tmp_path, {**SCORE, "action": "observe", "hysteresis": 0.5})
    scores = [9.0, 0.0, 1.0, 2.0, 0.5, 1.0, 0.25, 1.0]
    counts = [0, 0, 1, 0, 0, 0, 0, 1]
    guard.admit(0, (X,), policy="default", max_tokens=9)
    for position, score in enumerate(scores[:6]):
        assert not feed(guard, 0, position, score)
        assert decide(guard, 0) == (X, ["score"] * counts[position])
        guard.commit([0], [X])
    # Preempted with seven tokens, of which six had been read; a chunk of three comes first.
    guard.admit(1, (X,), policy="default", max_tokens=9, count_from=6)
    guard.commit([1] * 6, [X] * 6)
    assert not feed(guard, 1, 0, *scores[:3])
    assert decide(guard, 1) == (X, [])  # its sample is discarded
    assert feed(guard, 1, 3, commits=True)  # a sample must not be committed before all is read
    assert not feed(guard, 1, 3, *scores[3:7], commits=True)
    assert decide(guard, 1) == (X, [])
    guard.commit([1], [X])
    assert feed(guard, 1, 7, commits=True)
    assert not feed(guard, 1, 7, scores[7], commits=True)
    assert decide(guard, 1) == (X, ["score"])


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf"), None])
def test_scores_that_fail_are_left_to_on_error(score: float | None, tmp_path: Path) -> None:
    save_probe(tmp_path)
    guard = row_guard(tmp_path, {**SCORE, "action": "halt"}, {**WORD, "action": "halt"})
    assert guard.probe is not None
    for slot in (0, 1):
        guard.admit(slot, (), policy="default", max_tokens=9)
        failed = feed(guard, slot, 0, score) if score is not None else feed(guard, slot, 1, 0.0)
        assert failed
        assert guard.probe.failed(slot)
    guard.resume_verdict(0, FAILED, 0)  # on_error: block
    assert decide(guard, 0) == (guard.codes.stop_id, [])
    guard.let_pass(1)  # on_error: pass
    assert not feed(guard, 1, 5, 9.0)
    assert decide(guard, 1) == (X, [])
    guard.admit(0, (), policy="default", max_tokens=9)  # the next one begins anew
    assert not feed(guard, 0, 0, 0.0)
    assert decide(guard, 0) == (X, [])


def test_prompt_rules_count_with_the_first_sample_and_need_the_whole_prompt(tmp_path: Path) -> None:
    save_probe(tmp_path, stage="prompt")
    see = {"id": "see", "threshold": 1, "action": "observe", "stage": "prompt"}
    stop = {"id": "stop", "threshold": 3, "action": "halt", "stage": "prompt"}
    guard = row_guard(tmp_path, see, stop)
    guard.admit(0, (X,) * 6, policy="default", max_tokens=9)
    assert not feed(guard, 0, 0, 0.0, 2.0, 0.0)
    assert decide(guard, 0) == (X, [])  # a chunk's sample, thrown away
    assert not feed(guard, 0, 3, 2.0, 0.0, 0.0)
    assert decide(guard, 0) == (X, ["see"])
    guard.commit([0], [X])
    assert not feed(guard, 0, 6, float("nan"))  # the output's: not read
    assert decide(guard, 0) == (X, [])
    guard.admit(0, (X,) * 3, policy="default", max_tokens=9)
    assert not feed(guard, 0, 0, 0.0, 4.0, 0.0)
    assert decide(guard, 0) == (guard.codes.scripts[1][0], ["see", "stop"])
    guard.admit(0, (X,) * 3, policy="default", max_tokens=9)
    assert feed(guard, 0, 2, 0.0)  # a cached prefix
    guard.admit(0, (X,) * 3, policy="default", max_tokens=9)
    assert feed(guard, 0, 0, 0.0, 2.0, float("nan"))
    assert decide(guard, 0) == (X, [])  # not read to its end


def test_newest_scores_of_rows_that_commit_are_counted_by_column(tmp_path: Path) -> None:
    save_probe(tmp_path)
    guard = row_guard(tmp_path, {**SCORE, "action": "observe"})
    assert guard.probe is not None
    guard.admit(0, (X, X), policy="default", max_tokens=9)
    assert not feed(guard, 0, 0, 5.0, 5.0, commits=True)  # the prompt's: no rule reads it
    newest = [-1e30, -8.0, -7.5, 0.0, 0.25, 8.0, 1e30]
    for position, score in enumerate(newest, 2):
        guard.commit([0], [X])
        assert not feed(guard, 0, position, score, commits=position % 2 == 0)
    counted = newest[::2]
    bounds = np.array(SCORE_BOUNDS)
    expected = np.bincount(np.searchsorted(bounds, counted), minlength=len(bounds) + 1)
    assert guard.probe.counts.tolist() == [expected.tolist()]
    assert guard.probe.sums.tolist() == [pytest.approx(sum(counted))]
    last = 2 + len(newest) - 1
    assert not feed(guard, 0, last, float("nan"), commits=True)  # came again: not read, not counted
    assert guard.probe.counts.tolist() == [expected.tolist()]


def test_policies_without_probes_have_no_monitor(tmp_path: Path) -> None:
    guard = row_guard(tmp_path, {**WORD, "action": "halt"})
    assert guard.probe is None
    assert guard.feed_scores([0, 1], [0, 0], [0, 1, 2], np.zeros((2, 0))).tolist() == [False] * 2


def test_made_up_probes_have_the_shape_that_they_were_asked_for() -> None:
    probe = make_probe(hidden_size=7, heads={"a": Aggregation(), "b": Aggregation()})
    assert probe.weight.shape == (7, 2)
