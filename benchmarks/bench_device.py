"""What does a step of the device kernels cost on a GPU?

`python -m benchmarks.bench_device [--json FILE]` on a CUDA machine. It needs torch, triton, numpy,
numba, pydantic, PyYAML, regex and rich; neither vLLM nor transformers nor tokenizer files, since the
vocabulary of 49,152 tokens is made here (`device_workload`).

Each launch is timed twice. *As launched*: between two CUDA events around one call, which includes what
the CPU takes to launch it. *In a graph*: the launches of several steps, on slots of their own, are
captured once (`torch.cuda.graph`) and replayed while the GPU is kept busy before it, so that the time
is the GPU's alone; the p99 is over replays. Before anything is timed, states, masks and decisions are
compared with the host's `RowGuard`, and the steps run once with
`torch.cuda.set_sync_debug_mode("error")`, which raises where anything waits for the device.

Peers in the same run, where they are installed: xgrammar's Triton kernel, which applies a bitmask of
the very same tokens (made beforehand: its matchers' time is not counted), and vLLM's Triton
`bad_words` kernel with the same literals in two spellings (it forbids less: exact token sequences).
Limits: all rows are texts that just go on; every slot gets one token a step.

`--interpret` runs tiny sizes in Triton's interpreter on a CPU: the comparisons, no times.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import workload
from benchmarks.device_workload import ADVANCE, STEP, Case, Sizes

ACTIONS = ("halt", "mask")
#: GPU cycles for which the device is kept busy while a graph is launched: about 0.1 ms.
_BUSY_CYCLES = 200_000

FULL = Sizes(49_152, (1_000, 10_000), (1, 32, 256, 1024), 8, 200)
TINY = Sizes(600, (40,), (1, 3), 2, 0)


@dataclass(frozen=True)
class Times:
    """Microseconds of one call: in a graph, and as launched; launch: of the CPU alone."""

    graph_median: float
    graph_p99: float
    launched_median: float
    launched_p99: float
    launch: float


@dataclass(frozen=True)
class Row:
    """One measured case; times is None in the interpreter."""

    action: str
    literals: int
    batch: int
    name: str
    times: Times | None


@dataclass
class Record:
    """What a run hands over."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def xgrammar_step(case: Case) -> Callable[[int], None]:
    """xgrammar's Triton kernel with a bitmask of the tokens that we mask, a step's rows each."""
    import torch
    import xgrammar

    batch, num_tokens = case.batch, case.sizes.vocabulary
    bitmasks = []
    for k in range(case.sizes.steps):
        forbidden = np.isneginf(case.masks(list(range(k * batch, (k + 1) * batch))))
        packed = np.packbits(~forbidden, axis=1, bitorder="little").view(np.int32)
        bitmasks.append(torch.from_numpy(packed.copy()).to(case.device))
        again = torch.zeros((batch, num_tokens), device=case.device)
        xgrammar.apply_token_bitmask_inplace(again, bitmasks[k], backend="triton")
        if not np.array_equal(np.isneginf(again.cpu().numpy()), forbidden):
            raise AssertionError("xgrammar masked other tokens")
    return lambda k: xgrammar.apply_token_bitmask_inplace(
        case.logits, bitmasks[k], backend="triton"
    )


def bad_words_step(case: Case, num_literals: int) -> Callable[[int], None]:
    """vLLM's Triton kernel with the same literals, each with and without a space before it.

    It takes any number of sequences; vLLM itself allows a request 128.
    """
    import torch

    from streamguard.vllm_plugin.register import register

    register()  # with its cure for llvmlite vLLM can be imported after numba
    from vllm.v1.worker.gpu.sample.bad_words import apply_bad_words

    spelled = [s for text in workload.literals(num_literals) for s in (text, f" {text}")]
    sequences = [case.texts.encode(text) for text in spelled]
    flat = np.concatenate(sequences).astype(np.int32)
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int32)

    def put(array: NDArray[Any]) -> Any:  # a copy for every row of a batch, as vLLM keeps it
        return torch.from_numpy(array).to(case.device).repeat(case.batch, 1)

    data, ends = put(flat), put(offsets)
    counts = torch.full((case.batch,), len(sequences), dtype=torch.int32, device=case.device)
    none = torch.zeros(case.batch, dtype=torch.int32, device=case.device)
    rows = torch.arange(case.batch, dtype=torch.int32, device=case.device)
    tokens = list(case.all_token_ids.view(case.sizes.steps, case.batch, -1))
    return lambda k: apply_bad_words(
        case.logits, rows, data, ends, counts, tokens[k], none, case.total[: case.batch], none,
        none, len(sequences),
    )  # fmt: skip


def peers(
    case: Case, num_literals: int, missing: dict[str, str]
) -> dict[str, Callable[[int], None]]:
    """The peers that can be had; why another cannot goes into `missing`."""
    found: dict[str, Callable[[int], None]] = {}
    makers: dict[str, tuple[str, Callable[[], Callable[[int], None]]]] = {
        "xgrammar bitmask": ("xgrammar", lambda: xgrammar_step(case)),
        "vLLM bad_words": ("vllm", lambda: bad_words_step(case, num_literals)),
    }
    for name, (package, make) in makers.items():
        if importlib.util.find_spec(package) is None:
            missing[name] = f"left out: {package} is not installed"
            continue
        try:
            found[name] = make()
        except ImportError as error:
            missing[name] = f"left out: {error}"
    return found


