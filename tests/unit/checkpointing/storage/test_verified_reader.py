"""Reads verified against checksums: the saved bytes, or an error, which fails the load."""

from __future__ import annotations

import gc
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate import Accelerator
from accelerate.checkpointing import LoadError
from accelerate.checkpointing.storage.file_writer import BLOCK_SIZE, fingerprint, wait_for_unlinks
from accelerate.checkpointing.storage.verified_reader import ChecksummedReader, CorruptFileError
from tests.unit.checkpointing.test_saving_and_loading import trained, weights

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed in /proc")


def evict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.mark.parametrize("size", [0, 1, 4096, BLOCK_SIZE, BLOCK_SIZE + 1, 4 * BLOCK_SIZE - 5])
@pytest.mark.parametrize("cached", [True, False])
def test_reads_return_the_content(tmp_path: Path, size: int, cached: bool) -> None:
    content = random.Random(size).randbytes(size)
    path = tmp_path / "file"
    path.write_bytes(content)
    record = fingerprint(path, "file")
    if not cached and hasattr(os, "posix_fadvise"):
        evict(path)
    with ChecksummedReader(path, record) as file:
        assert file.read() == content
        draw = random.Random(1)
        for _ in range(12):  # as zip archives are read: the end, the start, back and forth
            start, count = draw.randrange(size + 1), draw.choice([1, 30, 4096, 2 * BLOCK_SIZE])
            file.seek(start)
            assert file.read(count) == content[start : start + count]
            assert file.tell() == min(start + count, size)
        assert file.seek(-1, os.SEEK_END) == size - 1 if size else True
        file.verify_rest()


@pytest.mark.parametrize("place", [0, BLOCK_SIZE - 1, BLOCK_SIZE, 2 * BLOCK_SIZE + 6])
def test_corrupt_bytes_are_never_returned(tmp_path: Path, place: int) -> None:
    path = tmp_path / "file"
    content = bytearray(2 * BLOCK_SIZE + 7)
    path.write_bytes(content)
    record = fingerprint(path, "file")
    content[place] ^= 1
    path.write_bytes(content)
    with ChecksummedReader(path, record) as file:
        file.seek(place)
        with pytest.raises(CorruptFileError, match="checksum"):
            file.read(1)
    with ChecksummedReader(path, record) as file, pytest.raises(CorruptFileError, match="checksum"):
        file.verify_rest()
    path.write_bytes(content[:-1])
    with pytest.raises(CorruptFileError, match=f"{len(content) - 1} bytes"):
        ChecksummedReader(path, record)


def saved_and_fresh(tmp_path: Path) -> tuple[Path, Accelerator, nn.Module, Any]:
    accelerator = Accelerator(cpu=True)
    trained(accelerator)
    folder = accelerator.save_state(tmp_path / "c")
    other = Accelerator(cpu=True)
    model, (optimizer, _) = trained(other, steps=0)
    return Path(folder), other, model, optimizer


def flip(path: Path, place: int = -3000) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("strict", [True, False])
def test_a_damaged_optimizer_file_fails_the_load_of_a_fresh_optimizer(tmp_path: Path, strict: bool) -> None:
    folder, accelerator, model, optimizer = saved_and_fresh(tmp_path)
    before = weights(model)
    flip(folder / "optimizer.bin")
    with pytest.raises(LoadError, match="nothing was changed") as caught:
        accelerator.load_state(folder, strict=strict)
    assert [(problem.file, problem.kind) for problem in caught.value.problems] == [("optimizer.bin", "corrupt")]
    flip(folder / "model.safetensors", -3)
    with pytest.raises(LoadError) as caught:
        accelerator.load_state(folder, strict=strict)
    assert {problem.file for problem in caught.value.problems} == {"model.safetensors", "optimizer.bin"}
    assert torch.equal(weights(model), before)
    assert not optimizer.state


def test_loaded_optimizer_state_has_its_own_memory(tmp_path: Path) -> None:
    folder, accelerator, _, optimizer = saved_and_fresh(tmp_path)
    saved = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    accelerator.load_state(folder)
    shutil.rmtree(folder)
    states = list(optimizer.state.values())
    for state, expected in zip(states, saved.values(), strict=True):
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    assert all(value.untyped_storage().nbytes() == value.numel() * 4 for value in moments)


@needs_proc
def test_replaced_checkpoints_release_disk_space(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    trained(accelerator)
    for _ in range(2):
        accelerator.save_state(tmp_path / "c")
    wait_for_unlinks()
    gc.collect()
    left = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [name for name in left if name.startswith(str(tmp_path)) and name.endswith("(deleted)")]
    assert os.listdir(tmp_path) == ["c"]
