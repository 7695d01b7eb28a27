"""The words a policy file may use: limits, enumerations and the pydantic models of its mappings.

What a later version will honour is known here already (`_NOT_YET`), so that a policy written for
it is refused with what to do instead, not as a misspelling.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from streamguard.policy_errors import Problems, did_you_mean, explain, show, unknown_key, wrong_type

MAX_RULES = 1024
MAX_PATTERN_BYTES = 4096
MAX_PATTERNS = 1_000_000
MAX_MESSAGE_BYTES = 4096
#: Of one policy. Each takes a moment to compile; plain strings belong to literals.
MAX_REGEXES = 256

SEVERITY = ("halt", "redirect", "mask", "redact", "observe")
# fmt: off
CATEGORIES = (
    # hazard codes of AILuminate
    "vcr", "src", "cse", "ssh", "iwp", "ipv", "dfm", "ncr", "hte", "prv", "spc", "sxc",
    # ours
    "secret", "pii", "sysleak", "brand", "custom",
)
# fmt: on
STAGES = ("output", "prompt", "both")
NORMAL_FORMS = ("case", "width", "zero-width", "confusables", "leet", "marks", "separators")
BOUNDARIES = ("none", "word")
#: Checksums, as `compiler.regex_checksums` computes them.
VALIDATORS = ("luhn", "iban")
ON_ERROR = ("block", "pass")

# Words of the schema that this version knows but cannot honour, and what to do instead. Support
# for one is added by deleting its line (and, for a key, adding the field to its schema below).
_NOT_YET: dict[str, dict[str, str]] = {
    "action": {
        "redact": "Use mask (the model goes on without the match) or halt.",
    },
    # Of patterns: see `stage_of_patterns`.
    "stage": {
        "prompt": "Use output, which checks what the model writes.",
        "both": "Use output, which checks what the model writes.",
    },
    "key": {},
}

ACTIONS = tuple(action for action in SEVERITY if action not in _NOT_YET["action"])

_ID = re.compile(r"[a-z0-9-]{1,64}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def _not_yet(kind: str, word: str, allowed: Iterable[str]) -> str:
    return (
        f"{kind} {show(word)} is not supported by this version; allowed: {', '.join(allowed)}. "
        f"{_NOT_YET[kind][word]}"
    )


def _word(
    kind: str, words: tuple[str, ...], later: Mapping[str, str] | None = None
) -> Callable[[str], str]:
    """Make the check of an enumerated value, apart for known-but-later and for unknown words.

    later  the former, with what to do instead; those of `_NOT_YET` if None.
    """
    later = _NOT_YET.get(kind, {}) if later is None else later
    allowed = [word for word in words if word not in later]

    def check(value: str) -> str:
        if value in later:
            raise ValueError(_not_yet(kind, value, allowed))
        if value not in allowed:
            hint = did_you_mean(value, allowed) or " Choose one of these."
            raise ValueError(
                f"unknown {kind} {show(value)}; allowed: {', '.join(allowed)}. "
                f"What is not understood would not be guarded.{hint}"
            )
        return value

    return check


def _identifier(key: str, form: re.Pattern[str], allowed: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not form.fullmatch(value):
            raise ValueError(
                f"{key} is {show(value)}; allowed: 1..64 characters of {allowed}, since it goes "
                f"into metrics and responses. Rename it."
            )
        return value

    return check


def stage_of_patterns(stage: str) -> str | None:
    """Say why patterns cannot be looked for at a stage that only a probe can read, or None."""
    return _not_yet("stage", stage, ["output"]) if stage in _NOT_YET["stage"] else None


def text_fault(text: str) -> str | None:
    """Say why a string cannot be matched or sent, or None."""
    if "\ufffd" in text:
        return "holds U+FFFD, which broken UTF-8 is read as and no text can match reliably"
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        return "holds a lone surrogate, which is no character and has no UTF-8 form"
    return None


def _message(value: str) -> str:
    fault = text_fault(value)
    if fault:
        raise ValueError(f"message {show(value)} {fault}. Write the text that is meant.")
    size_bytes = len(value.encode())
    if not value.strip() or size_bytes > MAX_MESSAGE_BYTES:
        raise ValueError(
            f"message is {size_bytes} bytes long; allowed: 1..{MAX_MESSAGE_BYTES}, not only white "
            f"space, since the client reads it in place of the answer. Give such a text."
        )
    return value


def _not_negative(key: str) -> Callable[[float], float]:
    def check(value: float) -> float:
        if not 0 <= value < float("inf"):
            raise ValueError(
                f"{key} is {show(value)}; allowed: 0 or more, in units of the score. Correct it."
            )
        return value

    return check


def _in_order(forms: list[str]) -> list[str]:
    """Give normal forms one order: as a set they mean the same, and so must hash the same."""
    return sorted(set(forms), key=NORMAL_FORMS.index)


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value  # tuples come from Python, not YAML


_Forms = Annotated[
    list[Annotated[str, AfterValidator(_word("normalize", NORMAL_FORMS))]],
    BeforeValidator(_as_list),
    AfterValidator(_in_order),
]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_S = TypeVar("_S", bound=_Schema)


class DefaultsSchema(_Schema):
    on_error: Annotated[str, AfterValidator(_word("on_error", ON_ERROR))] = "block"
    normalize: _Forms = []


class RuleSchema(_Schema):
    id: Annotated[str, AfterValidator(_identifier("id", _ID, "a-z, 0-9 and -"))]
    category: Annotated[str, AfterValidator(_word("category", CATEGORIES))] = "custom"
    stage: Annotated[str, AfterValidator(_word("stage", STAGES, later={}))] = "output"
    # Items are checked by _patterns: one pydantic error each would drown a long list.
    literals: Annotated[list[Any], BeforeValidator(_as_list)] = []
    literals_file: str = ""
    # The syntax of each is checked by regex_rules.
    regexes: Annotated[list[Any], BeforeValidator(_as_list)] = []
    # By another name here: pydantic's models have a method `validate`.
    validator: Annotated[str, AfterValidator(_word("validate", VALIDATORS))] = Field(
        "", alias="validate"
    )
    normalize: _Forms = []
    boundary: Annotated[str, AfterValidator(_word("boundary", BOUNDARIES))] = "none"
    action: Annotated[str, AfterValidator(_word("action", SEVERITY))]
    message: Annotated[str, AfterValidator(_message)] = ""
    # In place of patterns; policy_probes checks how they go together.
    probe: str = ""
    threshold: Any = None
    head: str = ""
    hysteresis: Annotated[float, AfterValidator(_not_negative("hysteresis"))] = 0.0


class ThresholdSchema(_Schema):
    fpr: float | None = None
    confidence: float | None = None


class PolicySchema(_Schema):
    version: int
    name: Annotated[
        str, AfterValidator(_identifier("name", _NAME, "a-z, A-Z, 0-9, dot, - and _"))
    ] = "default"
    client_selectable: bool = False
    extends: Annotated[list[str], BeforeValidator(_as_list)] = []
    defaults: DefaultsSchema = DefaultsSchema()
    rules: Any = None


def _keys(schema: type[_Schema]) -> list[str]:
    """The keys of a mapping as a policy file writes them."""
    return [field.alias or name for name, field in schema.model_fields.items()]


def validate(schema: type[_S], data: Any, place: str, problems: Problems) -> _S | None:
    """Check `data` against `schema`; note the problems under `place`, or return the model."""
    unusable, keys = False, _keys(schema)
    if isinstance(data, Mapping):
        later = [key for key in _NOT_YET["key"] if key in data and key not in keys]
        for key in later:
            problems.add(place + _not_yet("key", key, keys))
        # `yes:` and `1:` are no strings in YAML; pydantic would name them by another key.
        misread = [key for key in data if not isinstance(key, str)]
        for key in misread:
            problems.add(place + unknown_key(key, keys))
        data = {key: data[key] for key in data if isinstance(key, str) and key not in later}
        unusable = bool(later or misread)
    try:
        model = schema.model_validate(data)
    except ValidationError as error:
        for entry in error.errors(include_url=False):
            in_defaults = entry["loc"][:1] == ("defaults",)
            allowed = _keys(DefaultsSchema) if in_defaults else keys
            what = (
                explain(entry, allowed)
                if entry["loc"]
                else wrong_type("the rule", data, "a mapping")
            )
            problems.add(place + what)
        return None
    return None if unusable else model
