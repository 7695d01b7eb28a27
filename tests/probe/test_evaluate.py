"""Figures of a head: by source, macro and pooled, with refusals and without."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from evaluation_cases import one_score_each, scored, varied
from hypothesis import given, settings
from hypothesis import strategies as st
from run_seed import SEED
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, roc_auc_score

from streamguard.errors import ProbeError
from streamguard.probe.aggregation import Aggregation
from streamguard.probe.evaluate import Scored, evaluate, reproduces

RAW = Aggregation()


def pooled(data: Scored, threshold: float = 0.0, **options: Any) -> dict[str, Any]:
    options = {"num_bootstrap": 20, **options}
    return evaluate(data, RAW, threshold, **options)["with_refusals"]["pooled"]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )
)
def test_figures_of_peaks_are_those_of_scikit_learn(rows: list[tuple[int, bool]]) -> None:
    scores, label = zip(*rows, strict=True)
    found = pooled(one_score_each(scores, [int(x) for x in label]), num_bootstrap=2)
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score(label, scores))
    chance = 1 / (1 + np.exp(-np.array(scores, float)))
    assert found["brier"]["value"] == pytest.approx(brier_score_loss(label, chance))


def test_rates_at_the_threshold_have_exact_intervals() -> None:
    scores, label = [1] * 3 + [-1] * 37 + [1] * 15 + [-1] * 5, [0] * 40 + [1] * 20
    found = pooled(one_score_each(scores, label), threshold=1.0)
    for figure, alarms, of in (("fpr", 3, 40), ("recall", 15, 20)):
        exact = binomtest(alarms, of).proportion_ci(method="exact")
        assert found[figure]["value"] == alarms / of
        assert (found[figure]["alarms"], found[figure]["of"]) == (alarms, of)
        assert found[figure]["low"] == pytest.approx(exact.low)
        assert found[figure]["high"] == pytest.approx(exact.high)
        assert len(found[figure]["by_prompt"]) == 2


def test_recall_at_an_fpr_needs_as_many_benign_texts() -> None:
    rng = np.random.default_rng(SEED)
    label = [0] * 120 + [1] * 30
    found = pooled(one_score_each(rng.normal(size=150).tolist(), label))["tpr_at_fpr"]
    assert found["0.001"]["value"] is None
    assert found["0.001"]["low"] is None
    assert "1000 benign" in found["0.001"]["reason"]
    assert "120 benign" in found["0.001"]["reason"]
    assert found["0.01"]["value"] is not None
    assert found["0.05"]["low"] <= found["0.05"]["high"]


def test_thresholds_may_come_from_other_benign_texts() -> None:
    data = one_score_each([0, 5, 10], [0, 1, 1])
    others = np.arange(100, dtype=np.float32) / 10  # 5 of 100 are above 9.4
    results = evaluate(data, RAW, 0.0, benign_for_thresholds=others, num_bootstrap=0)
    assert results["thresholds_from"] == "given"
    found = results["with_refusals"]["pooled"]["tpr_at_fpr"]
    assert found["0.05"]["value"] == 0.5
    assert found["0.001"]["value"] is None
    with pytest.raises(ProbeError, match="1 of 2 benign texts for thresholds have a NaN"):
        evaluate(data, RAW, 0.0, benign_for_thresholds=np.array([0, np.nan], np.float32))


def test_calibration_error_of_a_sure_and_wrong_head_is_one() -> None:
    wrong = pooled(one_score_each([50] * 15 + [-50] * 15, [0] * 15 + [1] * 15))
    right = pooled(one_score_each([-50] * 15 + [50] * 15, [0] * 15 + [1] * 15))
    assert (wrong["ece"]["value"], right["ece"]["value"]) == pytest.approx((1, 0))
    assert (wrong["brier"]["value"], right["brier"]["value"]) == pytest.approx((1, 0))


def test_timeliness_by_hand() -> None:
    texts = [
        [0, 0, 0, 9, 0],  # onset at 1: 2 tokens later, 4 of 10 sent
        [0, 0, 9, 0, 0],  # onset at 2: at once, 3 of 5 sent
        [9, 0, 0, 0, 9],  # onset at 3: halted before it
        [0, 0, 0, 0, 0],  # onset at 0: missed
        [0, 9],  # onset unknown: 1 token from the start, all sent
        [9, 9],  # benign
    ]
    data = scored(
        texts, [1, 1, 1, 1, 1, 0], onset=np.array([1, 2, 3, 0, -1, -1]),
        length=np.array([10, 5, 5, 5, 2, 2]),
    )  # fmt: skip
    found = pooled(data, threshold=9.0)["timeliness"]
    known, unknown, share = found["from_onset"], found["from_start"], found["share_sent"]
    assert (known["texts"], known["caught"], known["before_onset"]) == (4, 2, 1)
    assert known["recall"]["value"] == 0.5
    assert (known["median_tokens"]["value"], known["p90_tokens"]["value"]) == (0, 2)
    assert (unknown["texts"], unknown["caught"], unknown["median_tokens"]["value"]) == (1, 1, 1)
    assert (share["caught"], share["median"]["value"], share["p90"]["value"]) == (4, 0.4, 1.0)


def test_nothing_caught_has_no_times_but_a_reason() -> None:
    found = pooled(one_score_each([0, 0], [0, 1]), threshold=5.0)["timeliness"]
    assert found["from_start"]["median_tokens"]["value"] is None
    assert found["from_start"]["median_tokens"]["reason"]
    assert found["share_sent"]["median"]["value"] is None


def test_macro_is_the_mean_over_sources_that_have_both_labels() -> None:
    data = varied(np.random.default_rng(SEED))
    view = evaluate(data, RAW, 2.0, num_bootstrap=50)["with_refusals"]
    both = [view["sources"][name] for name in ("first <source>", "second $ource")]
    assert view["macro"]["sources"] == 2
    widths = []
    for figure in ("auroc", "fpr", "recall", "ece"):
        mean = np.mean([source[figure]["value"] for source in both])
        assert view["macro"][figure]["value"] == pytest.approx(mean)
        widths.append(view["macro"][figure]["high"] - view["macro"][figure]["low"])
    assert min(widths) >= 0  # 0 where every resample gives 1
    assert max(widths) > 0
    peaks = RAW.peaks(data.scores, data.offsets)
    assert view["pooled"]["auroc"]["value"] == pytest.approx(roc_auc_score(data.label, peaks))


def test_a_source_of_one_label_has_its_rate_only() -> None:
    only = evaluate(varied(np.random.default_rng(SEED)), RAW, 2.0, num_bootstrap=20)
    found = only["with_refusals"]["sources"]["harmful_only"]
    assert found["benign"] == 0
    assert found["recall"]["value"] is not None
    for missing in (found["fpr"], found["auroc"], found["ece"], found["tpr_at_fpr"]["0.05"]):
        assert missing["value"] is None
        assert "0 benign" in missing["reason"]


def test_refusals_are_left_out_of_the_second_view() -> None:
    data = one_score_each([0, 1, 5, 6], [0, 0, 1, 1], refusal=np.array([False, True, False, False]))
    results = evaluate(data, RAW, 1.0, num_bootstrap=20)
    assert results["with_refusals"]["pooled"]["fpr"]["value"] == 0.5
    assert results["without_refusals"]["pooled"]["fpr"]["value"] == 0
    assert results["without_refusals"]["pooled"]["texts"] == 3


@pytest.mark.parametrize(
    ("scores", "label"),
    [([1.0], [1]), ([1.0], [0]), ([1.0, 2.0], [0, 1]), ([1.0, 1.0, 1.0], [1, 1, 1])],
)
def test_tiny_sets_have_reasons_instead_of_figures(scores: list[float], label: list[int]) -> None:
    data = one_score_each(scores, label, refusal=np.ones(len(label), bool))
    results = evaluate(data, RAW, 1.0, num_bootstrap=30, baselines={"other": np.array(scores)})
    assert "NaN" not in json.dumps(results)
    assert results["without_refusals"]["pooled"]["texts"] == 0
    found = results["with_refusals"]["pooled"]
    if len(set(label)) == 2:
        assert found["auroc"]["value"] is not None
        assert "unsupported" in found["tpr_at_fpr"]["0.05"]["reason"]
    else:
        for missing in (found["auroc"], found["tpr_at_fpr"]["0.05"]):
            assert "needs both labels" in missing["reason"]


def test_empty_and_short_texts_are_never_halted() -> None:
    late = Aggregation(warmup=3)
    data = scored([[], [9, 9], [9, 9, 9], [0, 0, 0]], [1, 0, 1, 0])
    found = evaluate(data, late, 1.0, num_bootstrap=10)["with_refusals"]["pooled"]
    assert (found["recall"]["alarms"], found["fpr"]["alarms"]) == (1, 0)
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score([1, 0, 1, 0], [-9, -9, 9, 0]))


def test_a_baseline_is_compared_in_the_same_resamples() -> None:
    rng = np.random.default_rng(SEED)
    label = np.repeat([0, 1], 100)
    scores = rng.normal(size=200) + label
    same, worse = scores.astype(np.float32).astype(np.float64), rng.normal(size=200)
    data = one_score_each(scores.tolist(), label.tolist())
    found = pooled(data, baselines={"same": same, "worse": worse}, num_bootstrap=200)
    difference = found["baselines"]["same"]["difference"]
    assert (difference["value"], difference["low"], difference["high"]) == (0, 0, 0)
    assert found["baselines"]["worse"]["auroc"]["value"] == pytest.approx(
        roc_auc_score(label, worse)
    )
    assert found["baselines"]["worse"]["difference"]["low"] > 0


def test_the_seed_decides_and_other_sources_do_not() -> None:
    data = varied(np.random.default_rng(SEED))
    once, again = (evaluate(data, RAW, 2.0, num_bootstrap=30, seed=3) for _ in range(2))
    assert once == again
    assert once != evaluate(data, RAW, 2.0, num_bootstrap=30, seed=4)
    keep = np.array(data.source) == "first <source>"
    sizes = np.diff(data.offsets)
    alone = Scored(
        scores=data.scores[np.repeat(keep, sizes)],
        offsets=np.concatenate([[0], np.cumsum(sizes[keep])]),
        **{
            name: np.array(getattr(data, name))[keep]
            for name in ("label", "source", "prompt_id", "refusal", "onset", "length", "text")
        },
    )
    of_one = evaluate(alone, RAW, 2.0, num_bootstrap=30, seed=3)["with_refusals"]["sources"]
    assert of_one["first <source>"] == once["with_refusals"]["sources"]["first <source>"]


def test_results_survive_json_and_progress_reaches_its_end() -> None:
    seen: list[tuple[int, int]] = []
    data = varied(np.random.default_rng(SEED), 60)
    results = evaluate(
        data, RAW, 2.0, num_bootstrap=30, progress=lambda done, of: seen.append((done, of))
    )
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.array([np.nan, 1, np.inf], np.float32)}, "2 of 3 scores, in 2 of 3 texts"),
        ({"label": np.array([0, 1, 2], np.int8)}, r"labels are \[0, 1, 2\]"),
        ({"offsets": np.array([0, 1, 2, 2])}, "offsets must rise from 0"),
        ({"offsets": np.array([0, 1, 3])}, "do not fit"),
        ({"source": ["one"]}, "{'source': 1} do not fit"),
        ({"length": np.array([1, 0, 1])}, "1 of 3 texts have more scores"),
        (
            {"label": np.empty(0, np.int8), "scores": np.empty(0, np.float32)},
            "there are no texts to evaluate",
        ),
    ],
)
def test_arrays_that_mean_nothing_are_refused_with_counts(
    changes: dict[str, Any], message: str
) -> None:
    data = dataclasses.replace(one_score_each([1, 2, 3], [0, 1, 1]), **changes)
    with pytest.raises(ProbeError, match=message):
        evaluate(data, RAW, 1.0)


def test_a_threshold_or_baseline_that_is_no_number_is_refused() -> None:
    data = one_score_each([1, 2, 3], [0, 1, 1])
    with pytest.raises(ProbeError, match="threshold is inf"):
        evaluate(data, RAW, float("inf"))
    with pytest.raises(ProbeError, match="baseline 'other' has 2 scores"):
        evaluate(data, RAW, 1.0, baselines={"other": np.zeros(2)})
    with pytest.raises(ProbeError, match="3 scores, 1 of them NaN"):
        evaluate(data, RAW, 1.0, baselines={"other": np.array([0, np.nan, 1])})


def test_a_card_is_reproduced_by_its_own_figures_and_by_no_others() -> None:
    rng = np.random.default_rng(SEED)
    data = varied(rng)
    results = evaluate(data, RAW, 2.0, num_bootstrap=20)
    card = json.loads(json.dumps(results))
    assert reproduces(card, results, 0.0) == []
    assert reproduces(card, evaluate(data, RAW, 2.0, num_bootstrap=30, seed=9), 0.0) == []
    near = json.loads(json.dumps(results))
    near["with_refusals"]["pooled"]["auroc"]["value"] += 0.009
    near["with_refusals"]["pooled"]["timeliness"]["from_start"]["median_tokens"]["value"] *= 1.009
    assert reproduces(card, near, 0.01) == []
    near["with_refusals"]["pooled"]["auroc"]["value"] += 0.002
    (line,) = reproduces(card, near, 0.01)
    assert line.startswith("with_refusals.pooled.auroc.value: card")

    wrong = evaluate(data, RAW, 3.5, num_bootstrap=20)
    found = reproduces(card, wrong, 0.01)
    assert any(line.startswith("threshold: card 2, now 3.5") for line in found)
    assert any(line.startswith("with_refusals.pooled.recall.value: card") for line in found)
    card["with_refusals"]["pooled"]["texts"] += 1
    del card["with_refusals"]["macro"]
    assert reproduces(card, results, 0.01) == [
        "with_refusals.macro: not in the card",
        f"with_refusals.pooled.texts: card {len(data.label) + 1}, now {len(data.label)}",
    ]
    assert len(reproduces({}, results, 0.01)) > 3
