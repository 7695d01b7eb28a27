"""The compiled artefact: policies, vocabulary and all tables in one file that verifies itself.

    offset 0   prefix, 64 bytes: magic, format version, header length, file size, sha256 of the rest
    offset 64  header, JSON: policies, vocabulary ids, and name, dtype, shape, offset of each array
    then       the arrays, each at a multiple of 64 bytes, little endian

Nothing in it is executed. Arrays are mapped copy-on-write, so that the workers of one machine share
their pages. Equal policies and tokenizers give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from streamguard.compiler.program import Program
from streamguard.compiler.rules import RuleTable
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.errors import ArtifactError
from streamguard.policy import Policy, PolicySet, Rule
from streamguard.probe.rule import ProbeRule
from streamguard_kernels.lookahead import Ranges
from streamguard_kernels.tables import Tables

MAGIC = b"streamguard-art\n"
#: Raise it when the layout of the file or of `Tables` or `Ranges` changes.
FORMAT_VERSION = 6
_PREFIX = struct.Struct("<16sIIQ32s")
_ALIGNMENT = 64
_AGAIN = "Make it again: streamguard compile POLICY --tokenizer DIR -o FILE."


@dataclass(frozen=True)
class Artifact:
    """A compiled policy set, as it is written to and read from one file."""

    policies: PolicySet
    program: Program

    def build_look_ahead(self) -> None:
        """Compute the look-ahead ranges now rather than in `save`."""
        _ = self.program.mask_ranges, self.program.stop_ranges

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write the file and return its sha256 (what `sha256sum` prints).

        The file is written under another name in the same folder and renamed when complete: who
        reads `path` meanwhile sees the old one or the new one. Raises OSError.
        """
        target = Path(os.path.realpath(path))
        arrays = dict(_arrays(self.program))
        header = _header(self, arrays)
        digest = hashlib.sha256()
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with open(handle, "wb") as file:
                size_bytes = _end(header, arrays)
                prefix = (MAGIC, FORMAT_VERSION, len(header), size_bytes)
                content = hashlib.sha256(_PREFIX.pack(*prefix, b"")[:-32])
                for piece in _pieces(header, arrays):
                    content.update(piece)
                for piece in (_PREFIX.pack(*prefix, content.digest()), *_pieces(header, arrays)):
                    file.write(piece)
                    digest.update(piece)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return digest.hexdigest()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        policy_sha256: str | None = None,
        vocabulary_sha256: str | None = None,
        policies: PolicySet | None = None,
    ) -> Artifact:
        """Map the file and verify every byte of it (about 1 s per GB).

        policy_sha256      `PolicySet.sha256` that it must have been made from, if given.
        vocabulary_sha256  `Vocabulary.sha256` that it must have been made for, if given.
        policies           what it must have been made from, loaded: the rules keep their probes, which
                           are not in the file (`ProbeRule.probe` is None without).
        Raises ArtifactError if the file is missing, damaged, of another version, or made from
        another policy or tokenizer.
        """
        source = os.fspath(path)
        buffer = _map(source)
        header_bytes = _verify(source, buffer)
        try:
            header = json.loads(header_bytes)
            stored = _policies(header, source)
            expected = (
                ("policy", stored.sha256, header["policy_sha256"]),
                ("policy", policy_sha256, header["policy_sha256"]),
                ("policy", policies and policies.sha256, header["policy_sha256"]),
                ("vocabulary", vocabulary_sha256, header["vocabulary_sha256"]),
            )
            for what, wanted, found in expected:
                if wanted not in (None, found):
                    raise ArtifactError(
                        f"{source}: made from the {what} with sha256 {found[:12]}…, but "
                        f"{str(wanted)[:12]}… is in use; it would guard something else. {_AGAIN}"
                    )
            if policies is not None:  # in the order of the file, whose tables number the rules
                mine = {name: policies.policies[name] for name in stored.policies}
                stored = PolicySet(mine, stored.default)
            program = _program(header, stored, _read_arrays(header, buffer))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(
                f"{source}: its checksum is right, but the tables are not those of this build of "
                f"streamguard ({type(error).__name__}: {error}). {_AGAIN}"
            ) from None
        return cls(stored, program)


# ------------------------------------------------------------------------------- writing


def _arrays(program: Program) -> Iterator[tuple[str, np.ndarray]]:
    groups = (
        ("tables", program.tables),
        ("mask_ranges", program.mask_ranges),
        ("stop_ranges", program.stop_ranges),
    )
    for group, fields in groups:
        for name, array in fields._asdict().items():
            little = array.dtype.newbyteorder("<")
            yield f"{group}.{name}", np.ascontiguousarray(array, little).reshape(array.shape)


