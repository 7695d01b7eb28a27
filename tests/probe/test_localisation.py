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


def found_where(
    calm: list[Text], made: list[Text], labels: list[int], alarms: dict[int, int]
) -> dict[str, Any]:
    """`localisation` of texts that halt at these tokens, by their place in `made`.

    labels  of the items that they are made of.
    """
    every = [*calm, *made]
    offsets = np.concatenate([[0], np.cumsum([len(text.response) for text in every])])
    scores = np.zeros(offsets[-1], np.float32)
    for place, token in alarms.items():
        scores[offsets[len(calm) + place] + token] = 1.0
    label = np.array([[0]] * len(calm) + [[each] for each in labels], np.int8)
    pool = Pool(every, offsets.astype(np.int64), label, ["a"] * len(every), scores)
    numbers = np.arange(len(every))
    return localisation(pool, scores, RAW, numbers[len(calm) :], numbers[: len(calm)])


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
    # Of ten that turn harmful six are seen, one too soon; of the others two.
    alarms = dict.fromkeys((*range(6), 10, 11), ONSET + delay) | {6: 3}
    found = found_where(calm, made, [text.label for text in made], alarms)
    assert (found["texts"], found["benign"]) == (10, len(calm))
    assert found["caught"] == pytest.approx(0.6)
    assert found["before_onset"] == pytest.approx(0.1)
    assert found["median_delay_tokens"] == delay
    assert found["benign_turns"] == {"texts": 10, "halted_behind": pytest.approx(0.2)}


def test_without_texts_that_turn_there_is_nothing_to_say() -> None:
    assert found_where(spliced()[0], [], [], {}) == {}


def test_short_harmful_texts_leave_nothing_to_measure() -> None:
    texts = [*plain(60), *(Text(np.arange(5), np.full(20, 0), np.ones(20, bool), 60, 20),) * 9]
    calm = list(range(1, 60, 2))
    made = judged_splices(
        texts, calm, list(range(60, 69)), 40, FitOptions(), np.random.default_rng(0)
    )
    assert made
    assert not any(text.label for text in made)
    assert found_where([texts[i] for i in calm], made, [0] * len(made), {}) == {}


def test_harm_is_where_spans_say_and_a_text_cut_before_it_is_no_control() -> None:
    texts, calm = plain(60), list(range(1, 60, 2))
    for item, begin in ((60, 30), (61, 110)):
        harmful = np.zeros(200, bool)
        harmful[begin : begin + 20] = True
        texts.append(Text(np.arange(5), np.full(200, item), harmful, item, 200))
    made = judged_splices(texts, calm, [60, 61], 40, FitOptions(), np.random.default_rng(0))
    assert not any(text.response[0] == text.response[ONSET] for text in made)
    shown = [i for i, text in enumerate(made) if text.item == 60]
    cut = [i for i, text in enumerate(made) if text.item == 61]
    assert min(len(shown), len(cut)) > 0
    # An alarm at the turn is before the harm.
    alarms = dict.fromkeys(shown, ONSET + 40) | {shown[0]: ONSET}
    labels = [int(text.item >= 60) for text in made]
    found = found_where([texts[i] for i in calm], made, labels, alarms)
    assert found["texts"] == len(shown)
    assert found["benign_turns"]["texts"] == len(made) - len(shown) - len(cut)
    assert found["before_onset"] == pytest.approx(1 / len(shown))
    assert found["median_delay_tokens"] == 10
