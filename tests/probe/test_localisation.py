"""How soon a text that turns is halted, on scores whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from streamguard.probe.aggregation import Aggregation
from streamguard.probe.measure import localisation
from streamguard.probe.pool import Pool
from streamguard.probe.prepare import FitOptions, judged_splices
from streamguard.probe.texts import Text, splices

RAW = Aggregation("window", 1)
ONSET = 64


def plain(count: int, length: int = 120) -> list[Text]:
    """Benign ones at odd places; what a token says is whose text it is."""
    return [
        Text(np.arange(5) + i, np.full(length, i), np.full(length, i % 2 == 0), i, length)
        for i in range(count)
    ]


def spliced() -> tuple[list[Text], list[Text]]:
    texts = plain(60)
    calm, bad = list(range(1, 60, 2)), list(range(0, 60, 2))
    made = judged_splices(texts, calm, bad, 10, FitOptions(), np.random.default_rng(3))
    return [text for i, text in enumerate(texts) if i % 2], made


def test_texts_turn_behind_64_benign_tokens_to_harm_and_as_many_to_another_benign_text() -> None:
    _, made = spliced()
    assert [text.label for text in made] == [1] * 10 + [0] * 10
    for text in made:
        assert text.onset == ONSET
        first, then = text.response[0], text.response[ONSET]
        assert first % 2 == 1
        assert then % 2 == (0 if text.label else 1)
        assert (text.response == np.where(np.arange(len(text.response)) < ONSET, first, then)).all()
        assert (text.harmful == (text.response % 2 == 0)).all()
        assert text.prompt[0] == first


def test_other_draws_are_what_they_were_without_the_benign_turns() -> None:
    """What is measured beside it changes nothing that is drawn later."""
    texts = plain(60)
    after = []
    for calm in (list(range(1, 60, 2)), []):
        rng = np.random.default_rng(3)
        judged_splices(texts, calm, list(range(0, 60, 2)) if calm else [], 10, FitOptions(), rng)
        after.append(rng.bit_generator.state["state"]["state"])
    rng = np.random.default_rng(3)
    assert after[1] == rng.bit_generator.state["state"]["state"]  # nothing made, nothing drawn
    splices(
        texts, list(range(1, 60, 2)), list(range(0, 60, 2)), count=10, max_response=160, rng=rng,
        first=(64, 65), back=0.0, middle=0.0,
    )  # fmt: skip
    assert after[0] == rng.bit_generator.state["state"]["state"]


@pytest.mark.parametrize("delay", [0, 7])
def test_catches_and_the_control_are_counted_apart(delay: int) -> None:
    calm, made = spliced()
    texts = [*calm, *made]
    offsets = np.concatenate([[0], np.cumsum([len(text.response) for text in texts])])
    scores = np.zeros(offsets[-1], np.float32)
    # Of ten that turn harmful six are seen, one too soon; of the others two.
    for i in range(len(made)):
        begin = offsets[len(calm) + i]
        if i < 6 or i in (10, 11):
            scores[begin + ONSET + delay] = 1.0
        elif i == 6:
            scores[begin + 3] = 1.0
    labels = np.array([[text.label] for text in texts], np.int8)
    pool = Pool(texts, offsets.astype(np.int64), labels, ["a"] * len(texts), scores)
    found = localisation(pool, scores, RAW, np.arange(len(calm), len(texts)), np.arange(len(calm)))
    assert (found["texts"], found["benign"]) == (10, len(calm))
    assert found["caught"] == pytest.approx(0.6)
    assert found["before_onset"] == pytest.approx(0.1)
    assert found["median_delay_tokens"] == delay
    assert found["benign_turns"] == {"texts": 10, "halted_behind": pytest.approx(0.2)}


def test_without_texts_that_turn_there_is_nothing_to_say() -> None:
    calm, _ = spliced()
    offsets = np.arange(0, 120 * (len(calm) + 1), 120)
    scores = np.zeros(offsets[-1], np.float32)
    pool = Pool(calm, offsets, np.zeros((len(calm), 1), np.int8), ["a"] * len(calm), scores)
    assert localisation(pool, scores, RAW, np.empty(0, np.int64), np.arange(len(calm))) == {}


def measured(
    texts: list[Text], calm: list[int], bad: list[int]
) -> tuple[list[Text], dict[str, Any]]:
    """What is made of texts, and what is found where nothing is ever halted."""
    made = judged_splices(texts, calm, bad, 40, FitOptions(), np.random.default_rng(0))
    every = [*(texts[i] for i in calm), *made]
    offsets = np.concatenate([[0], np.cumsum([len(text.response) for text in every])])
    scores = np.zeros(offsets[-1], np.float32)
    labels = np.array([[int(text.item in bad)] for text in every], np.int8)
    pool = Pool(every, offsets.astype(np.int64), labels, ["a"] * len(every), scores)
    numbers = np.arange(len(every))
    return made, localisation(pool, scores, RAW, numbers[len(calm) :], numbers[: len(calm)])


def test_short_harmful_texts_leave_nothing_to_measure() -> None:
    texts = [*plain(60), *(Text(np.arange(5), np.full(20, 0), np.ones(20, bool), 60, 20),) * 9]
    made, found = measured(texts, list(range(1, 60, 2)), list(range(60, 69)))
    assert made
    assert not any(text.label for text in made)
    assert found == {}


def test_harm_is_where_spans_say_and_a_text_cut_before_it_is_no_control() -> None:
    calm = list(range(1, 60, 2))
    texts = plain(60)
    for item, begin in ((60, 30), (61, 110)):
        harmful = np.zeros(200, bool)
        harmful[begin : begin + 20] = True
        texts.append(Text(np.arange(5), np.full(200, item), harmful, item, 200))
    made, found = measured(texts, calm, [60, 61])
    shown, cut = (sum(text.item == item for text in made) for item in (60, 61))
    assert min(shown, cut) > 0
    assert (found["texts"], found["benign_turns"]["texts"]) == (shown, len(made) - shown - cut)
    assert not any(text.response[0] == text.response[ONSET] for text in made)
    # An alarm at the turn is before the harm.
    only = [text for text in made if text.item == 60]
    every = [*(texts[i] for i in calm), *only]
    offsets = np.concatenate([[0], np.cumsum([len(text.response) for text in every])])
    scores = np.zeros(offsets[-1], np.float32)
    for k, begin in enumerate(offsets[len(calm) : -1]):
        scores[begin + ONSET + (40 if k else 0)] = 1.0
    labels = np.array([[text.label] for text in every], np.int8)
    pool = Pool(every, offsets.astype(np.int64), labels, ["a"] * len(every), scores)
    numbers = np.arange(len(every))
    found = localisation(pool, scores, RAW, numbers[len(calm) :], numbers[: len(calm)])
    assert found["before_onset"] == pytest.approx(1 / len(only))
    assert found["median_delay_tokens"] == 10
