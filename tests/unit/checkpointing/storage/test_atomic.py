"""A commit either completes, or raises and leaves the previous checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import nn

from accelerate import Accelerator
from accelerate.checkpointing.storage import atomic, manifest
from accelerate.checkpointing.storage.file_writer import FileRecord, fingerprint


def staged(target: Path, number: int = 0) -> Path:
    staging = atomic.stage(target)
    (staging / "weights.bin").write_text(f"weights {number}")
    return staging


def committed(staging: Path, target: Path, *more: FileRecord) -> None:
    records = [fingerprint(staging / "weights.bin", "weights.bin"), *more]
    atomic.commit(staging, target, records, world_size=1, step=0, number=0)


def test_commit_names_vanished_files(tmp_path: Path) -> None:
    staging = staged(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match=r"vanished from .*: gone\.bin"):
        committed(staging, tmp_path / "c", FileRecord("gone.bin", 1, ("00000000",)))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("replaces", [False, True])
def test_commit_fails_if_a_folder_cannot_be_synced(
    tmp_path: Path, replaces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "c"
    if replaces:
        committed(staged(target), target)
    staging = staged(target, 1)
    sync = atomic.sync_folder

    def failing(folder: Path) -> None:
        if folder == tmp_path:
            raise OSError(5, "Input/output error")
        sync(folder)

    monkeypatch.setattr(atomic, "sync_folder", failing)
    with pytest.raises(OSError, match="Input/output"):
        committed(staging, target)
    assert target.exists() == replaces and not atomic.sibling(target, atomic.COMMITTED).exists()
    if replaces:
        assert (target / "weights.bin").read_text() == "weights 0"
    monkeypatch.undo()
    committed(staged(target, 2), target)
    assert (target / "weights.bin").read_text() == "weights 2"


def test_files_of_hooks_are_fingerprinted(tmp_path: Path) -> None:
    staging = staged(tmp_path / "c")
    (staging / "of_a_hook.txt").write_text("notes")
    committed(staging, tmp_path / "c")
    whole = manifest.read(tmp_path / "c")
    assert whole.paths == {"weights.bin", "of_a_hook.txt"}
    (tmp_path / "c" / "of_a_hook.txt").write_text("other")
    assert [problem.file for problem in manifest.verify(tmp_path / "c", whole)] == ["of_a_hook.txt"]


def test_files_and_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(2, 2))
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: Path(folder, "notes.txt").write_text("x"))
    accelerator.save_state(tmp_path / "c")
    parts = [tmp_path, tmp_path / "c", *(tmp_path / "c").rglob("*")]
    assert len(parts) > 5 and {part.name for part in parts if part.stat().st_ino not in synced} == set()
