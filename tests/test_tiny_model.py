"""The tiny model: equal bytes for equal arguments, a vocabulary as its kind has it."""

import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from streamguard.tiny_model import tiny_model

KINDS = ("byte_level_bpe", "byte_fallback", "unigram")


def load_tokenizer(path: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_arguments_give_equal_bytes(tmp_path, kind):
    folders = [tiny_model(tmp_path / name, kind=kind, seed=3) for name in "ab"]
    first, second = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert first == second
    other = tiny_model(tmp_path / "c", kind=kind, seed=4)
    assert (other / "model.safetensors").read_bytes() != first["model.safetensors"]


@pytest.mark.parametrize("kind", ["byte_level_bpe", "byte_fallback"])
@pytest.mark.parametrize("spare_ids", [True, False])
def test_any_text_round_trips(tiny_models, kind, spare_ids):
    tokenizer = load_tokenizer(tiny_models(kind, spare_ids=spare_ids))
    names = [token.content for token in tokenizer.added_tokens_decoder.values()]

    @given(st.text())
    def check(text):
        assume(not any(name in text for name in names))  # "</s>" is read as the token
        if kind == "byte_fallback":  # `▁` is how this kind writes a space
            text = text.replace("▁", "_")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_has_pieces_of_words(tiny_models, kind):
    tokenizer = load_tokenizer(tiny_models(kind))
    space = "Ġ" if kind == "byte_level_bpe" else "▁"
    vocab = tokenizer.get_vocab()
    assert {f"{space}the", f"{space}bo", "bo", "mb", "omb", "bomb", f"{space}bomb"} <= vocab.keys()
    assert len(vocab) == 1000


@pytest.mark.parametrize("kind", KINDS)
def test_spare_ids_can_be_had_or_left_out(tiny_models, kind):
    with_spare = load_tokenizer(tiny_models(kind)).added_tokens_decoder
    names = {token.content for token in with_spare.values()}
    assert {f"<|reserved_special_token_{i}|>" for i in range(8)} <= names

    path = tiny_models(kind, spare_ids=False)
    tokenizer = load_tokenizer(path)
    assert list(tokenizer.added_tokens_decoder) == [tokenizer.eos_token_id]
    assert tokenizer.unk_token is None
    assert tokenizer.bos_token is None
    assert tokenizer.pad_token is None
    assert json.loads((path / "config.json").read_text())["vocab_size"] == len(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_reaches_ordinary_tokens_and_no_untrained_ones(tiny_models, kind):
    import torch
    from transformers import AutoModelForCausalLM

    path = tiny_models(kind, pad_vocab_to=1024)
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.vocab_size == 1024
    ids = torch.tensor([tokenizer.encode("The bomb is in the café and the key begins")])
    with torch.no_grad():
        probabilities = model(ids).logits[0].softmax(-1)
    untrained = [i for i in tokenizer.added_tokens_decoder if i != tokenizer.eos_token_id]
    untrained += range(1000, 1024)
    assert probabilities[:, untrained].max() < 1e-6
    perplexity = torch.special.entr(probabilities).sum(-1).exp()
    assert perplexity.min() > 200
    assert perplexity.max() < 900
    assert probabilities.max() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_chat_template_names_the_roles(tiny_models, kind):
    tokenizer = load_tokenizer(tiny_models(kind))
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"[user]\nhi{tokenizer.eos_token}\n[assistant]\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "wordpiece"}, '"wordpiece"; allowed are'),
        ({"vocab_size": 100}, "vocab_size is 100"),
        ({"vocab_size": 100_000}, "vocab_size is 100000"),
        ({"pad_vocab_to": 999}, "pad_vocab_to is 999"),
    ],
)
def test_impossible_tiny_models_are_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        tiny_model(tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()
