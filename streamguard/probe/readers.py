"""What the rows of labelled data mean: the native form and those of public data sets.

A form is recognised by the keys of a row. Field names are those of the data sets' own cards:

native           prompt, response, label; optional source, category, spans, refusal, licence,
                 prompt_id. Further keys are ignored.
BeaverTails      prompt, response, category {name: bool}, is_safe.
                 Ji et al. 2023, PKU-Alignment/BeaverTails, CC-BY-NC-4.0.
WildGuardMix     prompt, response, prompt_harm_label, response_harm_label (harmful | unharmful |
                 null), response_refusal_label (refusal | compliance | null), subcategory.
                 Han et al. 2024, allenai/wildguardmix, ODC-BY.
ToxicChat        user_input, model_output, toxicity, jailbreaking (0 | 1). The labels are of the
                 user's input. Lin et al. 2023, lmsys/toxic-chat, CC-BY-NC-4.0.
XSTest-Response  prompt, response, label (harmful | unharmful), prompt_type. Its other split has
                 refusal | compliance, which says nothing of harm. allenai/xstest-response, ODC-BY.
XSTest           prompt, type, label (safe | unsafe), focus, note; prompts only. Files from before
                 there was a label: type begins with contrast_ where the prompt is unsafe.
                 Röttger et al. 2023, paul-rottger/exaggerated-safety, CC-BY-4.0.
Do-Not-Answer    question, risk_area, types_of_harm, specific_harms, and for each of six models
                 MODEL_response, MODEL_harmful (0 | 1). Wang et al. 2023, LibrAI/do-not-answer,
                 Apache-2.0.
HarmBench        {behavior id: [{test_case, generation, label}]} as its evaluation writes, or
                 human_0, human_1, human_2 in place of label as in its classifiers' validation set
                 (the majority counts); also flat rows with behavior. Mazeika et al. 2024,
                 centerforaisafety/HarmBench, MIT.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from streamguard.policy_errors import found, show
from streamguard.probe.data_files import keys_shown
from streamguard.probe.items import HARMFUL, HARMLESS, Item, Stage, prompt_digest

#: Words for a label, whatever their case. Numbers 0 and 1 and booleans (true = harmful) as well.
LABELS = {
    "1": HARMFUL,
    "true": HARMFUL,
    "yes": HARMFUL,
    "harmful": HARMFUL,
    "unsafe": HARMFUL,
    "0": HARMLESS,
    "false": HARMLESS,
    "no": HARMLESS,
    "harmless": HARMLESS,
    "unharmful": HARMLESS,
    "safe": HARMLESS,
    "benign": HARMLESS,
}
LABEL_WORDS = "0 or 1, true or false, harmful or unharmful, unsafe or safe"
_BOOLEANS = {"true": True, "1": True, "yes": True, "refusal": True}
_BOOLEANS |= {"false": False, "0": False, "no": False, "compliance": False}
_PROMPT_TYPES = {"prompt_harmful": HARMFUL, "prompt_unsafe": HARMFUL, "prompt_safe": HARMLESS}
_NATIVE = "prompt, response and label (at stage prompt: prompt and label)"


class BadRowError(Exception):
    """A row that cannot be used; the message says what was found and what is needed."""


class WrongFormError(Exception):
    """A file whose form cannot serve at all, with the reason and the remedy."""


@dataclass(frozen=True)
class Skip:
    """A row that its form leaves without a label; `reason` follows a count: "3 rows without …"."""

    reason: str


@dataclass(frozen=True)
class Bad:
    """A part of a row that cannot be used, where its other parts can."""

    problem: str


Found = Item | Skip | Bad
Values = dict[str, Any]


def items_of(values: Values, stage: Stage, stem: str) -> Iterator[Found]:
    """Turn one row into items, skips and problems, whichever form it has.

    stem  source of rows that name none.

    Raises BadRowError, or WrongFormError if no row of this form can serve.
    """
    read = form_of(values)
    if read is None:
        raise BadRowError(
            f"no known form: the keys are {keys_shown(values)}; needed: {_NATIVE}, or those of "
            f"BeaverTails, WildGuardMix, ToxicChat, XSTest, Do-Not-Answer or HarmBench."
        )
    yield from read(values, stage, stem)


def form_of(values: Values) -> Callable[[Values, Stage, str], Iterator[Found]] | None:
    """The reader of a row's form, told by its keys; None if no form has them."""
    keys = values.keys()
    for needed, read in _FORMS:
        if needed <= keys:
            return read
    if "question" in keys and any(key.endswith("_harmful") for key in keys):
        return _do_not_answer
    return None


def _native(values: Values, stage: Stage, stem: str) -> Iterator[Found]:
    yield _item(values, stage, stem, label=_label(values, "label"))


