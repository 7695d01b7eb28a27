"""`streamguard probe` from labelled items to figures, with a tiny real model in a real engine."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cli_commands import refused, run

from streamguard.probe.apply import whole
from streamguard.probe.artifact import Probe
from streamguard.probe.items import Item
from streamguard.probe.model import ServedModel

#: Two ways of writing that a model's hidden states tell apart whatever its weights are.
WORDS = {0: "the and of to in is it you that he".split(), 1: "bomb 9 zq # kx 77 @ vv jj".split()}


ENGINE = ("--engine", "num_gpu_blocks_override=256")


def engine_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command that starts an engine, in a process of its own."""
    command = [sys.executable, "-c", "from streamguard.cli import main; main()", "probe"]
    return subprocess.run(
        [*command, *map(str, arguments), *ENGINE],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """A probe that was fitted by the command, and what it was fitted on."""

    model: Path
    data: Path
    probe: Path
    folder: Path
    printed: str


def items(count: int, seed: int, sources: tuple[str, ...] = ("one", "two")) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "prompt": f"question {seed} {i}",
            "response": " ".join(rng.choices(WORDS[i % 2], k=rng.randint(16, 32))) + f" {i}",
            "label": i % 2,
            "source": sources[i // 2 % len(sources)],
        }
        for i in range(count)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def fitted(tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Fit:
    folder = tmp_path_factory.mktemp("probe")
    model = tiny_models()
    data = write(folder / "items.jsonl", items(600, 1, ("one", "two", "three")))
    probe = folder / "harm.safetensors"
    done = engine_command(
        "fit", "-m", model, "-d", data, "-o", probe, "--hold-out", "three",
        "--max-tokens", 80, "--layers", "0,1", "--report", folder / "report",
        "--activations", folder / "activations",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Fit(model, data, probe, folder, done.stdout)


def test_a_fit_leaves_a_probe_with_its_card(fitted: Fit) -> None:
    probe = Probe.load(fitted.probe)
    card = probe.card
    assert card.model.num_layers == 2
    assert card.layer in (0, 1)
    assert card.data[0].items == 600
    assert card.data[0].positive == 300
    assert card.training["parts"]["held_out"] == 200
    assert set(card.training["sweep"]) == {"0", "1"}
    assert card.metrics["held_out"]["sources"] == 1
    assert card.metrics["with_refusals"]["macro"]["auroc"]["value"] > 0.95
    assert "TF-IDF" in card.metrics["held_out"]["baselines"]
    assert probe.sha256[:12] in fitted.printed
    assert "question" not in fitted.probe.read_bytes().decode(errors="replace")


def test_a_report_stands_alone(fitted: Fit) -> None:
    page = (fitted.folder / "report" / "report.html").read_text(encoding="utf-8")
    assert "AUROC" in page
    assert "question 1" not in page
    assert {"roc.png", "layers.png"} <= {p.name for p in (fitted.folder / "report").iterdir()}


def test_the_same_files_reproduce_the_card(fitted: Fit) -> None:
    done = engine_command(
        "eval", fitted.probe, "-m", fitted.model, "-d", fitted.data, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert figures["differs_from_card"] == []
    card = Probe.load(fitted.probe).card.metrics
    for name in ("macro", "pooled"):
        mine, theirs = (f["with_refusals"][name]["auroc"]["value"] for f in (figures, card))
        assert mine == pytest.approx(theirs, abs=0.02)


def test_other_items_are_judged_whole(fitted: Fit, tmp_path: Path) -> None:
    data = write(tmp_path / "other.jsonl", items(80, 2))
    done = engine_command(
        "eval", fitted.probe, "-m", fitted.model, "-d", data,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "AUROC" in done.stdout
    assert "reproduced" not in done.stdout


def test_calibration_takes_thresholds_from_texts_without_labels(
    fitted: Fit, tmp_path: Path
) -> None:
    benign = [row for row in items(200, 3) if not row["label"]]
    for row in benign:
        del row["label"], row["source"]
    data = write(tmp_path / "mine.jsonl", benign)
    made = tmp_path / "mine.safetensors"
    done = engine_command(
        "calibrate", fitted.probe, "-m", fitted.model, "--benign", data, "-o", made,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = Probe.load(fitted.probe), Probe.load(made)
    assert len(after.benign["harm"]) == 100
    assert after.sha256 != before.sha256
    assert [card.role for card in after.card.data] == ["fit", "calibration"]
    assert (after.weight == before.weight).all()


def test_calibration_reads_responses_as_far_as_serving_does(fitted: Fit, tmp_path: Path) -> None:
    """The fit read 80 tokens; what stands behind them in an operator's texts counts all the same."""
    calm = [row for row in items(120, 4) if not row["label"]]
    for row in calm:
        row["response"] = " ".join([row["response"]] * 8 + WORDS[1] * 2)
    data, scores = write(tmp_path / "long.jsonl", calm), {}
    for name, more in (("whole", ()), ("cut", ("--max-tokens", 80))):
        made = tmp_path / f"{name}.safetensors"
        done = engine_command(
            "calibrate", fitted.probe, "-m", fitted.model, "--benign", data, "-o", made, *more
        )
        assert done.returncode == 0, done.stderr
        said = "of 80 tokens at most" if more else "read to their ends"
        assert said in done.stdout
        scores[name] = Probe.load(made).benign["harm"]
    assert scores["whole"].min() > scores["cut"].max()


def test_a_text_is_read_as_far_as_the_models_context_goes(fitted: Fit) -> None:
    model = ServedModel(str(fitted.model))
    item = Item("question", " ".join(WORDS[0] * model.context), 0, "mine", "q")
    (text,) = whole([item], model, None)
    assert len(text.prompt) + len(text.response) == model.context - 1
    assert len(text.harmful) == len(text.response) < text.length
    (short,) = whole([item], model, 80)
    assert len(short.response) == 80


def test_a_limit_that_would_not_hold_is_refused(fitted: Fit, tmp_path: Path) -> None:
    said = run(
        "probe", "eval", fitted.probe, "-m", fitted.model, "-d", fitted.data, "--max-tokens", 40
    )
    refused(said, "the files of the probe's own fit", "80 tokens", "Leave --max-tokens out")
    loaded = Probe.load(fitted.probe)
    prompts, made = tmp_path / "prompts.safetensors", tmp_path / "made.safetensors"
    replace(loaded, card=loaded.card.model_copy(update={"stage": "prompt"})).save(prompts)
    assert Probe.load(prompts).card.read_tokens == 256
    data = write(tmp_path / "items.jsonl", [row for row in items(120, 5) if not row["label"]])
    said = run(
        "probe",
        "calibrate",
        prompts,
        "-m",
        fitted.model,
        "-b",
        data,
        "-o",
        made,
        "--max-tokens",
        40,
    )
    refused(said, "reads prompts, and these whole", "Leave --max-tokens out")
    assert not made.exists()


def test_a_cut_off_fit_goes_on_where_it_was(fitted: Fit, tmp_path: Path) -> None:
    # Everything but the last text is there: the second fit is the first one's equal.
    done_file = fitted.folder / "activations" / "fit" / "done.bin"
    state = bytearray(done_file.read_bytes())
    state[-1] = 0
    done_file.write_bytes(state)
    probe = tmp_path / "again.safetensors"
    done = engine_command(
        "fit", "-m", fitted.model, "-d", fitted.data, "-o", probe, "--hold-out", "three",
        "--max-tokens", 80, "--layers", "0,1", "--activations", fitted.folder / "activations",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = Probe.load(fitted.probe), Probe.load(probe)
    assert first.weight.tolist() == second.weight.tolist()


def test_another_models_probe_is_refused(
    fitted: Fit, tiny_models: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny_models(seed=7)
    data = write(tmp_path / "items.jsonl", items(80, 2))
    done = run("probe", "eval", fitted.probe, "-m", other, "-d", data)
    refused(done, "the probe was fitted on", "fingerprint")


def test_show_prints_what_a_probe_is_for(fitted: Fit) -> None:
    done = run("probe", "show", fitted.probe)
    assert done.exit_code == 0
    assert "items.jsonl: 600 items, 300 harmful" in done.stdout
    assert "FPR 5%" in done.stdout
    card = json.loads(run("probe", "show", fitted.probe, "--json").stdout)
    assert card["format"] == "streamguard-probe/1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give either --data FILE"),
        (("-d", "{data}", "--concept", "{data}"), "one of them"),
        (("-d", "{missing}"), "missing.jsonl"),
        (("-d", "{one}"), "labels of one class only"),
        (("-d", "{broken}"), "broken.jsonl: line 2"),
        (("-d", "{data}", "--layers", "top"), "allowed: auto, numbers, norm"),
        (("-d", "{data}", "--loss", "hinge"), "allowed: token, mean, window"),
        (("-d", "{data}", "--hold-out", "thre"), "three"),
        (("-d", "{data}", "--engine", "x"), "KEY=VALUE"),
        (("-d", "{data}", "--stage", "input"), "allowed: output, prompt"),
        (("--concept", "{data}", "--report", "r"), "there are figures of responses only"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_an_engine_starts(
    fitted: Fit, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    rows = items(60, 1)
    places = {
        "data": fitted.data,
        "missing": tmp_path / "missing.jsonl",
        "one": write(tmp_path / "one.jsonl", [row for row in rows if row["label"]]),
        "broken": tmp_path / "broken.jsonl",
    }
    places["broken"].write_text(json.dumps(rows[0]) + "\n{\n", encoding="utf-8")
    given = [argument.format(**places) for argument in arguments]
    output = tmp_path / "p.safetensors"
    done = run("probe", "fit", "-m", fitted.model, "-o", output, *given)
    refused(done, said)
    assert not output.exists()


def test_a_layer_that_is_not_there_is_refused(fitted: Fit, tmp_path: Path) -> None:
    done = run(
        "probe", "fit", "-m", fitted.model, "-d", fitted.data, "-o", tmp_path / "p.safetensors",
        "--layers", "9",
    )  # fmt: skip
    refused(done, "layer 9", "0..1")
