"""Compile once per machine: workers of one server, and the next start, map the same file.

The file's name is a digest of all that its content depends on: policies, vocabulary, this package's
own code, and the versions of what the tables are computed with. So nothing is ever stale, and a file
of that name that cannot be read is compiled and written anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import sys
import unicodedata
from importlib.metadata import version
from pathlib import Path

import streamguard
import streamguard_kernels
from streamguard.cache_folder import cache_folder
from streamguard.compiler.artifact import FORMAT_VERSION, Artifact
from streamguard.compiler.program import Program, compile_program
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.errors import ArtifactError
from streamguard.policy import PolicySet

logger = logging.getLogger("vllm.streamguard")

_KEPT = 16


def cached_program(policies: PolicySet, vocabulary: Vocabulary) -> Program:
    """`compile_program`, or the mapped result of an earlier call in any process. Raises PolicyError."""
    folder = cache_folder() / "compiled"
    path = folder / f"{_digest(policies, vocabulary)}.sga"
    if folder.exists() and _others_may_write(folder):
        # Its checksum shows damage, not a table made by somebody else to let everything through.
        logger.warning(
            "streamguard: %s can be written by others; the policy is compiled at each start. "
            "Make the folder your own (chmod go-w), or name another in STREAMGUARD_CACHE.",
            folder,
        )
        return compile_program(policies, vocabulary)
    if path.exists():
        try:
            program = Artifact.load(
                path, policies=policies, vocabulary_sha256=vocabulary.sha256
            ).program
            os.utime(path)
            return program
        except (ArtifactError, OSError) as error:
            logger.warning("streamguard: compiling again: %s", error)
    program = compile_program(policies, vocabulary)
    try:
        # Each with its mode: `parents` would leave the upper one open to the group, and distrusted.
        for place in (folder.parent, folder):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
        Artifact(policies, program).save(path)
        _forget_old(folder)
    except OSError as error:  # a full disk or a read-only home must not stop the guard
        logger.warning("streamguard: the compiled policy is not kept for the next start: %s", error)
    return program


def _others_may_write(folder: Path) -> bool:
    """Whether a user other than this one and root can put files there."""
    for place in (folder, folder.parent):
        found = place.stat()
        shared = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
        if shared or found.st_uid not in (0, os.geteuid()):
            return True
    return bool(folder.stat().st_mode & 0o022)


def _digest(policies: PolicySet, vocabulary: Vocabulary) -> str:
    parts = [
        policies.sha256, vocabulary.sha256, str(FORMAT_VERSION), sys.version,
        unicodedata.unidata_version, *(version(name) for name in ("numpy", "numba", "regex")),
    ]  # fmt: skip
    digest = hashlib.sha256("\0".join(parts).encode())
    for package in (streamguard, streamguard_kernels):
        root = Path(str(package.__file__)).parent
        for source in sorted(root.rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _forget_old(folder: Path) -> None:
    """Delete all but the newest; a process that has one mapped keeps it."""
    files = sorted(folder.glob("*.sga"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[_KEPT:]:
        path.unlink(missing_ok=True)
