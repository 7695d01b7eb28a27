"""The compiled artefact: it comes back as it was written, or is refused with the reason."""

from __future__ import annotations

import hashlib
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from streamguard.compiler.artifact import FORMAT_VERSION, Artifact
from streamguard.compiler.program import compile_program
from streamguard.compiler.vocabulary import Vocabulary
from streamguard.errors import ArtifactError
from streamguard.policy import Policy, PolicySet
from streamguard.session import Session

DEFAULT = {
    "version": 1,
    "name": "default",
    "rules": [
        {"id": "bomb", "literals": ["bomb", "tomb"], "action": "halt", "normalize": ["case"]},
        {"id": "city", "literals": ["Paris", "Größe"], "action": "mask", "boundary": "word"},
        {"id": "key", "literals": ["RSA"], "action": "redirect", "message": "No.\n“No.”"},
        {"id": "number", "regexes": [r"\b\d{3}\b", "t+h"], "action": "mask"},
        {"id": "card", "regexes": [r"\b\d{4,6}\b"], "validate": "luhn", "action": "halt"},
    ],
}
OTHER = {
    "version": 1,
    "name": "other",
    "client_selectable": True,
    "defaults": {"on_error": "pass"},
    "rules": [{"id": "seen", "literals": ["the"], "action": "observe"}],
}


@pytest.fixture(scope="module")
def vocabulary(tiny_models: Callable[..., Path]) -> Vocabulary:
    return Vocabulary.from_tokenizer(tiny_models())


@pytest.fixture(scope="module")
def artifact(vocabulary: Vocabulary) -> Artifact:
    policies = PolicySet.from_policies([Policy.from_dict(DEFAULT), Policy.from_dict(OTHER)])
    return Artifact(policies, compile_program(policies, vocabulary))


