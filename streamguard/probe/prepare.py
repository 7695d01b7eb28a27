"""Items divided, encoded and spliced for a fit; and again, equally, for judging it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamguard.errors import ProbeError
from streamguard.probe import collect
from streamguard.probe.data import Data, Item, Splits, check_balance, check_leakage, split
from streamguard.probe.model import ServedModel
from streamguard.probe.pool import Index, Pool, drawn, heads_of
from streamguard.probe.texts import Text, encode, splices
from streamguard.probe.train import LOSSES

_SWEEP_TEXTS = 1000
_PARTS = ("train", "calibration", "test", "held_out")


@dataclass(frozen=True)
class FitOptions:
    """What a fit may be told.

    layers        candidate layers; None = about eight over the model's depth. The best is taken.
    loss          one of LOSSES; None = all are tried.
    head          name of the first head. categories: one more for each category with enough items.
    hold_out      sources that are kept for the test alone.
    max_items     most items that are read, evenly over sources and labels; None = all.
    max_response  tokens of a response that are read; max_prompt: of a prompt, its last ones.
    splice        spliced texts to train on, as a share of the harmful ones.
    baselines     whether the card has the figures of length, keywords and TF-IDF too.
    """

    layers: tuple[int | str, ...] | None = None
    loss: str | None = None
    head: str = "harm"
    categories: bool = False
    stage: str = "output"
    hold_out: tuple[str, ...] = ()
    max_items: int | None = None
    max_response: int = 160
    max_prompt: int = 256
    splice: float = 0.4
    baselines: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss is not None and self.loss not in LOSSES:
            raise ProbeError(f"loss {self.loss!r} is unknown; allowed: {', '.join(LOSSES)}.")


@dataclass
class Prepared:
    """Items divided, encoded and spliced: a function of the data, the tokenizer and the options.

    every    the items' texts, then the spliced ones. part, spliced: their numbers by split.
    used     the numbers that are read, in the order of the rows. swept: those of the layer sweep.
    """

    items: Sequence[Item]
    splits: Splits
    heads: tuple[str, ...]
    labels: NDArray[np.int8]
    every: list[Text]
    part: dict[str, Index]
    spliced: dict[str, Index]
    swept: Index
    rng: np.random.Generator

    @property
    def used(self) -> Index:
        """What is read."""
        return np.concatenate([*self.part.values(), *self.spliced.values()])

    @property
    def used_items(self) -> list[Item]:
        """The item behind each text that is read; of a splice, that of its harmful part."""
        return [self.items[self.every[i].item] for i in self.used]

    def pool(
        self, rows: collect.Rows, used: Index | None = None
    ) -> tuple[Pool, dict[str, Index], dict[str, Index]]:
        """The texts that were read with their rows, and `part` and `spliced` as numbers in it."""
        used = self.used if used is None else used
        of_item = np.array([self.every[i].item for i in used])
        place = np.full(len(self.every), -1)
        place[used] = np.arange(len(used))
        array = rows.array[0] if rows.array.ndim == 3 else rows.array
        pool = Pool(
            [self.every[i] for i in used], rows.offsets, self.labels[of_item],
            [self.items[i].source for i in of_item], array,
        )  # fmt: skip
        here = {name: place[chosen] for name, chosen in self.part.items()}
        return pool, here, {name: place[chosen] for name, chosen in self.spliced.items()}


def prepare(data: Data, model: ServedModel, options: FitOptions) -> Prepared:
    """Divide, encode and splice, the same each time for the same data, model and options.

    Raises ProbeError for items that cannot support a fit.
    """
    rng = np.random.default_rng(options.seed)
    items = data.items
    if options.max_items is not None:
        kept = drawn(items, np.arange(len(items)), options.max_items, rng)
        items = tuple(items[i] for i in kept)
    splits = split(items, hold_out=options.hold_out, seed=options.seed)
    check_leakage(items, splits)
    check_balance(items, splits.train, "the training split")
    check_balance(items, splits.calibration, "the calibration split", least=10)
    part = {name: np.asarray(getattr(splits, name), np.int64) for name in _PARTS}
    heads, labels = heads_of(items, options.head, options.categories, part["train"])
    limits = {"max_prompt": options.max_prompt, "max_response": options.max_response}
    texts = list(encode(items, model.tokenizer, **limits, stage=options.stage))
    fitting = np.concatenate([part["train"], part["calibration"]])
    swept = drawn(items, fitting, _SWEEP_TEXTS, rng)
    every, spliced = _with_splices(texts, labels[:, 0], part, options, rng)
    return Prepared(items, splits, heads, labels, every, part, spliced, swept, rng)


def _with_splices(
    texts: list[Text],
    label: NDArray[np.int8],
    part: dict[str, Index],
    options: FitOptions,
    rng: np.random.Generator,
) -> tuple[list[Text], dict[str, Index]]:
    """All texts, and for each part the numbers of the spliced ones made of its own texts."""
    every, made_of = list(texts), {}
    for name, chosen in part.items():
        calm, bad = chosen[label[chosen] == 0].tolist(), chosen[label[chosen] == 1].tolist()
        count = 0 if options.stage == "prompt" else int(len(bad) * options.splice)
        if name in ("test", "held_out"):
            made = judged_splices(texts, calm, bad, min(count, 400), options, rng)
        else:
            made = splices(
                texts, calm, bad, count=count, max_response=options.max_response, rng=rng
            )
        made_of[name] = np.arange(len(every), len(every) + len(made), dtype=np.int64)
        every += made
    return every, made_of


def judged_splices(
    texts: list[Text],
    calm: list[int],
    bad: list[int],
    count: int,
    options: FitOptions,
    rng: np.random.Generator,
) -> list[Text]:
    """Texts that turn harmful behind 64 benign tokens; then as many that turn to benign ones there.

    Nothing is trained on the latter: a probe that takes fewer of their turns for harm takes fewer of
    the others, too.
    """
    made: list[Text] = []
    for others, drawing in ((bad, rng), (calm, np.random.default_rng([options.seed, len(calm)]))):
        made += splices(
            texts, calm, others, count=count, max_response=options.max_response, rng=drawing,
            first=(64, 65), back=0.0, middle=0.0,
        )  # fmt: skip
    return made
