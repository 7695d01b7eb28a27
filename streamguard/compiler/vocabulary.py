"""What each token of a tokenizer adds to the text that a client reads."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from streamguard.errors import TokenizerError

#: Names under which vocabularies keep ids for later use.
_RESERVED = re.compile(r"reserved|unused|extra_?\d|placeholder|dummy|^<SPECIAL_\d+>$", re.I)
#: Names of special tokens that a model may have a use for in its output.
_USED = re.compile(
    r"image|audio|video|vision|box|quad|object|tool|think|im_start|im_end|eot|eom|eos|bos|turn"
    r"|mask|fim|channel|message|call|return|end|start|assistant|user|system|code|python|sep",
    re.I,
)
_CHECKED_TOKENS = 2000


@dataclass(frozen=True)
class Vocabulary:
    """A model's vocabulary as bytes. Make one with `Vocabulary.from_tokenizer`.

    token_bytes  per token id the UTF-8 (or part of a character) that it adds to the text; b"" for
                 ids that the tokenizer does not know.
    special      uint8[num_tokens], 1 = left out when a reader skips special tokens (the default).
    eos_token_ids  ids that end a text by themselves.
    spare        ids that neither tokenizer nor model has a use for in output, best first.
    """

    token_bytes: tuple[bytes, ...]
    special: np.ndarray
    eos_token_ids: tuple[int, ...] = ()
    spare: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.token_bytes)

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64[num_tokens + 1] into `data`."""
        lengths = np.fromiter(map(len, self.token_bytes), np.int64, len(self.token_bytes))
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    @cached_property
    def data(self) -> np.ndarray:
        """uint8[num_bytes]: all token bytes, one after another."""
        return np.frombuffer(bytearray(b"".join(self.token_bytes)), np.uint8)

    @cached_property
    def sha256(self) -> str:
        """Identifies the vocabulary: token bytes, order and special flags."""
        digest = hashlib.sha256(self.data.tobytes())
        digest.update(self.offsets.tobytes())
        digest.update(self.special.tobytes())
        return digest.hexdigest()

    @classmethod
    def empty(cls) -> Vocabulary:
        """No tokens: enough to scan text."""
        return cls((), np.zeros(0, np.uint8))

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        eos_token_ids: tuple[int, ...] | None = None,
    ) -> Vocabulary:
        """Read the token bytes of a fast Hugging Face tokenizer, or of one in a folder.

        vocab_size  of the model's output layer, padding included; the tokenizer's own if None.
        eos_token_ids  the model's (generation_config.json); the tokenizer's own if None.
        Raises TokenizerError if the tokenizer cannot be read, does not fit the model, or decodes in
        a way that token bytes cannot follow (checked on 2,000 tokens).
        Source of the bytes: xgrammar.TokenizerInfo (byte-level and byte-fallback conventions).
        """
        if isinstance(tokenizer, str | Path):
            tokenizer = _load(tokenizer)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor wraps its tokenizer
        backend = getattr(tokenizer, "_tokenizer", None)
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if backend is None:
            raise TokenizerError(
                f"{name}: not a fast tokenizer (no tokenizers backend), so the bytes of its tokens "
                f"are not known. Convert it: AutoTokenizer.from_pretrained(..., use_fast=True)"
                f".save_pretrained(DIR), and serve with --tokenizer DIR."
            )
        known = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        size = known if vocab_size is None else vocab_size
        if known > size:
            raise TokenizerError(
                f"{name}: the tokenizer has token ids up to {known - 1}, the model only {size} "
                f"logits. They do not belong together: patterns could not be matched reliably. "
                f"Give the model's own tokenizer with --tokenizer."
            )
        token_bytes = _ordinary_bytes(tokenizer, backend, size)
        special = np.zeros(size, np.uint8)
        added = backend.get_added_tokens_decoder()
        anchor = next(
            (i for i in range(known) if i not in added and token_bytes[i].isalpha()), None
        )
        for token_id, token in added.items():
            token_bytes[token_id] = _added_text(backend, token_id, token.content, anchor).encode()
            special[token_id] = token.special
        if anchor is not None:
            _check(name, backend, token_bytes, set(added), known, anchor)
        if eos_token_ids is None:
            eos = tokenizer.eos_token_id
            eos_token_ids = () if eos is None else (int(eos),)
        vocabulary = cls(tuple(token_bytes), special, tuple(eos_token_ids))
        spare = _spare_ids(tokenizer, vocabulary, known, added)
        return cls(vocabulary.token_bytes, special, vocabulary.eos_token_ids, spare)