@pytest.fixture(scope="module")
def written(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "policy.sga"
    artifact.save(path)
    return path


def copy_of(written: Path, tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / written.name
    path.write_bytes(content)
    return path


def refusal(path: Path, **expected: str) -> str:
    with pytest.raises(ArtifactError) as caught:
        Artifact.load(path, **expected)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message) < 600
    return message


def test_an_artifact_comes_back_equal_to_what_was_saved(artifact: Artifact, written: Path) -> None:
    loaded = Artifact.load(written)
    before, after = artifact.program, loaded.program
    assert loaded.policies.sha256 == artifact.policies.sha256
    assert loaded.policies.default == "default"
    assert after.rules == before.rules
    assert after.policies == before.policies
    assert after.default_policy == before.default_policy
    assert after.policy_sha256 == before.policy_sha256
    assert (after.max_tracks, after.max_depth) == (before.max_tracks, before.max_depth)
    assert after.vocabulary.token_bytes == before.vocabulary.token_bytes
    assert after.vocabulary.eos_token_ids == before.vocabulary.eos_token_ids
    assert after.vocabulary.spare == before.vocabulary.spare
    assert after.vocabulary.sha256 == before.vocabulary.sha256
    assert (after.num_states, after.size_bytes) == (before.num_states, before.size_bytes)
    for kind in ("tables", "mask_ranges", "stop_ranges"):
        old, new = getattr(before, kind), getattr(after, kind)
        assert type(new) is type(old)
        for name in old._fields:
            expected, found = getattr(old, name), getattr(new, name)
            assert found.dtype == expected.dtype, name
            assert found.shape == expected.shape, name
            assert found.flags.c_contiguous, name
            assert found.flags.aligned, name
            assert found.flags.writeable, name  # numba would compile its kernels anew otherwise
            np.testing.assert_array_equal(found, expected, err_msg=name)


def test_a_session_over_a_loaded_artifact_decides_the_same(
    artifact: Artifact, written: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sessions = [Session(artifact.program, 4), Session(Artifact.load(written).program, 4)]
    for session in sessions:
        for slot in range(4):
            session.reset(slot, policy="other" if slot == 3 else None)
    for _ in range(300):
        tokens = rng.integers(0, len(artifact.program.vocabulary), 4)
        first, second = (session.advance(np.arange(4), tokens) for session in sessions)
        np.testing.assert_array_equal(first, second)
        slot = int(rng.integers(4))
        np.testing.assert_array_equal(sessions[0].forbidden(slot), sessions[1].forbidden(slot))


def test_equal_inputs_give_equal_files_whose_sha256_is_the_one_returned(
    artifact: Artifact, vocabulary: Vocabulary, written: Path, tmp_path: Path
) -> None:
    again = Artifact(artifact.policies, compile_program(artifact.policies, vocabulary))
    sha256 = again.save(tmp_path / "again.sga")
    content = (tmp_path / "again.sga").read_bytes()
    assert content == written.read_bytes()
    assert sha256 == hashlib.sha256(content).hexdigest()


def test_a_loaded_artifact_can_be_saved_again_without_change(written: Path, tmp_path: Path) -> None:
    Artifact.load(written).save(tmp_path / "again.sga")
    assert (tmp_path / "again.sga").read_bytes() == written.read_bytes()


def test_an_artifact_stays_readable_while_its_file_is_replaced(
    written: Path, tmp_path: Path
) -> None:
    path = copy_of(written, tmp_path, written.read_bytes())
    loaded = Artifact.load(path)
    loaded.save(path)
    path.unlink()
    np.testing.assert_array_equal(
        loaded.program.tables.trans, Artifact.load(written).program.tables.trans
    )


def test_writing_into_a_loaded_artifact_does_not_change_the_file(
    written: Path, tmp_path: Path
) -> None:
    path = copy_of(written, tmp_path, written.read_bytes())
    Artifact.load(path).program.tables.trans[:] = 0
    assert path.read_bytes() == written.read_bytes()


def test_a_truncated_file_is_refused_at_every_length(
    written: Path, tmp_path: Path, seed: int
) -> None:
    content = written.read_bytes()
    rng = random.Random(seed)
    lengths = [*range(70), len(content) - 1, *(rng.randrange(len(content)) for _ in range(50))]
    for length in lengths:
        message = refusal(copy_of(written, tmp_path, content[:length]))
        assert "truncated" in message or "not a compiled policy" in message
    assert f"{length} bytes, expected {len(content)}" in message


def test_a_file_that_grew_is_refused(written: Path, tmp_path: Path) -> None:
    content = written.read_bytes()
    message = refusal(copy_of(written, tmp_path, content + b"\0"))
    assert f"{len(content) + 1} bytes, expected {len(content)}" in message


def test_every_flipped_bit_is_refused(written: Path, tmp_path: Path, seed: int) -> None:
    content = bytearray(written.read_bytes())
    rng = random.Random(seed)
    in_prefix_and_header = range(8 * 80)
    anywhere = [rng.randrange(8 * len(content)) for _ in range(150)]
    path = tmp_path / written.name
    for bit in [*in_prefix_and_header, *anywhere, 8 * len(content) - 1]:
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        refusal(path)
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    Artifact.load(path)


def test_a_flipped_bit_in_the_tables_is_called_damage_with_both_checksums(
    written: Path, tmp_path: Path
) -> None:
    content = bytearray(written.read_bytes())
    content[-1] ^= 1
    message = refusal(copy_of(written, tmp_path, bytes(content)))
    for fragment in ("damaged", "sha256", "expected", "make it again"):
        assert fragment in message


def test_another_format_version_is_refused_by_its_number(written: Path, tmp_path: Path) -> None:
    content = bytearray(written.read_bytes())
    content[16:20] = (7).to_bytes(4, "little")
    message = refusal(copy_of(written, tmp_path, bytes(content)))
    for fragment in ("format version 7", f"expected {FORMAT_VERSION}", "streamguard compile"):
        assert fragment in message


def test_a_policy_file_is_refused_as_an_artifact(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\nname: example\nrules: []\n" * 10)
    message = refusal(path)
    for fragment in ("not a compiled policy", "b'version: 1", "streamguard compile"):
        assert fragment in message


@pytest.mark.parametrize("name", ["missing.sga", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    assert "streamguard compile" in refusal(tmp_path / name)


def test_an_artifact_of_another_policy_or_tokenizer_is_refused(
    artifact: Artifact, written: Path
) -> None:
    policy, vocabulary = artifact.policies.sha256, artifact.program.vocabulary.sha256
    Artifact.load(written, policy_sha256=policy, vocabulary_sha256=vocabulary)
    message = refusal(written, policy_sha256="0" * 64)
    assert "made from the policy" in message
    assert policy[:12] in message
    assert "000000000000" in message
    message = refusal(written, vocabulary_sha256="f" * 64)
    assert "made from the vocabulary" in message
    assert vocabulary[:12] in message


def test_tables_of_another_build_are_refused_although_the_checksum_is_right(
    artifact: Artifact, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamguard.compiler import artifact as module

    original = module._arrays

    def arrays(program):
        for name, array in original(program):
            yield name.replace("tables.trans", "tables.transitions"), array

    monkeypatch.setattr(module, "_arrays", arrays)
    path = tmp_path / "other.sga"
    artifact.save(path)
    message = refusal(path)
    assert "not those of this build" in message
    assert "transitions" in message


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    artifact: Artifact, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_of(written, tmp_path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        artifact.save(path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_saved_file_has_the_permissions_that_the_user_asked_for(
    artifact: Artifact, tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        artifact.save(tmp_path / "policy.sga")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "policy.sga").stat().st_mode) == 0o640


def test_saving_through_a_link_keeps_the_link(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.sga").symlink_to(tmp_path / "real" / "policy.sga")
    artifact.save(tmp_path / "link.sga")
    assert (tmp_path / "link.sga").is_symlink()
    Artifact.load(tmp_path / "real" / "policy.sga")