def measure(case: Case, operation: Callable[[int], None], *, advanced: bool) -> Times:
    """Time one operation on a CUDA device; advanced: see `Case.reset`."""
    import torch

    steps, repeats = case.sizes.steps, case.sizes.repeats

    def every_step() -> None:
        for k in range(steps):
            operation(k)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case.reset(advanced=advanced)
        every_step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every_step()

    def timed(call: Callable[[int], None], num_calls: int, busy: bool) -> NDArray[np.float64]:
        events = []
        for k in range(repeats + 5):  # the first five warm up
            case.reset(advanced=advanced)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if busy:
                torch.cuda._sleep(_BUSY_CYCLES)
            else:
                torch.cuda.synchronize()
            start.record()
            call(k % steps)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return np.array([1e3 * a.elapsed_time(b) / num_calls for a, b in events[5:]])

    in_graph = timed(lambda k: graph.replay(), steps, busy=True)
    launched = timed(operation, 1, busy=False)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for k in range(repeats):  # nothing is left to advance: launching costs the same
        operation(k % steps)
    launch = 1e6 * (time.perf_counter() - started) / repeats
    torch.cuda.synchronize()
    return Times(
        float(np.median(in_graph)),
        float(np.percentile(in_graph, 99)),
        float(np.median(launched)),
        float(np.percentile(launched, 99)),
        launch,
    )


def check_nothing_waits(case: Case) -> None:
    """Run a step with PyTorch told to raise where the host would wait for the device."""
    import torch

    case.reset()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(case.sizes.steps):
            case.step(k)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def bench(sizes: Sizes, device: str, on_case: Callable[[str], None]) -> Record:
    """All cases; on_case is told what was finished."""
    record, missing = Record(), {}  # type: tuple[Record, dict[str, str]]
    for action in ACTIONS:
        for num_literals in sizes.literals:
            for batch in sizes.batches:
                case = Case(sizes, action, num_literals, batch, device)
                masked = case.compare()
                if device == "cuda":
                    check_nothing_waits(case)
                operations = dict(case.operations)
                if device == "cuda" and action == "mask":
                    operations |= peers(case, num_literals, missing)
                for name, operation in operations.items():
                    advanced = name not in (ADVANCE, STEP)
                    times = (
                        measure(case, operation, advanced=advanced) if device == "cuda" else None
                    )
                    record.rows.append(Row(action, num_literals, batch, name, times))
                on_case(f"{action}, {num_literals:,} literals, batch {batch}: agrees with the host")
            key = f"{action}, {num_literals:,} literals"
            device_bytes = sum(t.numel() * t.element_size() for t in case.tables)
            record.facts[key] = {
                "states": case.program.num_states,
                "transition_bytes": case.program.tables.trans.nbytes,
                "device_bytes": device_bytes,
                "tokens_masked_a_row": round(masked, 1),
                "verdicts_compared": case.num_verdicts,
            }
    record.facts["peers"] = (missing or "none is missing") if device == "cuda" else "not timed"
    return record


def versions(device: str) -> dict[str, Any]:
    """Machine, versions, date."""
    import torch
    import triton

    from benchmarks import report

    name = torch.cuda.get_device_name(0) if device == "cuda" else "Triton's interpreter"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": name,
        "machine": report.machine(),
        "versions": {
            **report.versions(), "torch": torch.__version__, "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
    }  # fmt: skip


def show(record: Record, sizes: Sizes, about: dict[str, Any]) -> None:
    """Print one line an operation, one column a batch size."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(150, Console().width))
    console.print(
        f"{about['device']}; µs a step: in a graph, median (p99) / as launched / CPU time to launch",
        highlight=False,
    )
    table = Table(header_style="bold")
    for i, name in enumerate(["action", "literals", "", *(f"batch {b}" for b in sizes.batches)]):
        table.add_column(name, justify="left" if i in (0, 2) else "right", no_wrap=True)
    by_line: dict[tuple[str, int, str], dict[int, str]] = {}
    for row in record.rows:
        said = "agrees"
        if row.times is not None:
            t = row.times
            said = f"{t.graph_median:.1f} ({t.graph_p99:.1f}) / {t.launched_median:.0f} / {t.launch:.0f}"
        by_line.setdefault((row.action, row.literals, row.name), {})[row.batch] = said
    before: tuple[str, int] | None = None
    for (action, literals, name), cells in by_line.items():
        if before != (action, literals):
            table.add_section()
        before = (action, literals)
        table.add_row(action, f"{literals:,}", name, *(cells.get(b, "–") for b in sizes.batches))
    console.print(table)
    for key, value in record.facts.items():
        console.print(f"{key}: {value}", highlight=False)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument(
        "--interpret", action="store_true", help="tiny sizes on a CPU: comparisons, no times"
    )
    options = parser.parse_args()
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    if not options.interpret and not torch.cuda.is_available():
        print(
            "error: bench_device needs a CUDA device, and torch sees none; "
            "--interpret checks the kernels on a CPU, without times.",
            file=sys.stderr,
        )
        return 2
    sizes, device = (TINY, "cpu") if options.interpret else (FULL, "cuda")
    about = versions(device)
    record = bench(sizes, device, lambda done: print(done, file=sys.stderr, flush=True))
    show(record, sizes, about)
    if options.json:
        content = {**about, "sizes": asdict(sizes), **asdict(record)}
        options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
