"""Length, keywords and TF-IDF: fitted on some texts, scores of others."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
from run_seed import SEED

from streamguard.errors import ProbeError
from streamguard.probe.baselines import (
    FITTED_WORDS,
    KEYWORDS,
    LENGTH,
    NUM_FITTED_WORDS,
    TFIDF,
    fit_baselines,
)
from streamguard.probe.bootstrap import auroc

_COMMON = "the a of and to it on with for at from by this that is was".split()
_GARDEN = "seed soil water leaf garden spade bloom".split()
_HARM = "weapon poison bombs steal detonate".split()


def texts(rng: random.Random, count: int) -> tuple[list[str], np.ndarray]:
    """Texts of one length in words: half of them of a garden, half of harm."""
    label = np.arange(count) % 2
    made = [
        " ".join(rng.choices(_COMMON, k=20) + rng.choices(_HARM if of else _GARDEN, k=4))
        for of in label
    ]
    return made, label


def test_words_tell_texts_that_differ_in_words() -> None:
    rng = random.Random(SEED)
    found = fit_baselines(*texts(rng, 100))
    others, label = texts(rng, 100)
    scores = found.score(others)
    assert list(scores) == [LENGTH, KEYWORDS, FITTED_WORDS, TFIDF]
    assert all(values.dtype == np.float64 and len(values) == 100 for values in scores.values())
    for name in (KEYWORDS, FITTED_WORDS, TFIDF):
        assert auroc(scores[name], label) > 0.95, name
    assert "weapon" in found.words
    assert len(found.words) <= NUM_FITTED_WORDS


@pytest.mark.parametrize("longer", [0, 1])
def test_length_tells_texts_that_differ_in_length_whichever_way(longer: int) -> None:
    rng = random.Random(SEED)

    def made(count: int) -> tuple[list[str], np.ndarray]:
        label = np.arange(count) % 2
        sizes = [rng.randint(30, 40) if of == longer else rng.randint(5, 15) for of in label]
        return [" ".join(rng.choices(_COMMON, k=size)) for size in sizes], label

    found = fit_baselines(*made(60))
    others, label = made(60)
    scores = found.score(others)
    assert auroc(scores[LENGTH], label) > 0.95
    assert auroc(scores[KEYWORDS], label) == 0.5


def test_a_fit_can_be_repeated() -> None:
    made, label = texts(random.Random(SEED), 60)
    first, second = fit_baselines(made, label), fit_baselines(made, label)
    assert first.words == second.words
    for name, values in first.score(made).items():
        assert (values == second.score(made)[name]).all()


def test_texts_without_words_in_common_or_at_all_have_scores_too() -> None:
    found = fit_baselines(["one", "two"], [0, 1])
    assert np.isfinite(found.score(["one", "", "three"])[TFIDF]).all()
    found = fit_baselines(["", "!"], [0, 1])
    assert (found.score(["a word", "two words"])[TFIDF] == 0).all()
    assert all(len(values) == 0 for values in found.score([]).values())


def test_labels_of_one_class_are_refused_with_counts() -> None:
    with pytest.raises(ProbeError, match="2 harmful and 0 benign"):
        fit_baselines(["a", "b"], [1, 1])
    with pytest.raises(ProbeError, match="1 texts but 2 labels"):
        fit_baselines(["a"], [0, 1])


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ProbeError, match=r"pip install 'vllm-streamguard\[probe\]'"):
        fit_baselines(["a b", "c d"], [0, 1])
