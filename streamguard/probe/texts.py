"""Labelled items as the served model reads them: token ids, and which of them are harmful."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from streamguard.probe.data import Item


@dataclass(frozen=True)
class Text:
    """One conversation of a prompt and a response, cut to what is read of it.

    prompt, response  int64[...] token ids; the prompt with the chat template around it.
    harmful           bool: the label of each token that is read, the response's or, for a probe of
                      prompts, the prompt's (the response is empty then).
    item              number of the item that it is made of; of a splice, that of the harmful part.
    length            tokens of the whole response, those beyond the cut included.
    onset             where a splice goes over to another text, -1 for a text as it came.
    """

    prompt: NDArray[np.int64]
    response: NDArray[np.int64]
    harmful: NDArray[np.bool_]
    item: int
    length: int
    onset: int = -1

    @property
    def label(self) -> int:
        """1 if any token of it is harmful."""
        return int(self.harmful.any())

    def cut(self, most: int) -> Text:
        """With `most` tokens of the response at most; a prompt is read whole."""
        if not len(self.response):
            return self
        return replace(self, response=self.response[:most], harmful=self.harmful[:most])


def encode(
    items: Sequence[Item],
    tokenizer: Any,
    *,
    max_prompt: int,
    max_response: int,
    stage: str = "output",
) -> Iterable[Text]:
    """Tokenize items one by one; a prompt that is too long loses its beginning.

    The response follows the chat template's generation prompt, as it does when it is generated.
    """
    for number, item in enumerate(items):
        prompt = chat_prompt(tokenizer, item.prompt)[-max_prompt:]
        if stage == "prompt":
            harmful = np.full(len(prompt), bool(item.label))
            yield Text(prompt, np.empty(0, np.int64), harmful, number, len(prompt))
            continue
        encoded = tokenizer(
            item.response, add_special_tokens=False,
            return_offsets_mapping=item.spans is not None and tokenizer.is_fast,
        )  # fmt: skip
        response = np.asarray(encoded["input_ids"], np.int64)
        harmful = np.full(len(response), bool(item.label))
        if item.spans is not None and tokenizer.is_fast:
            places = np.asarray(encoded["offset_mapping"]).reshape(-1, 2)
            harmful[:] = False
            for begin, end in item.spans:
                harmful |= (places[:, 0] < end) & (places[:, 1] > begin)
        cut = slice(max_response)
        yield Text(prompt, response[cut], harmful[cut], number, len(response))


def chat_prompt(tokenizer: Any, prompt: str, system: str | None = None) -> NDArray[np.int64]:
    """Token ids of a user's message with the chat template around it, up to the answer's beginning."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(f"{system}\n\n{prompt}\n" if system else f"{prompt}\n")["input_ids"]
    return np.asarray(ids, np.int64)


def splices(
    texts: Sequence[Text],
    benign: Sequence[int],
    harmful: Sequence[int],
    *,
    count: int,
    max_response: int,
    rng: np.random.Generator,
    first: tuple[int, int] = (8, 97),
    back: float = 0.25,
    middle: float = 0.5,
) -> list[Text]:
    """Benign responses that turn harmful at a known token, under the benign one's prompt.

    They go over to the harmful text's beginning or, a share of `middle` of them, into the midst of
    it; a share of `back` returns to the benign text, so that a probe reads the present rather than
    what came before.

    benign, harmful  numbers of the texts to take from: those that are gone over to may be benign, too,
                     and the onset is where another text begins then. count: how many are tried; a
                     text does not go over to itself. first: least and most benign
                     tokens (the second exclusive) before the onset.
    """
    made: list[Text] = []
    calm = [i for i in benign if len(texts[i].response) >= first[0] + 16]
    bad = [i for i in harmful if len(texts[i].response) >= 32 and texts[i].onset < 0]
    if not calm or not bad:
        return made
    for _ in range(count):
        a, b = texts[calm[rng.integers(len(calm))]], texts[bad[rng.integers(len(bad))]]
        if a is b:
            continue  # no turn
        onset = int(rng.integers(first[0], min(first[1], len(a.response) - 8)))
        enter = 0
        if rng.random() < middle:
            enter = int(rng.integers(0, max(1, len(b.response) - 48)))
        body = b.response[enter : enter + max_response - onset]
        parts = [a.response[:onset], body]
        labels = [np.zeros(onset, bool), b.harmful[enter : enter + len(body)]]
        if rng.random() < back:
            body = body[: int(rng.integers(16, 65))]
            rest = a.response[onset : onset + 64]
            parts = [parts[0], body, rest]
            labels = [labels[0], b.harmful[enter : enter + len(body)], np.zeros(len(rest), bool)]
        response = np.concatenate(parts)[:max_response]
        harm = np.concatenate(labels)[:max_response]
        made.append(
            replace(
                b,
                prompt=a.prompt,
                response=response,
                harmful=harm,
                length=len(response),
                onset=onset,
            )
        )
    return made