def _load(path: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … alike
        reason = str(error).strip().splitlines()
        raise TokenizerError(
            f"{path}: no tokenizer can be loaded from here "
            f"({reason[0] if reason else type(error).__name__}). Give a folder with "
            f"tokenizer.json, as save_pretrained writes it, or a model name in the local cache."
        ) from None


def _ordinary_bytes(tokenizer: Any, backend: Any, size: int) -> list[bytes]:
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size)
    token_bytes = list(info.decoded_vocab)[:size]
    token_bytes += [b""] * (size - len(token_bytes))
    if info.vocab_type == xgrammar.VocabType.RAW and "Metaspace" in str(backend.decoder):
        # Unigram without byte fallback: xgrammar leaves the marker for a space as it stands.
        token_bytes = [piece.replace("▁".encode(), b" ") for piece in token_bytes]
    known = set(backend.get_vocab(with_added_tokens=True).values())
    return [piece if i in known else b"" for i, piece in enumerate(token_bytes)]


def _added_text(backend: Any, token_id: int, content: str, anchor: int | None) -> str:
    """What an added token reads as: decoders apply to it too (`▁` may become a space)."""
    if anchor is None:
        return content
    before = backend.decode([anchor], skip_special_tokens=False)
    both = backend.decode([anchor, token_id], skip_special_tokens=False)
    shown = str(both.removeprefix(before))
    return content if "\ufffd" in shown else shown


def _check(
    name: str, backend: Any, token_bytes: list[bytes], added: set[int], known: int, anchor: int
) -> None:
    """Decode a sample of tokens behind an anchor, as a detokenizer does, and compare."""
    before = backend.decode([anchor], skip_special_tokens=False)
    step = max(1, known // _CHECKED_TOKENS)
    for token_id in range(0, known, step):
        if token_id in added:
            continue
        try:
            expected = token_bytes[token_id].decode()
        except UnicodeDecodeError:
            continue  # a part of a character shows only together with its other parts
        got = backend.decode([anchor, token_id], skip_special_tokens=False)
        if got != before + expected and "\ufffd" not in got:
            raise TokenizerError(
                f"{name}: token {token_id} decodes to {got[len(before) :]!r} after {before!r}, but "
                f"its bytes read {expected!r}; token bytes do not follow this tokenizer's decoder, "
                f"so patterns could be missed. Byte-level BPE, SentencePiece BPE and Unigram "
                f"vocabularies are supported."
            )


def _spare_ids(
    tokenizer: Any, vocabulary: Vocabulary, known: int, added: dict[int, Any]
) -> tuple[int, ...]:
    """Ids for verdicts: vocabulary padding, reserved and idle specials, then unk, pad, bos."""
    eos = set(vocabulary.eos_token_ids) | {tokenizer.eos_token_id}
    template = tokenizer.chat_template or ""
    if not isinstance(template, str):
        template = str(template)
    taken = eos | ({tokenizer.unk_token_id} if _produces_unk(tokenizer) else set())
    specials = {i: token.content for i, token in added.items() if token.special and i not in taken}
    spare = list(range(known, len(vocabulary)))
    spare += [i for i, text in specials.items() if _RESERVED.search(text)]
    spare += [i for i, text in specials.items() if not _USED.search(text) and text not in template]
    for name in ("unk_token_id", "pad_token_id", "bos_token_id"):
        token_id = getattr(tokenizer, name, None)
        if token_id in specials and specials[token_id] not in template:
            spare.append(int(token_id))
    return tuple(dict.fromkeys(spare))


def _produces_unk(tokenizer: Any) -> bool:
    """Whether ordinary text can contain the unknown token."""
    return tokenizer.unk_token_id in tokenizer.encode("\U0010fffd", add_special_tokens=False)
