"""Running statistics and thresholds, against definitions read off the words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest
from score_schedule import statistics

from streamguard.errors import ProbeError
from streamguard.probe.aggregation import Aggregation
from streamguard.probe.threshold import (
    allowed_alarms,
    needed_benign,
    realised_bounds,
    threshold_for,
)

SCORES = st.lists(st.floats(-30, 30, width=32), max_size=40)
AGGREGATIONS = st.one_of(
    st.builds(
        Aggregation, st.sampled_from(["window", "consecutive"]), st.integers(1, 9),
        warmup=st.integers(1, 9),
    ),
    st.builds(Aggregation, st.just("ema"), weight=st.floats(0.02, 1), warmup=st.integers(1, 9)),
    st.builds(Aggregation, st.just("cusum"), drift=st.floats(-2, 2), warmup=st.integers(1, 9)),
)  # fmt: skip


def laid_out(texts: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in texts])]).astype(np.int64)
    return np.array([x for text in texts for x in text], np.float32), offsets


@given(st.lists(SCORES, max_size=5), AGGREGATIONS)
def test_statistics_are_what_their_words_say(texts: list[list[float]], how: Aggregation) -> None:
    scores, offsets = laid_out(texts)
    running = how.running(scores, offsets)
    expected = [x for text in texts for x in statistics(how, [np.float32(s) for s in text])]
    np.testing.assert_allclose(running, np.array(expected, np.float32), rtol=1e-3, atol=1e-3)


@given(st.lists(SCORES, max_size=5), AGGREGATIONS, st.floats(-20, 20, width=32))
def test_a_text_is_halted_exactly_if_its_peak_reaches_the_threshold(
    texts: list[list[float]], how: Aggregation, threshold: float
) -> None:
    scores, offsets = laid_out(texts)
    peaks = how.peaks(scores, offsets)
    alarms = how.alarms(scores, offsets, threshold)
    assert ((peaks >= np.float32(threshold)) == (alarms >= 0)).all()
    assert (alarms[alarms >= 0] >= how.warmup - 1).all()


def test_a_moving_average_forgets_how_calm_a_text_was() -> None:
    how = Aggregation("ema", weight=0.1)
    calm, short = [-9.0] * 64 + [3.0] * 20, [3.0] * 20
    scores, offsets = laid_out([calm, short])
    first, second = how.alarms(scores, offsets, 1.5)
    assert first - 64 == second > 0


def test_a_text_shorter_than_the_warm_up_is_never_halted() -> None:
    scores, offsets = laid_out([[9.0] * 3, [9.0] * 4])
    assert Aggregation(warmup=4).peaks(scores, offsets).tolist() == [-math.inf, 9.0]


def test_nan_reaches_the_peak() -> None:
    scores, offsets = laid_out([[1.0, math.nan, 2.0]])
    for how in (Aggregation(), Aggregation("window", 2), Aggregation("ema", weight=0.5)):
        assert np.isnan(how.peaks(scores, offsets)).all(), how


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "median"}, "allowed: window, consecutive, ema, cusum"),
        ({"size": 65}, "1..64"),
        ({"weight": 0.0}, "above 0"),
        ({"warmup": 0}, "1 token or more"),
    ],
)
def test_bad_statistics_are_refused(arguments: dict, said: str) -> None:
    with pytest.raises(ProbeError, match=said):
        Aggregation(**arguments)


# --------------------------------------------------------------------------- thresholds


@given(st.integers(1, 400), st.sampled_from([0.01, 0.05, 0.1]), st.sampled_from([0.5, 0.9, 0.99]))
def test_the_allowed_number_of_alarms_is_the_exact_binomial_bound(
    count: int, fpr: float, confidence: float
) -> None:
    most = allowed_alarms(count, fpr, confidence)
    if most >= 0:
        assert binom.cdf(most, count, fpr) <= 1 - confidence + 1e-9
    assert binom.cdf(most + 1, count, fpr) > 1 - confidence - 1e-9
    assert (most >= 0) == (count >= needed_benign(fpr, confidence))


def test_the_bound_holds_as_often_as_it_says(seed: int) -> None:
    # 600 calibrations with 200 texts each: the share whose true FPR exceeds 5% is at most 10%.
    rng = np.random.default_rng(seed)
    over = 0
    for _ in range(600):
        threshold = threshold_for(rng.random(200).astype(np.float32), 0.05)
        over += 1 - threshold > 0.05  # the true rate of uniform peaks
    assert over / 600 <= 0.1 + 4 * math.sqrt(0.1 * 0.9 / 600)


def test_ties_with_the_threshold_are_not_halted() -> None:
    benign = np.array([0.0] * 95 + [1.0] * 5, np.float32)
    assert (benign >= threshold_for(benign, 0.05)).mean() <= 0.05


@pytest.mark.parametrize("peak", [0.0, -1e-45, 1e-40, -np.finfo(np.float32).tiny])
def test_a_threshold_stays_above_its_texts_where_subnormal_numbers_are_zero(peak: float) -> None:
    benign = np.full(100, peak, np.float32)
    threshold = np.float32(threshold_for(benign, 0.05))
    assert threshold >= np.finfo(np.float32).tiny
    assert (benign < threshold).all()


def test_too_few_benign_texts_are_refused_with_how_many_it_takes() -> None:
    with pytest.raises(ProbeError, match=r"100 benign texts cannot show an FPR of 0.01.*230"):
        threshold_for(np.zeros(100, np.float32), 0.01)
    with pytest.raises(ProbeError, match="NaN score"):
        threshold_for(np.full(100, np.nan, np.float32), 0.1)
    with pytest.raises(ProbeError, match="between 0 and 1"):
        threshold_for(np.zeros(100, np.float32), 0.0)


@given(st.integers(1, 300), st.data())
def test_intervals_of_rates_are_clopper_and_pearsons(count: int, data: st.DataObject) -> None:
    alarms = data.draw(st.integers(0, count))
    found = realised_bounds(alarms, count)
    wanted = binomtest(alarms, count).proportion_ci(0.95, "exact")
    assert found == pytest.approx((wanted.low, wanted.high), abs=1e-6)
