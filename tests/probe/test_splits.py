"""Splits: tied rows stay together, sources are alike in all parts, order does not matter."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamguard.errors import ProbeError
from streamguard.probe.data import Item, Splits, check_balance, check_leakage, split
from streamguard.probe.items import prompt_digest

LONG = (
    "A long answer about the weather in the mountains, of the kind that nobody writes twice. " * 2
)
PARTS = ("train", "calibration", "test", "held_out")


def item(
    prompt: str, response: str = "Yes.", label: int = 0, source: str = "a", **more: str
) -> Item:
    return Item(prompt, response, label, source, more.get("prompt_id", prompt_digest(prompt)))


@st.composite
def mixes(draw: st.DrawFn) -> list[Item]:
    rows = draw(
        st.lists(
            st.tuples(
                st.integers(0, 30),
                st.integers(0, 30),
                st.integers(0, 1),
                st.sampled_from("abc"),
                st.booleans(),
            ),
            min_size=1,
            max_size=60,
        )
    )
    # Variants in case and whitespace, short responses that many rows share, and ids given.
    return [
        item(
            f"Prompt  {prompt}" if is_odd else f"prompt {prompt}",
            f"{LONG} {answer % 12}" if answer < 12 else "Sorry.",
            label,
            source,
            **({"prompt_id": f"id{prompt // 2}"} if is_odd else {}),
        )
        for prompt, answer, label, source, is_odd in rows
    ]


def rows_in(splits: Splits) -> dict[str, set[int]]:
    return {part: set(getattr(splits, part).tolist()) for part in PARTS}


@given(mixes(), st.integers(0, 5), st.sampled_from([(), ("a",), ("a", "b")]))
def test_no_tied_rows_are_in_two_parts(
    items: list[Item], seed: int, hold_out: tuple[str, ...]
) -> None:
    hold_out = tuple(name for name in hold_out if any(row.source == name for row in items))
    # So that there is something to fit on, whatever else is held out or tied to it.
    items = items + [item("only one", prompt_id="only one", source="d")] * 50
    splits = split(items, hold_out=hold_out, seed=seed)
    parts = rows_in(splits)
    assert sum(map(len, parts.values())) + splits.dropped == len(items)
    assert len(set.union(*parts.values())) == sum(map(len, parts.values()))
    assert parts["held_out"] == {row for row in range(len(items)) if items[row].source in hold_out}
    for part in PARTS:
        indices = getattr(splits, part)
        assert indices.dtype == np.int64
        assert (np.diff(indices) > 0).all()
    part_of: dict[tuple[str, str], str] = {}
    for part, rows in parts.items():
        for row in (items[row] for row in rows):
            shared = [("id", row.prompt_id), ("prompt", " ".join(row.prompt.lower().split()))]
            if row.response != "Sorry.":
                shared.append(("response", row.response))
            for text in shared:
                assert part_of.setdefault(text, part) == part, text
    check_leakage(items, splits)


@given(mixes(), st.integers(0, 5), st.randoms(use_true_random=False))
def test_the_split_depends_on_texts_and_seed_and_not_on_the_order_of_rows(
    items: list[Item], seed: int, order: random.Random
) -> None:
    def texts(rows: list[Item]) -> dict[str, Counter[Item]] | str:
        try:
            splits = split(rows, seed=seed)
        except ProbeError as error:
            return str(error)
        return {p: Counter(rows[i] for i in getattr(splits, p).tolist()) for p in PARTS}

    shuffled = items.copy()
    order.shuffle(shuffled)
    assert texts(items) == texts(items) == texts(shuffled)


@given(st.integers(0, 50), st.sampled_from([(0.2, 0.15), (0.3, 0.0), (0.0, 0.0), (0.4, 0.4)]))
def test_every_source_and_label_has_the_shares_asked_for(
    seed: int, shares: tuple[float, float]
) -> None:
    sizes = {("a", 0): 200, ("a", 1): 60, ("b", 0): 40, ("b", 1): 100}
    items = [
        item(f"{source} {label} {number}", label=label, source=source)
        for (source, label), size in sizes.items()
        for number in range(size)
    ]
    splits = split(items, calibration=shares[0], test=shares[1], seed=seed)
    for part, share in (("calibration", shares[0]), ("test", shares[1])):
        counts = Counter((items[i].source, items[i].label) for i in getattr(splits, part))
        for stratum, size in sizes.items():
            assert abs(counts[stratum] - share * size) <= 1, (part, stratum)


def test_another_seed_gives_another_split() -> None:
    items = [item(f"prompt {number}") for number in range(100)]
    assert split(items, seed=1).test.tolist() != split(items, seed=2).test.tolist()


def test_a_group_larger_than_calibration_and_test_together_is_fitted_on() -> None:
    items = [item(f"p{number}", prompt_id="one") for number in range(50)]
    items += [item(f"q{number}") for number in range(50)]
    for seed in range(20):
        splits = split(items, seed=seed)
        assert set(range(50)) <= set(splits.train.tolist())
        assert len(splits.test) > 0


def test_a_short_refusal_that_many_prompts_share_ties_nothing_together() -> None:
    items = [
        item(f"p{number}", "I'm sorry, but I can't assist with that.") for number in range(100)
    ]
    splits = split(items)
    assert len(splits.calibration) == 20
    check_leakage(items, splits)


def test_rows_tied_to_a_held_out_source_are_dropped_and_counted() -> None:
    items = [item("Same?", source="far"), item("same?  ", source="near")]
    items += [
        item("Other?", f"{LONG}!", source="near"),
        item("Far?", f"{LONG.upper()}!", source="far"),
    ]
    items += [item(f"p{number}", source="near") for number in range(20)]
    splits = split(items, hold_out=["far"])
    assert splits.held_out.tolist() == [0, 3]
    assert splits.dropped == 2
    assert not {1, 2} & set.union(*rows_in(splits).values())


def test_an_unknown_source_is_refused_with_those_that_there_are() -> None:
    items = [item("p", source="wildguard"), item("q", source="own")]
    with pytest.raises(ProbeError) as caught:
        split(items, hold_out=["wildgard"])
    assert str(caught.value) == (
        'no source "wildgard" to hold out; the data have: "own" (1 items), "wildguard" (1 items). '
        'Did you mean "wildguard"?'
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"calibration": -0.1}, "calibration is -0.1; it must be a share, 0 <= calibration < 1."),
        ({"test": float("nan")}, "test is nan; it must be a share"),
        ({"calibration": 0.5, "test": 0.5}, "leave nothing to fit on; their sum must be below 1"),
        ({"hold_out": ["a"]}, "nothing to fit on: 1 items, of which 1 are held out"),
    ],
)
def test_splits_that_make_no_sense_are_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ProbeError) as caught:
        split([item("p")], **options)  # type: ignore[arg-type]
    assert problem in str(caught.value)


def splits_of(train: list[int], test: list[int]) -> Splits:
    empty = np.array([], np.int64)
    return Splits(np.array(train, np.int64), empty, np.array(test, np.int64), empty)


def test_leakage_names_what_is_shared_and_by_which_prompts() -> None:
    items = [item("Hello", prompt_id="x1"), item("hello ", prompt_id="x2")]
    items += [item("a", LONG * 2, prompt_id="y1"), item("b", LONG.lower() * 2, prompt_id="y2")]
    items += [item("c", prompt_id="z"), item("d", prompt_id="z")]
    with pytest.raises(ProbeError) as caught:
        check_leakage(items, splits_of([0, 2, 4], [1, 3, 5]))
    message = str(caught.value)
    assert 'train and test share the prompt of 1 prompts (prompt ids: "x2")' in message
    assert 'train and test share the response of 1 prompts (prompt ids: "y2")' in message
    assert 'train and test share the prompt id of 1 prompts (prompt ids: "z")' in message
    with pytest.raises(ProbeError, match="share the row"):
        check_leakage(items, splits_of([0], [0]))
    many = [item("same", prompt_id=str(number)) for number in range(10)]
    with pytest.raises(ProbeError, match=r'of 9 prompts \(prompt ids: "1", "2", "3", "4", "5", …'):
        check_leakage(many, splits_of([0], list(range(1, 10))))
    check_leakage(items, splits_of([0, 1], [2, 3]))


def test_too_few_of_a_class_and_one_class_only_are_two_messages() -> None:
    items = [item(str(number), label=int(number < 30)) for number in range(60)]
    check_balance(items, range(60), "the training split", least=30)
    with pytest.raises(ProbeError) as caught:
        check_balance(items, np.arange(35), "the training split")
    assert str(caught.value).startswith(
        "the training split: 30 harmful and 5 harmless items; at least 20 of each are needed."
    )
    with pytest.raises(
        ProbeError, match=r"one class only: all 30 items are harmful\. .*add harmless"
    ):
        check_balance(items, range(30), "test")
    with pytest.raises(ProbeError, match="0 harmful and 0 harmless items"):
        check_balance(items, [], "test")
