"""What a probe must beat: the length of a text, and its words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamguard.errors import ProbeError
from streamguard.probe.bootstrap import auroc
from streamguard.probe.extra import need

LENGTH, KEYWORDS, FITTED_WORDS, TFIDF = "length", "keywords", "fitted words", "TF-IDF"
NUM_FITTED_WORDS = 50

#: Beginnings of words that texts about harm tend to hold, written by hand from general knowledge.
STEMS = (
    "abus", "arson", "assassin", "assault", "attack", "blackmail", "bomb", "bribe", "burglar",
    "counterfeit", "cyberattack", "detonat", "explosive", "exploit", "extort", "firearm", "forge",
    "fraud", "grenade", "hack", "harass", "hate", "hijack", "hostage", "illegal", "illicit",
    "kidnap", "kill", "launder", "malicious", "malware", "murder", "overdose", "phish", "poison",
    "racis", "ransom", "robber", "sabotage", "scam", "self-harm", "shoplift", "slur", "smuggl",
    "spyware", "stab", "stalk", "steal", "suicid", "terror", "theft", "threat", "toxin",
    "traffick", "undetected", "untraceable", "venom", "victim", "violen", "virus", "weapon",
)  # fmt: skip
_BY_HAND = re.compile(rf"\b(?:{'|'.join(map(re.escape, STEMS))})", re.IGNORECASE)
_WORD = re.compile(r"[a-z][a-z'-]+")


@dataclass(frozen=True)
class Baselines:
    """Fitted baselines; immutable. Make one with `fit_baselines`.

    length_sign      1 if long texts were the harmful ones, else -1.
    words            those of the data-driven list.
    vectorizer, model   of TF-IDF; None if the training texts hold no words.
    """

    length_sign: int
    words: frozenset[str]
    vectorizer: Any
    model: Any

    def score(self, texts: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """A number for each text by baseline, float64[num_texts]; higher = more harmful."""
        by_hand = [sum(1 for _ in _BY_HAND.finditer(text)) for text in texts]
        fitted = [sum(word in self.words for word in _words(text)) for text in texts]
        if self.model is None or not texts:
            tfidf = np.zeros(len(texts))
        else:
            tfidf = self.model.decision_function(self.vectorizer.transform(texts))
        return {
            LENGTH: self.length_sign * _lengths(texts),
            KEYWORDS: np.array(by_hand, np.float64),
            FITTED_WORDS: np.array(fitted, np.float64),
            TFIDF: np.asarray(tfidf, np.float64),
        }


def fit_baselines(texts: Sequence[str], labels: Sequence[int] | NDArray[Any]) -> Baselines:
    """Fit the baselines on the texts that the probe was fitted on; labels 1 = harmful.

    length        characters of the text; whether long or short is harmful is chosen here.
    keywords      how often words begin like one of `STEMS`; nothing is fitted.
    fitted words  how often the 50 words occur whose log-odds of being in a harmful text are highest.
    TF-IDF        words and pairs of words (sublinear, in 2 texts at least, 50,000 features at most),
                  logistic regression with balanced classes. 12 s of CPU for 14,000 answers.

    Raises ProbeError for labels of one class, counts that differ, or without scikit-learn.
    """
    label = np.asarray(labels)
    if len(texts) != len(label):
        raise ProbeError(f"{len(texts)} texts but {len(label)} labels; each text needs one.")
    harmful = int((label == 1).sum())
    if not 0 < harmful < len(label):
        raise ProbeError(
            f"baselines need texts of both labels; there are {harmful} harmful and "
            f"{len(label) - harmful} benign ones. Fit them on the probe's training texts."
        )
    vectorizer, model = _tfidf(texts, label)
    return Baselines(
        length_sign=1 if auroc(_lengths(texts), label) >= 0.5 else -1,
        words=_highest_log_odds(texts, label),
        vectorizer=vectorizer,
        model=model,
    )


def _lengths(texts: Sequence[str]) -> NDArray[np.float64]:
    return np.array([len(text) for text in texts], np.float64)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _highest_log_odds(texts: Sequence[str], label: NDArray[Any]) -> frozenset[str]:
    """The words whose share of harmful texts over benign ones is highest, smoothed by half a text.

    A word must be in 1% of the harmful texts: rarer ones have high odds by chance.
    """
    holding = {1: dict[str, int](), 0: dict[str, int]()}
    for text, of in zip(texts, label, strict=True):
        counts = holding[int(of == 1)]
        for word in set(_words(text)):
            counts[word] = counts.get(word, 0) + 1
    harmful, benign = holding[1], holding[0]
    num_harmful = int((label == 1).sum())
    num_benign = len(label) - num_harmful

    def log_odds(word: str) -> float:
        in_harmful, in_benign = harmful[word], benign.get(word, 0)
        return float(
            np.log((in_harmful + 0.5) / (num_harmful - in_harmful + 0.5))
            - np.log((in_benign + 0.5) / (num_benign - in_benign + 0.5))
        )

    least = max(1, num_harmful // 100)
    frequent = [word for word, count in harmful.items() if count >= least]
    # By name among equals, so that a fit can be repeated.
    return frozenset(sorted(frequent, key=lambda word: (-log_odds(word), word))[:NUM_FITTED_WORDS])


def _tfidf(texts: Sequence[str], label: NDArray[Any]) -> tuple[Any, Any]:
    of_text = need("sklearn.feature_extraction.text", "the baselines need")
    linear = need("sklearn.linear_model", "the baselines need")
    for least in (2, 1):
        vectorizer = of_text.TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, min_df=least, max_features=50_000
        )
        try:
            features = vectorizer.fit_transform(texts)
        except ValueError:  # no word is in that many texts
            continue
        model = linear.LogisticRegression(class_weight="balanced", max_iter=1000)
        return vectorizer, model.fit(features, label)
    return None, None
