"""A probe for a topic, without labelled data: the served model's own answers are the contrast.

The model answers prompts of the concept and others; the probe learns to tell the answers apart, and
spliced answers teach it where one becomes the other. What it has learnt is this model's way of
writing about the topic, which is what it will be shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamguard.errors import ProbeError
from streamguard.probe import choose, collect
from streamguard.probe.artifact import DataCard
from streamguard.probe.concept_file import Concept
from streamguard.probe.fit import Fitted, Step, assemble, check_layers, quiet
from streamguard.probe.model import ServedModel
from streamguard.probe.pool import Index, Pool
from streamguard.probe.prepare import FitOptions
from streamguard.probe.texts import Text, chat_prompt, splices

_LEAST_TOKENS = 8
#: Of the model's depth: topics are told apart best at about half of it.
_DEPTH = 0.55


def fit_concept(
    model: ServedModel,
    concept: Concept,
    path: Path,
    activations: Path,
    *,
    layer: int | str | None = None,
    seed: int = 0,
    engine_options: dict[str, Any] | None = None,
    step: Step = quiet,
) -> Fitted:
    """Fit a probe on what the model writes about a concept and about other things.

    Half of the prompts are trained on; a sixth chooses loss and statistic, and the benign answers to
    the others give the thresholds. path: of the concept file, for the card.

    Raises ProbeError if the model's answers are too short or too few to tell.
    """
    if layer is not None:
        check_layers(model, [layer])
    rng = np.random.default_rng(seed)
    options = FitOptions(head=concept.name, max_response=concept.max_tokens, seed=seed)
    prompts = [*concept.prompts, *concept.others]
    encoded = [chat_prompt(model.tokenizer, prompt, concept.system) for prompt in prompts]
    longest = max(map(len, encoded)) + 2 * concept.max_tokens + 2
    engine = collect.Engine(model.name, longest, dict(engine_options or {}))
    try:
        with step("the model answers", len(prompts) * concept.samples) as progress:
            answers = _answers(engine, encoded, concept, progress)
        texts = [
            Text(
                encoded[i],
                response,
                np.full(len(response), i < len(concept.prompts)),
                i,
                len(response),
            )
            for i, response in answers
            if len(response) >= _LEAST_TOKENS
        ]
        of_prompt = np.array([text.item for text in texts])
        parts = _parts(concept, of_prompt, rng)
        every, cut = list(texts), {}
        for name, chosen in parts.items():
            calm = [i for i in chosen if not texts[i].label]
            about = [i for i in chosen if texts[i].label]
            made = splices(
                texts, calm, about, count=len(about), max_response=2 * concept.max_tokens, rng=rng,
                first=(8, max(9, concept.max_tokens - 8)),
            )  # fmt: skip
            cut[name] = np.arange(len(every), len(every) + len(made))
            every += made
        layer = round(_DEPTH * model.card.num_layers) if layer is None else layer
        with step("reading hidden states", collect.num_tokens(every)) as progress:
            rows = collect.hidden_states(
                engine, every, [layer], activations / "concept",
                fingerprint=model.card.fingerprint, progress=progress,
            )  # fmt: skip
    finally:
        engine.close()
    about_it = np.array([[text.item < len(concept.prompts)] for text in every]).astype(np.int8)
    pool = Pool(every, rows.offsets, about_it, ["answers"] * len(every), rows.array[0])
    train = np.concatenate([parts["train"], cut["train"]])
    with step("training", 1) as progress:
        choices = choose.choose(pool, train, parts["select"], cut["select"], None, seed)
        progress(1)
    card = DataCard(
        name=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        role="fit",
        items=len(texts),
        positive=int(about_it[: len(texts)].sum()),
    )
    told = {"options": vars(options), "concept": concept.model_dump(exclude={"prompts", "others"})}
    probe = assemble(model, layer, [concept.name], choices, pool, parts["decide"], (card,), told)
    return Fitted(probe, None)


def _answers(
    engine: collect.Engine, encoded: Sequence[Any], concept: Concept, progress: Any
) -> list[tuple[int, np.ndarray]]:
    """(number of the prompt, token ids of an answer without its end token)."""
    from vllm import SamplingParams

    params = SamplingParams(
        n=concept.samples, temperature=concept.temperature, max_tokens=concept.max_tokens
    )
    found = []
    batch = max(1, 64 // concept.samples)
    for begin in range(0, len(encoded), batch):
        given = [{"prompt_token_ids": ids.tolist()} for ids in encoded[begin : begin + batch]]
        for number, output in enumerate(engine.llm.generate(given, params, use_tqdm=False), begin):
            for answer in output.outputs:
                ids = list(answer.token_ids)
                if answer.finish_reason == "stop":
                    ids = ids[:-1]
                found.append((number, np.array(ids, np.int64)))
        progress(len(given) * concept.samples)
    return found


def _parts(concept: Concept, of_prompt: Index, rng: np.random.Generator) -> dict[str, Index]:
    """Divide the answers by their prompts, both kinds alike. Raises ProbeError if one runs short."""
    parts: dict[str, list[int]] = {"train": [], "select": [], "decide": []}
    split = len(concept.prompts)
    for low, high, what in (
        (0, split, "prompts"),
        (split, split + len(concept.others), "others"),
    ):
        answered = rng.permutation(np.unique(of_prompt[(of_prompt >= low) & (of_prompt < high)]))
        if len(answered) < 4:
            raise ProbeError(
                f"only {len(answered)} of the concept's {what} were answered with {_LEAST_TOKENS} tokens "
                f"or more; at least 4 are needed. Ask for longer answers, or give more {what}."
            )
        half, sixth = len(answered) // 2, max(1, len(answered) // 6)
        for name, mine in (
            ("train", answered[:half]),
            ("select", answered[half : half + sixth]),
            ("decide", answered[half + sixth :]),
        ):
            parts[name] += np.flatnonzero(np.isin(of_prompt, mine)).tolist()
    return {name: np.array(chosen, np.int64) for name, chosen in parts.items()}