def _beavertails(values: Values, stage: Stage, stem: str) -> Iterator[Found]:
    _response_labels_only("BeaverTails", stage)
    category = values.get("category")
    if category is not None and not isinstance(category, dict):
        raise BadRowError(f"category is {found(category)}; needed: {{name: true or false}}.")
    harms = sorted(str(name) for name, is_so in (category or {}).items() if is_so)
    # Their is_safe is the label of the whole; the categories only say which kind of harm.
    label = HARMLESS if _flag(values, "is_safe") else HARMFUL
    yield _item(values, stage, stem, label=label, category="|".join(harms) or None)


def _wildguard(values: Values, stage: Stage, stem: str) -> Iterator[Found]:
    key = "response_harm_label" if stage == "output" else "prompt_harm_label"
    if _is_null(values.get(key)):
        yield Skip(f"rows without {key}")
        return
    yield _item(
        values,
        stage,
        stem,
        label=_label(values, key),
        category=_text(values, "subcategory"),
        refusal=_optional_flag(values, "response_refusal_label"),
    )


def _toxicchat(values: Values, stage: Stage, stem: str) -> Iterator[Found]:
    if stage == "output":
        raise WrongFormError(
            "this is ToxicChat, whose labels are of the user's input and not of the model's output; "
            "a probe of outputs fitted on them would learn the prompts. Use it at stage prompt."
        )
    harmful = max(_label(values, "toxicity"), _label(values, "jailbreaking", HARMLESS))
    yield _item({**values, "prompt": values.get("user_input")}, stage, stem, label=harmful)


def _xstest_response(values: Values, stage: Stage, stem: str) -> Iterator[Found]:
    category = _text(values, "prompt_harm_category")
    if str(values.get("label")).strip().lower() in ("refusal", "compliance"):
        raise WrongFormError(
            "this is the split response_refusal of XSTest-Response, whose labels say refusal or "
            "compliance and not harm. Use the split response_harmfulness."
        )
    if stage == "output":
        label = _label(values, "label")
    else:
        kind = str(values.get("prompt_type"))
        if kind not in _PROMPT_TYPES:
            raise BadRowError(
                f"prompt_type is {found(kind)}; needed: {' or '.join(_PROMPT_TYPES)}."
            )
        label = _PROMPT_TYPES[kind]
    yield _item(values, stage, stem, label=label, category=category)


def _xstest_prompts(values: Values, stage: Stage, stem: str) -> Iterator[Found]:
    if "response" in values:
        yield from _native(values, stage, stem)
        return
    if stage == "output":
        raise WrongFormError(
            "these are XSTest's prompts, without responses; there is nothing for a probe of outputs "
            "to read. Use XSTest-Response, or these at stage prompt."
        )
    kind = _text(values, "type")
    if "label" in values:
        label = _label(values, "label")
    elif kind is None:
        raise BadRowError("type is null; needed, without a label: the kind of prompt.")
    else:
        label = HARMFUL if kind.startswith("contrast_") else HARMLESS
    yield _item(values, stage, stem, label=label, category=kind)


def _do_not_answer(values: Values, stage: Stage, stem: str) -> Iterator[Found]:
    _response_labels_only("Do-Not-Answer", stage)
    category = _text(values, "types_of_harm") or _text(values, "risk_area")
    row = {**values, "prompt": values.get("question")}
    models = [key.removesuffix("_harmful") for key in values if key.endswith("_harmful")]
    for model in models:
        key = f"{model}_harmful"
        if _is_null(values[key]):
            yield Skip(f"answers without {key}")
            continue
        try:
            row["response"] = values.get(f"{model}_response")
            yield _item(row, stage, stem, label=_label(values, key), category=category)
        except BadRowError as error:
            yield Bad(f"{show(model)}: {error}")


def _harmbench(values: Values, stage: Stage, stem: str) -> Iterator[Found]:
    _response_labels_only("HarmBench", stage)
    case = values.get("test_case")
    prompt = case if not _is_null(case) else values.get("behavior")
    if isinstance(prompt, list | dict):
        raise BadRowError(f"test_case is {found(prompt)}; needed: text (images are not read).")
    votes = [key for key in ("human_0", "human_1", "human_2") if not _is_null(values.get(key))]
    if not _is_null(values.get("label")):
        label = _label(values, "label")
    elif votes:
        share = sum(_label(values, key) for key in votes) / len(votes)
        if share == 0.5:
            raise BadRowError(f"{len(votes)} human labels that disagree; needed: a majority.")
        label = HARMFUL if share > 0.5 else HARMLESS
    else:
        raise BadRowError(
            f"no label: the keys are {keys_shown(values)}; needed: label, or human_0, human_1 and "
            f"human_2. Completions are labelled by HarmBench's evaluate_completions.py."
        )
    row = {**values, "prompt": prompt, "response": values.get("generation")}
    # All attacks on one behaviour ask for the same thing, so they stay in one part of a split.
    row["prompt_id"] = (
        values.get("prompt_id") or values.get("behavior_id") or values.get("behavior")
    )
    yield _item(row, stage, stem, label=label)


