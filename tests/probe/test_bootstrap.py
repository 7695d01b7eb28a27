"""Weighted figures and resampling by prompt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_seed import SEED
from sklearn.metrics import roc_auc_score

from streamguard.probe import bootstrap
from streamguard.probe.bootstrap import Roc, auroc

# Few distinct scores, so that ties are many.
RANKED = st.lists(
    st.tuples(st.integers(-4, 4), st.integers(0, 1), st.integers(0, 3)), min_size=2, max_size=40
).filter(lambda rows: {label for _, label, _ in rows} == {0, 1})


def columns(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    score, label, weight = np.array(rows).T
    return score.astype(np.float32), label, weight.astype(np.float64)


@settings(max_examples=60)
@given(RANKED)
def test_auroc_is_that_of_scikit_learn(rows: list[tuple[int, int, int]]) -> None:
    score, label, _ = columns(rows)
    assert auroc(score, label) == pytest.approx(roc_auc_score(label, score), abs=1e-12)


@given(RANKED)
def test_a_weight_is_as_good_as_that_many_copies(rows: list[tuple[int, int, int]]) -> None:
    score, label, weight = columns(rows)
    found, recall = Roc(score, label).figures(np.stack([weight, weight + 1]), (0.2,))
    for row, times in enumerate((weight.astype(int), weight.astype(int) + 1)):
        copies = np.repeat(label, times)
        if 0 < copies.sum() < len(copies):
            expected = roc_auc_score(copies, np.repeat(score, times))
            assert found[row] == pytest.approx(expected, abs=1e-12)
        else:
            assert np.isnan(found[row])
            assert np.isnan(recall[row, 0])


@given(RANKED, st.sampled_from([0.001, 0.01, 0.05, 0.2, 0.5]))
def test_recall_at_an_fpr_is_that_of_the_best_allowed_threshold(
    rows: list[tuple[int, int, int]], fpr: float
) -> None:
    score, label, _ = columns(rows)
    _, recall = Roc(score, label).figures(np.ones((1, len(score))), (fpr,))
    best = 0.0
    for threshold in score:
        if (score[label == 0] >= threshold).mean() <= fpr:
            best = max(best, (score[label == 1] >= threshold).mean())
    assert recall[0, 0] == pytest.approx(best)


@given(RANKED)
def test_the_curve_goes_from_corner_to_corner_and_holds_the_auroc(
    rows: list[tuple[int, int, int]],
) -> None:
    score, label, _ = columns(rows)
    fpr, recall = Roc(score, label).curve()
    assert (fpr[0], recall[0], fpr[-1], recall[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(recall, fpr) == pytest.approx(auroc(score, label))


@given(RANKED, st.sampled_from([0.5, 0.9]))
def test_weighted_quantiles_are_those_of_copies(
    rows: list[tuple[int, int, int]], level: float
) -> None:
    values, _, weight = columns(rows)
    (found,) = bootstrap.quantiles(values, weight[None], (level,))
    copies = np.repeat(values, weight.astype(int))
    if len(copies):
        assert found[0] == np.quantile(copies, level, method="inverted_cdf")
    else:
        assert np.isnan(found[0])


def test_a_round_draws_whole_prompts_as_many_as_there_are() -> None:
    cluster = np.array([0, 0, 1, 2, 2, 2])
    blocks = list(bootstrap.rounds(cluster, 50, np.random.default_rng(SEED)))
    weights = np.concatenate(blocks)
    assert weights.shape == (50, 6)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3:] == weights[:, 3:4]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    # Harmful scores lie 1 above benign ones of unit variance: AUROC = Phi(1 / sqrt(2)) = .7602.
    rng, held = np.random.default_rng(7), 0
    for _ in range(200):
        label = np.repeat([0, 1], 60)
        roc = Roc(rng.normal(size=120) + label, label)
        blocks = bootstrap.rounds(np.arange(120), 200, rng)
        found = bootstrap.interval(np.concatenate([roc.figures(block)[0] for block in blocks]))
        assert found is not None
        held += found[0] <= 0.7602 <= found[1]
    assert 178 <= held <= 199


def test_answers_to_one_prompt_are_worth_less_than_as_many_prompts() -> None:
    rng = np.random.default_rng(SEED)
    cluster = np.repeat(np.arange(30), 10)
    label = np.repeat(np.arange(30) % 2, 10)
    scores = label + np.repeat(rng.normal(size=30), 10) + 0.1 * rng.normal(size=300)
    roc = Roc(scores, label)

    def width(clusters: np.ndarray) -> float:
        blocks = bootstrap.rounds(clusters, 400, rng)
        found = bootstrap.interval(np.concatenate([roc.figures(block)[0] for block in blocks]))
        assert found is not None
        return found[1] - found[0]

    assert width(cluster) > 1.5 * width(np.arange(300))


def test_bins_hold_equally_many_and_equal_scores_share_one() -> None:
    bins = bootstrap.equal_mass_bins(np.random.default_rng(SEED).normal(size=150), 15)
    assert (bins.sum(0) == 10).all()
    tied = bootstrap.equal_mass_bins(np.array([1.0, 2.0, 2.0, 2.0, 3.0]), 5)
    assert (tied[1] == tied[2]).all()
    assert (tied[1] == tied[3]).all()
    assert bootstrap.equal_mass_bins(np.array([-np.inf, -np.inf]), 15).sum() == 2


def test_no_interval_where_most_rounds_have_no_figure() -> None:
    assert bootstrap.interval(np.array([np.nan, np.nan, 0.5])) is None
    assert bootstrap.interval(np.empty(0)) is None
    assert bootstrap.interval(np.array([0.5, np.nan, 0.5])) == (0.5, 0.5)