def _header(artifact: Artifact, arrays: dict[str, np.ndarray]) -> bytes:
    program, vocabulary = artifact.program, artifact.program.vocabulary
    policies = [
        {
            "name": policy.name,
            "client_selectable": policy.client_selectable,
            "on_error": policy.on_error,
            "rules": [_rule_fields(rule) for rule in policy.rules],
        }
        for policy in artifact.policies.policies.values()
    ]
    content: dict[str, Any] = {
        "policy_sha256": artifact.policies.sha256,
        "vocabulary_sha256": vocabulary.sha256,
        "policies": policies,
        "eos_token_ids": list(vocabulary.eos_token_ids),
        "spare": list(vocabulary.spare),
        "max_tracks": program.max_tracks,
        "max_depth": program.max_depth,
        "arrays": [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()],
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _rule_fields(rule: Rule) -> dict[str, Any]:
    """A probe is not copied into the file: path, digest and what the policy made of it are."""
    return {**vars(rule), "probe": None if rule.probe is None else rule.probe.stored()}


def _offsets(start: int, sizes: list[int]) -> Iterator[int]:
    """Where each array begins, and at last where the file ends."""
    at = start
    for size_bytes in sizes:
        at += -at % _ALIGNMENT
        yield at
        at += size_bytes
    yield at


def _end(header: bytes, arrays: dict[str, np.ndarray]) -> int:
    sizes = [array.nbytes for array in arrays.values()]
    return list(_offsets(_PREFIX.size + len(header), sizes))[-1]


def _pieces(header: bytes, arrays: dict[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    """All that follows the prefix, in order."""
    yield header
    at = _PREFIX.size + len(header)
    offsets = _offsets(at, [array.nbytes for array in arrays.values()])
    for array, offset in zip(arrays.values(), offsets, strict=False):
        yield bytes(offset - at)
        if array.size:
            yield array.reshape(-1).view(np.uint8).data
        at = offset + array.nbytes


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# ------------------------------------------------------------------------------- reading


def _map(source: str) -> mmap.mmap | bytes:
    try:
        with open(source, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise ArtifactError(
            f"{source}: no such file; looked for {Path(source).absolute()}. Correct the path, or "
            f"make it: streamguard compile POLICY --tokenizer DIR -o FILE."
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(
            f"{source}: cannot be read ({reason}); a file made by streamguard compile is needed. "
            f"Correct the path or its permissions."
        ) from None


def _verify(source: str, buffer: mmap.mmap | bytes) -> bytes:
    """Check magic, version, size and checksum, in this order; return the header."""
    magic = bytes(buffer[: len(MAGIC)])
    if magic != MAGIC[: len(magic)] or not magic:
        raise ArtifactError(
            f"{source}: not a compiled policy: it begins with {magic!r}, expected {MAGIC!r}. "
            f"A policy file is compiled first: streamguard compile POLICY --tokenizer DIR -o FILE."
        )
    if len(buffer) < _PREFIX.size:
        raise ArtifactError(
            f"{source}: truncated: {len(buffer)} bytes, expected at least {_PREFIX.size}. {_AGAIN}"
        )
    _, version, header_length, size_bytes, expected = _PREFIX.unpack_from(buffer)
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{source}: format version {version}, expected {FORMAT_VERSION}, the one that this "
            f"version of streamguard reads. {_AGAIN}"
        )
    if len(buffer) != size_bytes:
        what = "truncated" if len(buffer) < size_bytes else "damaged"
        raise ArtifactError(
            f"{source}: {what}: {len(buffer)} bytes, expected {size_bytes}. "
            f"Copy it again completely, or make it again with streamguard compile."
        )
    view = memoryview(buffer)
    digest = hashlib.sha256(view[: _PREFIX.size - 32])
    digest.update(view[_PREFIX.size :])
    if digest.digest() != expected:
        raise ArtifactError(
            f"{source}: damaged: its content has sha256 {digest.hexdigest()[:12]}…, expected "
            f"{expected.hex()[:12]}…; tables that changed on disk would guard something else. "
            f"Copy it again, or make it again with streamguard compile."
        )
    return bytes(view[_PREFIX.size : _PREFIX.size + header_length])


def _policies(header: dict[str, Any], source: str) -> PolicySet:
    policies = []
    for entry in header["policies"]:
        rules = []
        for rule in entry["rules"]:
            fields: dict[str, Any] = {
                key: tuple(v) if isinstance(v, list) else v for key, v in rule.items()
            }
            if fields["probe"] is not None:
                fields["probe"] = ProbeRule.restored(fields["probe"])
            rules.append(Rule(**fields))
        policies.append(Policy(**{**entry, "rules": tuple(rules), "source": source}))
    return PolicySet.from_policies(policies, source=source)


def _read_arrays(header: dict[str, Any], buffer: mmap.mmap | bytes) -> dict[str, np.ndarray]:
    layout = [(name, np.dtype(dtype), tuple(shape)) for name, dtype, shape in header["arrays"]]
    counts = [int(np.prod(shape, dtype=np.int64)) for _, _, shape in layout]
    header_length = _PREFIX.unpack_from(buffer)[2]
    offsets = _offsets(
        _PREFIX.size + header_length,
        [number * dtype.itemsize for (_, dtype, _), number in zip(layout, counts, strict=True)],
    )
    found = {}
    for (name, dtype, shape), number, offset in zip(layout, counts, offsets, strict=False):
        if number:
            found[name] = np.frombuffer(buffer, dtype, number, offset).reshape(shape)
        else:
            found[name] = np.zeros(shape, dtype)
    return found


def _program(header: dict[str, Any], policies: PolicySet, arrays: dict[str, np.ndarray]) -> Program:
    def group(name: str) -> dict[str, np.ndarray]:
        prefix = f"{name}."
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

    tables = Tables(**group("tables"))
    data, offsets = tables.raw_data.tobytes(), tables.raw_offsets.tolist()
    vocabulary = Vocabulary(
        tuple(data[a:b] for a, b in pairwise(offsets)),
        tables.token_special,
        tuple(header["eos_token_ids"]),
        tuple(header["spare"]),
    )
    program = Program(
        table=RuleTable.from_policies(policies, vocabulary),
        tables=tables,
        policy_sha256=header["policy_sha256"],
        compile_seconds=0.0,  # nothing was compiled; and equal inputs should give equal files
        max_tracks=header["max_tracks"],
        max_depth=header["max_depth"],
        _automata=(),
        _track_automaton=(),
    )
    # Where cached_property looks: the automata from which they would be computed are not kept.
    program.__dict__["mask_ranges"] = Ranges(**group("mask_ranges"))
    program.__dict__["stop_ranges"] = Ranges(**group("stop_ranges"))
    return program