_FORMS: tuple[tuple[set[str], Callable[[Values, Stage, str], Iterator[Found]]], ...] = (
    ({"prompt", "prompt_harm_label", "response_harm_label"}, _wildguard),
    ({"user_input", "toxicity"}, _toxicchat),
    ({"prompt", "response", "is_safe"}, _beavertails),
    ({"generation", "test_case"}, _harmbench),
    ({"generation", "behavior"}, _harmbench),
    ({"prompt", "response", "label", "prompt_type"}, _xstest_response),
    ({"prompt", "type", "focus"}, _xstest_prompts),
    ({"prompt", "type", "label"}, _xstest_prompts),
    ({"prompt", "label"}, _native),
)


def _response_labels_only(name: str, stage: Stage) -> None:
    if stage == "prompt":
        raise WrongFormError(
            f"this is {name}, whose labels are of responses and not of prompts. Use it at stage "
            f"output, or write prompt and label of your own."
        )


def _item(
    values: Values,
    stage: Stage,
    stem: str,
    *,
    label: int,
    category: str | None = None,
    refusal: bool | None = None,
) -> Item:
    prompt = _needed_text(values, "prompt")
    # At stage prompt the response is not read; keeping it would only tie prompts together.
    response = _needed_text(values, "response") if stage == "output" else ""
    if category is None and not isinstance(values.get("category"), dict):
        category = _text(values, "category")
    if refusal is None and "refusal" in values:
        refusal = _optional_flag(values, "refusal")
    return Item(
        prompt=prompt,
        response=response,
        label=label,
        source=_text(values, "source") or stem,
        prompt_id=_text(values, "prompt_id") or prompt_digest(prompt),
        category=category,
        refusal=refusal,
        spans=_spans(values, response, label) if stage == "output" else None,
        licence=_text(values, "licence") or _text(values, "license"),
    )


def _needed_text(values: Values, key: str) -> str:
    value = values.get(key)
    if key not in values:
        raise BadRowError(f"no {key}: the keys are {keys_shown(values)}; needed: {_NATIVE}.")
    if not isinstance(value, str):
        raise BadRowError(f"{key} is {found(value)}; needed: text.")
    if not value.strip():
        raise BadRowError(
            f"{key} is empty; needed: text, since a label of nothing teaches nothing."
        )
    return _encodable(value, key)


def _encodable(value: str, key: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise BadRowError(
            f"{key} holds half a character (U+{code:04X} at {error.start}), which no tokenizer "
            f"reads; needed: whole ones. Escapes of such characters come in pairs."
        ) from None
    return value


def _text(values: Values, key: str) -> str | None:
    """Text of a key that may be missing or null; numbers as they are written (ids)."""
    value = values.get(key)
    if _is_null(value) or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRowError(f"{key} is {found(value)}; needed: text.")
    return _encodable(value, key)


def _is_null(value: object) -> bool:
    # A missing number comes out of Parquet and pandas as NaN, the one value unequal to itself.
    return value is None or value != value


def _lookup(value: object, table: dict[str, Any]) -> Any:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | int | str):
        return table.get(str(value).strip().lower().removesuffix(".0"))
    return None


def _label(values: Values, key: str, default: int | None = None) -> int:
    value = values.get(key)
    if default is not None and _is_null(value):
        return default
    label = _lookup(value, LABELS)
    if label is None:
        raise BadRowError(f"{key} is {found(value)}; needed: {LABEL_WORDS}.")
    return int(label)


def _flag(values: Values, key: str) -> bool:
    value = _lookup(values.get(key), _BOOLEANS)
    if value is None:
        raise BadRowError(f"{key} is {found(values.get(key))}; needed: true or false.")
    return bool(value)


def _optional_flag(values: Values, key: str) -> bool | None:
    return None if _is_null(values.get(key)) else _flag(values, key)


def _spans(values: Values, response: str, label: int) -> tuple[tuple[int, int], ...] | None:
    value = values.get("spans")
    if _is_null(value):
        return None
    if isinstance(value, str):  # as CSV has to write it
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRowError(f"spans is {found(value)}; needed: [[start, end], …].") from None
    if not isinstance(value, list):
        raise BadRowError(f"spans is {found(value)}; needed: [[start, end], …].")
    if bool(value) != (label == HARMFUL):
        what = "spans in a text with label 0" if value else "label 1 with an empty list of spans"
        raise BadRowError(f"{what}; needed: spans where the harm is, or no spans if not known.")
    merged: list[tuple[int, int]] = []
    for pair in sorted(value, key=str) if not all(map(_is_pair, value)) else sorted(value):
        if not _is_pair(pair) or not 0 <= pair[0] < pair[1] <= len(response):
            shown = json.dumps(pair)[:80]
            raise BadRowError(
                f"span {shown} of a response of {len(response)} characters; needed: [start, end] "
                f"with 0 <= start < end <= {len(response)}."
            )
        if merged and pair[0] <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], pair[1]))
        else:
            merged.append((pair[0], pair[1]))
    return tuple(merged)


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(part, int) and not isinstance(part, bool) for part in value)
    )
