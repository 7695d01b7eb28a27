"""A tiny random Llama with a vocabulary of a chosen kind, for tests that need many engines.

Heavy packages (tokenizers, safetensors) are imported inside the functions.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np

__all__ = ["TokenizerKind", "tiny_model"]

TokenizerKind = Literal["byte_level_bpe", "byte_fallback", "unigram"]

NUM_RESERVED = 8
MAX_VOCAB_SIZE = 65_536
HIDDEN = 64
NUM_LAYERS = 2
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = 32
INTERMEDIATE = 128
MAX_POSITIONS = 4096

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]\n"
    "{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)

TEXT = """\
The capital of France is Paris, and the river that crosses the city is the Seine.
How do I build a boat? Take the bow, the beam and the rudder; then the bob of the mast.
A bomb is a device; a bomber, a tomb, a comb and a bobbin share some of its letters.
Bombs, bombing and the bombed bridge were in the news. BOMB THREAT, said the headline.
The key begins with -----BEGIN RSA PRIVATE KEY----- and the token with AKIA0123456789.
Her password is hunter2; the secret recipe was never written down. I can't share that.
Write to alice@example.com or call +1 555 0100; the card number is 4111 1111 1111 1111.
def answer(x: int) -> int: return {"a": [1, 2.5, None], 'b': (x + 1) * 2}  # the answer
Le café était fermé; où est la forêt? Señor Muñoz está aquí. Größe, Straße, übermäßig.
Привет, мир! Бомба и книга лежат на столе. Η πόλη και η θάλασσα. naïve façade, coöperate.
你好,世界。今天天气很好,我们去公园。爆弾は危険です。東京の天気は晴れです。안녕하세요 세계.
"""
EMOJI = "😀 😂 🔥 💣 ❤️ 👍🏽 👩‍👩‍👧 🇫🇷 ✅ 🚀 💥 🎉\n"

SYLLABLES = (
    "ba be bo bu mb mba om bom comb tomb the then th and ing ed er est un re in con pro "
    "ver ta te ti to ra ro ri sa se so la le lo na ne no ka ke ko mi mo pa po du da st str "
    "ch sh qu ght ous ion al ly ay ee oo ie x y z v w j é ü ñ ö ж ка по"
).split()


def tiny_model(
    path: Path,
    *,
    kind: TokenizerKind = "byte_level_bpe",
    vocab_size: int = 1000,
    pad_vocab_to: int | None = None,
    spare_ids: bool = True,
    seed: int = 0,
) -> Path:
    """Write a tiny random Llama with its own tokenizer into `path` and return `path`.

    Takes 0.1 s (3 s for the largest vocabulary), so that tests can afford many. Equal arguments
    give equal bytes. The weights are float32; sampling at temperature 1 reaches nearly
    every ordinary token and EOS, while special tokens and padding rows have logits
    around -20, as the untrained rows of real models do (a logit bias can reach them).

    kind          byte_level_bpe: like GPT-2 and Llama 3, any Unicode text round-trips.
                  byte_fallback: like Llama 2, `▁` for spaces and `<0xNN>` byte tokens;
                  any text without `▁` itself round-trips; BOS is put before a prompt.
                  unigram: like T5 and XLM-R; characters outside its alphabet are lost.
    vocab_size    the tokenizer's size, special tokens included; up to 65,536.
    pad_vocab_to  rows of the embedding and of the logits; ids from `vocab_size` on have
                  no token. By default no padding.
    spare_ids     True: BOS, EOS, what the kind is used to (UNK, PAD) and eight tokens
                  `<|reserved_special_token_N|>`. False: EOS is the only special token.
    seed          of the weights and of the words that the vocabulary is learned from.

    Raises ValueError for an unknown kind or a size that cannot be had.
    """
    if pad_vocab_to is not None and pad_vocab_to < vocab_size:
        raise ValueError(
            f"pad_vocab_to is {pad_vocab_to}, less than vocab_size {vocab_size}; "
            "the model needs a row for every token"
        )
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}; the built-in text is good for {MAX_VOCAB_SIZE} tokens "
            "at most. For more rows of logits give pad_vocab_to."
        )
    tokenizer, special = _tiny_tokenizer(kind, vocab_size, spare_ids, seed)
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the bytes or characters and the special tokens of "
            f"a {kind} vocabulary alone take {size}; give at least that"
        )
    ids = {role: tokenizer.token_to_id(token) for role, token in special.items()}
    eos_id = ids["eos_token"]
    added = json.loads(tokenizer.to_str())["added_tokens"]
    num_rows = pad_vocab_to or vocab_size
    untrained = [t["id"] for t in added if t["id"] != eos_id] + list(range(vocab_size, num_rows))

    from safetensors.numpy import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_POSITIONS,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
            **special,
        },
    )
    model_ids = {"bos_token_id": ids.get("bos_token"), "eos_token_id": eos_id}
    _write_json(path / "generation_config.json", model_ids)
    _write_json(path / "config.json", {**_tiny_config(num_rows), **model_ids})
    save_file(
        _tiny_weights(num_rows, untrained, seed),
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tiny_config(num_rows: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": num_rows,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def _tiny_weights(num_rows: int, untrained: list[int], seed: int) -> dict[str, Any]:
    """Random weights; the last hidden dimension is a constant that only the head reads.

    No layer writes to it, so after the final norm it is always clearly positive, and a
    head row that weighs it negatively is improbable in every context.
    """
    rng = np.random.default_rng(seed)

    def normal(num_out: int, num_in: int, std: float) -> Any:
        return rng.normal(0.0, std, (num_out, num_in)).astype(np.float32)

    embedding = normal(num_rows, HIDDEN, 1.0)
    embedding[:, -1] = 4.0
    head = normal(num_rows, HIDDEN, 1.2 / HIDDEN**0.5)
    head[:, -1] = 0.0
    head[untrained] = 0.0
    head[untrained, -1] = -12.0
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    weights["model.norm.weight"] = np.ones(HIDDEN, dtype=np.float32)
    shapes = {
        "self_attn.q_proj": (NUM_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, NUM_HEADS * HEAD_DIM),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    for layer in range(NUM_LAYERS):
        for name, (num_out, num_in) in shapes.items():
            weight = normal(num_out, num_in, num_in**-0.5)
            if num_out == HIDDEN:
                weight[-1] = 0.0
            weights[f"model.layers.{layer}.{name}.weight"] = weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = np.ones(HIDDEN, dtype=np.float32)
    return weights


def _corpus(num_words: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(num_words)]
    made = [" ".join(words[i : i + 12]) for i in range(0, num_words, 12)]
    return [*TEXT.splitlines() * 4, *made]


def _tiny_tokenizer(
    kind: TokenizerKind, vocab_size: int, spare_ids: bool, seed: int
) -> tuple[Any, dict[str, str]]:
    """Return a tokenizers.Tokenizer and its special tokens by role (`eos_token`, …).

    Every kind learns its pieces with the BPE trainer: the library's Unigram trainer
    gives another vocabulary on every run.
    """
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    corpus = _corpus(2000 + 2 * vocab_size, seed)
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(NUM_RESERVED)] * spare_ids
    special: dict[str, str]

    if kind == "byte_level_bpe":
        special = {"bos_token": "<|begin_of_text|>"} if spare_ids else {}
        special["eos_token"] = "<|end_of_text|>"
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
        vocab, merges = _learn_pieces(
            [*corpus, *[EMOJI] * 20],
            split,
            vocab_size - len(special) - len(reserved),
            pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = split
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "byte_fallback":
        special = {"unk_token": "<unk>", "bos_token": "<s>"} if spare_ids else {}
        special["eos_token"] = "</s>"
        first = [*special.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
        pieces, merges = _learn_pieces(
            corpus,
            pre_tokenizers.Metaspace(),
            vocab_size - len(first) - len(reserved),
            _ascii(),
        )
        vocab = {piece: i for i, piece in enumerate([*first, *pieces])}
        tokenizer = Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=merges,
                byte_fallback=True,
                fuse_unk=True,
                unk_token=special.get("unk_token"),
            )
        )
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        if spare_ids:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A",
                pair="<s> $A <s> $B",
                special_tokens=[("<s>", vocab["<s>"])],
            )
    elif kind == "unigram":
        special = {"bos_token": "<s>", "pad_token": "<pad>"} if spare_ids else {}
        special["eos_token"] = "</s>"
        if spare_ids:
            special["unk_token"] = "<unk>"
        split = pre_tokenizers.Metaspace()
        pieces, merges = _learn_pieces(
            corpus, split, vocab_size - len(special) - len(reserved), _ascii()
        )
        # A piece that was learned early is frequent; single characters are the last resort.
        scores = dict.fromkeys(pieces, -12.0)
        for rank, (left, right) in enumerate(merges):
            scores[left + right] = -2.0 - float(np.log1p(rank))
        rows = [*((token, 0.0) for token in special.values()), *scores.items()]
        # The library cannot encode unknown characters without an unknown token; where
        # no spare id is wanted, an ordinary "?" stands for them.
        unknown = special.get("unk_token", "?")
        unk_id = next(i for i, (piece, _) in enumerate(rows) if piece == unknown)
        tokenizer = Tokenizer(models.Unigram(rows, unk_id=unk_id))
        tokenizer.pre_tokenizer = split
        tokenizer.decoder = decoders.Metaspace()
    else:
        raise ValueError(
            f'kind is "{kind}"; allowed are "byte_level_bpe", "byte_fallback" and "unigram"'
        )

    names = [*special.values(), *reserved]
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return tokenizer, special


def _ascii() -> list[str]:
    return [chr(code) for code in range(0x21, 0x7F)]


def _learn_pieces(
    corpus: list[str], split: Any, size: int, alphabet: list[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return exactly what BPE training learns: pieces with their ids, and the merges."""
    from tokenizers import Tokenizer, models, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=max(size, 0), initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(corpus, trainer)
    model = json.loads(learner.to_str())["model"]
    pieces = dict(sorted(model["vocab"].items(), key=lambda item: int(item[1])))
    return pieces, [(left, right) for left, right in model["merges"]]
