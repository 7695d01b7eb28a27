"""Token bytes: what each token adds to the text, for each kind of tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guard_cases import decode, vocabulary
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from streamguard.compiler.vocabulary import Vocabulary
from streamguard.errors import TokenizerError

KINDS = ("byte_level_bpe", "byte_fallback", "unigram")
TEXTS = (
    "How do I build a bomb?", "  two  spaces ", "naïve façade, coöperate", "Größe, Straße",
    "line\nbreak", "def f(x): return {'a': 1}", "bomber bombs, BOMB!",
)  # fmt: skip
EVERYTHING = ("你好,世界。😀👩‍👩‍👧", "Ω\u0301\t\r\n\0", "\U0010fffd")
TinyModels = Callable[..., Path]


def load(tiny_models: TinyModels, kind: str, **options: Any) -> tuple[Any, Vocabulary]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models(kind, **options))
    return tokenizer, Vocabulary.from_tokenizer(tokenizer)


def wrap(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_token_bytes_of_a_text_joined_are_the_text(kind: str, tiny_models: TinyModels) -> None:
    tokenizer, vocab = load(tiny_models, kind)
    for text in TEXTS + EVERYTHING * (kind != "unigram"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if kind == "unigram" and tokenizer.unk_token_id in ids:
            continue
        joined = b"".join(vocab.token_bytes[i] for i in ids).decode()
        # SentencePiece kinds put a space before a text, which their decoders take away.
        assert joined in (text, " " + text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_token_bytes_follow_the_detokenizer_of_a_stream(
    kind: str, skip: bool, tiny_models: TinyModels, seed: int
) -> None:
    tokenizer, vocab = load(tiny_models, kind)
    rng = random.Random(seed)
    for _ in range(60):
        ids = rng.choices(range(len(vocab)), k=rng.randint(1, 30))
        if kind == "byte_fallback":  # broken runs of byte tokens read otherwise: see test_fuzz
            ids = [i for i in ids if vocab.token_bytes[i].isascii()]
        ids.append(vocab.token_bytes.index(b"a"))  # what looks unfinished is held back
        stream = DecodeStream(skip_special_tokens=skip)
        read = "".join(stream.step(tokenizer._tokenizer, i) or "" for i in ids)
        shown = (vocab.token_bytes[i] for i in ids if not (skip and vocab.special[i]))
        expected = decode(b"".join(shown), final=True)
        assert read.lstrip(" ") == expected.lstrip(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_flagged_and_have_their_text(kind: str, tiny_models: TinyModels) -> None:
    tokenizer, vocab = load(tiny_models, kind)
    added = tokenizer._tokenizer.get_added_tokens_decoder()
    assert np.flatnonzero(vocab.special).tolist() == sorted(added)
    assert all(vocab.token_bytes[i] == token.content.encode() for i, token in added.items())
    assert vocab.eos_token_ids == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("kind", KINDS)
def test_spare_ids_are_never_produced_and_never_end_a_text(
    kind: str, tiny_models: TinyModels
) -> None:
    tokenizer, vocab = load(tiny_models, kind)
    reserved = tokenizer.convert_tokens_to_ids("<|reserved_special_token_3|>")
    assert reserved in vocab.spare
    assert len(set(vocab.spare)) == len(vocab.spare) >= 8
    assert not set(vocab.spare) & set(vocab.eos_token_ids)
    template = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    for text in (*TEXTS, *EVERYTHING, template):
        produced = set(tokenizer.encode(text, add_special_tokens=False))
        used = produced & set(vocab.spare) - {tokenizer.bos_token_id}
        assert not used, (text, used)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_without_spare_ids_says_so(kind: str, tiny_models: TinyModels) -> None:
    assert load(tiny_models, kind, spare_ids=False)[1].spare == ()


def test_padding_of_the_output_layer_has_no_bytes_and_is_spare(tiny_models: TinyModels) -> None:
    tokenizer, vocab = load(tiny_models, "byte_level_bpe", spare_ids=False)
    padded = Vocabulary.from_tokenizer(tokenizer, vocab_size=len(vocab) + 3)
    assert len(padded) == len(vocab) + 3
    assert padded.token_bytes[len(vocab) :] == (b"",) * 3
    assert padded.spare == tuple(range(len(vocab), len(vocab) + 3))
    assert padded.sha256 != vocab.sha256


def test_ids_of_the_model_that_end_a_text_take_precedence(tiny_models: TinyModels) -> None:
    tokenizer, _ = load(tiny_models, "unigram")
    assert Vocabulary.from_tokenizer(tokenizer, eos_token_ids=(7, 9)).eos_token_ids == (7, 9)


def test_a_folder_is_as_good_as_a_tokenizer(tiny_models: TinyModels) -> None:
    _, vocab = load(tiny_models, "byte_fallback")
    folder = tiny_models("byte_fallback")
    assert Vocabulary.from_tokenizer(folder).sha256 == vocab.sha256
    assert Vocabulary.from_tokenizer(str(folder)).sha256 == vocab.sha256


def test_unicode_pieces_of_byte_level_tokens_may_be_parts_of_characters(
    tiny_models: TinyModels,
) -> None:
    _, vocab = load(tiny_models, "byte_level_bpe")
    assert {bytes([byte]) for byte in range(256)} <= set(vocab.token_bytes)


def test_added_tokens_read_as_their_decoder_shows_them() -> None:
    # They once kept their written form: a client reads "▁▁" as two spaces.
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -1.0)], unk_id=0))
    backend.decoder = decoders.Metaspace()
    backend.add_tokens([AddedToken("▁▁x", normalized=False)])
    backend.add_special_tokens(["<e▁>"])
    vocab = Vocabulary.from_tokenizer(wrap(backend))
    assert vocab.token_bytes[1:] == (b" ", b"a", b"  x", b"<e >")
    assert vocab.special.tolist()[3:] == [0, 1]


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_models: TinyModels) -> None:
    tokenizer, _ = load(tiny_models, "byte_level_bpe")
    message = r"token ids up to 999, the model only 900 logits.*--tokenizer"
    with pytest.raises(TokenizerError, match=message):
        Vocabulary.from_tokenizer(tokenizer, vocab_size=900)


def test_a_tokenizer_without_a_fast_backend_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"object: not a fast tokenizer.*use_fast=True"):
        Vocabulary.from_tokenizer(object())


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer can be loaded.*tokenizer\.json"):
        Vocabulary.from_tokenizer(tmp_path)


def test_a_decoder_that_token_bytes_cannot_follow_is_refused() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "c": 3}))
    backend.decoder = decoders.WordPiece()
    message = r"token 1 decodes to ' a' after 'a'.*patterns could be missed"
    with pytest.raises(TokenizerError, match=message):
        Vocabulary.from_tokenizer(wrap(backend, unk_token="[UNK]"))


def test_the_digest_follows_bytes_order_and_special_flags() -> None:
    digests = {
        vocabulary(tokens, specials).sha256
        for tokens, specials in [
            ([b"ab", b"c"], []), ([b"a", b"bc"], []), ([b"c", b"ab"], []), ([b"ab"], [b"c"]),
        ]
    }  # fmt: skip
    assert len(digests) == 4
    assert vocabulary([b"ab", b"c"], []).sha256 in digests


def test_an_empty_vocabulary_is_enough_to_scan() -> None:
    empty = Vocabulary.empty()
    assert (len(empty), empty.data.tobytes(), empty.offsets.tolist()) == (0, b"", [0])
