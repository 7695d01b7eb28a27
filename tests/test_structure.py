"""Imports point inward, and what a frontend loads is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamguard

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels" / "streamguard_kernels"
PRODUCT = ROOT / "streamguard"


def imported(path: Path) -> Iterator[str]:
    """Top-level names of the packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def importers(package: str) -> set[str]:
    """Files of the product that import a package."""
    paths = PRODUCT.rglob("*.py")
    return {str(p.relative_to(PRODUCT)) for p in paths if package in set(imported(p))}


def test_kernels_know_numpy_numba_and_their_device_only() -> None:
    for path in KERNELS.glob("*.py"):
        allowed = {*sys.stdlib_module_names, "numpy", "numba", "streamguard_kernels"}
        if path.name.startswith("device"):  # their arrays are the device's, so they need torch
            allowed |= {"triton", "torch"}
        assert set(imported(path)) <= allowed, path.name


def test_the_source_root_of_kernels_is_no_package() -> None:
    # An importable `kernels` would shadow the package of that name that transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    shadow = subprocess.run(
        [sys.executable, "-c", "import kernels; print(kernels.__path__)"],
        capture_output=True, text=True, cwd=ROOT.parent, check=False,
    )  # fmt: skip
    assert str(ROOT) not in shadow.stdout


def test_only_the_plugin_and_what_starts_an_engine_import_vllm() -> None:
    # Fitting a probe runs engines of its own.
    outside = {name for name in importers("vllm") if not name.startswith("vllm_plugin/")}
    assert outside <= {"commands/launch.py", "probe/collect.py", "probe/concept.py"}


def test_only_the_metrics_module_imports_prometheus_client() -> None:
    assert importers("prometheus_client") == {"metrics.py"}


def test_the_product_leaves_numba_and_triton_to_the_kernels() -> None:
    assert importers("numba") | importers("triton") == set()


def test_the_public_names_are_few_and_there() -> None:
    assert len(streamguard.__all__) < 10
    for name in streamguard.__all__:
        assert getattr(streamguard, name) is not None


def loaded_by(statement: str, after: str = "pass") -> set[str]:
    """Modules that a statement loads in a fresh interpreter, beyond those of another one."""
    code = f"import sys\n{after}\nbefore = set(sys.modules)\n{statement}\n"
    code += "print('\\n'.join(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module", ["streamguard", "streamguard.cli", "streamguard.vllm_plugin.register"]
)
def test_import_is_light(module: str) -> None:
    heavy = {"numba", "torch", "transformers", "xgrammar", "vllm", "triton", "streamguard_kernels"}
    assert not loaded_by(f"import {module}") & heavy


def test_the_processor_loads_nothing_heavy_beyond_vllm_itself() -> None:
    added = loaded_by(
        "import streamguard.vllm_plugin.processor",
        after="import vllm.v1.sample.logits_processor, vllm.v1.worker.gpu.sample.logits_processor",
    )
    packages = {name.split(".")[0] for name in added} - sys.stdlib_module_names
    assert packages <= {"streamguard", *"pydantic pydantic_core annotated_types yaml _yaml".split()}
