"""Compile every device kernel for a GPU on a machine without one; print their sizes."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from streamguard_kernels import device, device_mask, device_probe, device_scores, device_tables

ARCH = 90
#: Types of the tables' arrays; all others are int32.
TYPES = {
    "class_of": "*u8", "rank_group": "*u8", "token_data": "*u8", "token_special": "*u8",
    "raw_data": "*u8", "map_data": "*u8", "own_before": "*i64",
}  # fmt: skip
POINTERS = {
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
}  # fmt: skip


def main() -> None:
    slots = device_tables.new_slots(2, 3, 4, "cpu")
    tables = device_tables.DeviceTables(
        *(TYPES.get(name, "*i32") for name in device_tables.DeviceTables._fields)
    )
    probes = device_probe.DeviceProbes("*i32", "*fp32", "*i32")
    scored = device_probe.new_probe_slots(2, 3, 4, "cpu")
    common = {
        "t": tables,
        "s": device_tables.Slots(*(POINTERS[tensor.dtype] for tensor in slots)),
        "idx_mapping": "*i32",
        "all_token_ids": "*i32",
        "total_len": "*i32",
        "sampled": "*i64",
        "pos": "*i64",
        "logits": "*fp32",
        "p": tables,  # where no policy has a probe the tables stand in for it
        "q": device_tables.Slots(*(POINTERS[tensor.dtype] for tensor in slots)),
    }
    counts = device_scores.ScoreCounts("*i32", "*i64", "*fp64", "*i64", "*i32")
    with_probes = {
        "p": probes,
        "q": device_probe.ProbeSlots(*(POINTERS[tensor.dtype] for tensor in scored)),
        "positions": "*i64",
        "query_start_loc": "*i32",
        "scores": "*fp32",
        "counter": "*i64",
        "last_counter": "*i64",
    }
    cases: list[tuple[Any, dict[str, object], dict[str, object]]] = [
        (device._advance_kernel, {"TRACKS": 4}, {}),
        (device_mask._ranges_kernel, {"BLOCK": 256}, {}),
        (device_mask._walking_kernel, {"ROWS": 16, "BLOCK": 1024}, {}),
        (
            device._decide_kernel,
            {"TRACKS": 4, "LOOK": True, "MONITORS": 0},
            {"processed": "*bf16"},
        ),
        (
            device._decide_kernel,
            {"TRACKS": 4, "LOOK": True, "MONITORS": 4},
            {"processed": "*bf16", **with_probes},
        ),
        (device_probe._read_kernel, {"MONITORS": 4}, with_probes),
        (device_scores._count_kernel, {"COLUMNS": 4}, {**with_probes, "c": counts}),
    ]
    for kernel, constants, more in cases:
        types = {**common, **more, **dict.fromkeys(constants, "constexpr")}
        # Whatever else a kernel takes is a stride or a count.
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        built = compile(
            ASTSource(kernel, signature, constexprs=values),
            target=GPUTarget("cuda", ARCH, 32),
            options={"num_warps": 8 if "BLOCK" in constants else 1},
        )
        print(f"sm_{ARCH} {kernel.__name__} {constants}: {len(built.asm['cubin'])} bytes")


if __name__ == "__main__":
    main()
