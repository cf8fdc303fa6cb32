"""`save_model`, `save` and `load`: files other programs read, pieces, tied and shared tensors."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from accelerate import Accelerator
from accelerate.checkpointing import clean_state_dict_for_safetensors, load, save
from accelerate.checkpointing.model_files import size_in_bytes, split
from accelerate.checkpointing.storage.file_writer import BLOCK_SIZE, FileWriter, fingerprint, write_file
from accelerate.checkpointing.storage.formats import read_safetensors, write_safetensors
from accelerate.runtime import world
from accelerate.utils import ProjectConfiguration


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(4, 64)
        self.l2 = nn.Linear(64, 4)


SHARDS = {"l1.weight": 1, "l2.weight": 2, "l1.bias": 3, "l2.bias": 3}


@pytest.mark.parametrize("safe", [True, False])
def test_pieces_and_their_index(tmp_path: Path, safe: bool) -> None:
    accelerator, model = Accelerator(cpu=True), Net()
    assert accelerator.save_model(model, tmp_path, max_shard_size="1KB", safe_serialization=safe) is None
    stem, end = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    index = json.loads((tmp_path / f"{stem}.{end}.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 2320},
        "weight_map": {name: f"{stem}-0000{part}-of-00003.{end}" for name, part in SHARDS.items()},
    }
    found: dict[str, Any] = {}
    for file in sorted(set(index["weight_map"].values())):
        found |= load(tmp_path / file)
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    accelerator.save_model(model, tmp_path, safe_serialization=safe)
    assert os.listdir(tmp_path) == [f"{stem}.{end}"], "pieces of the earlier call are gone"


def test_tied_tensors_are_saved_once(tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    accelerator.save_model(model, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {"0.weight", "0.bias", "1.bias"}


def test_views_of_one_memory_are_kept_apart() -> None:
    base = torch.arange(12.0)
    clean = clean_state_dict_for_safetensors({"a": base[:6], "b": base[3:9], "c": base.view(3, 4).t(), "d": base[:6]})
    assert set(clean) == {"a", "b", "c"}
    assert torch.equal(clean["b"], base[3:9]) and clean["c"].is_contiguous()
    assert len({value.untyped_storage().data_ptr() for value in clean.values()}) == 3


def test_a_file_in_the_place_of_the_folder_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "f").write_text("x")
    assert Accelerator(cpu=True).save_model(Net(), tmp_path / "f") is None
    assert "is a file" in caplog.text


def test_a_model_without_values_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(RuntimeError, match="meta"):
        Accelerator(cpu=True).save_model(model, tmp_path)


def test_state_dict_hooks_count(tmp_path: Path) -> None:
    model = Net()

    def drop(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        del state["l1.bias"]

    model._register_state_dict_hook(drop)
    Accelerator(cpu=True).save_model(model, tmp_path)
    assert "l1.bias" not in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("safe", [True, False])
def test_save_and_load_one_object(tmp_path: Path, safe: bool) -> None:
    state = {"x": torch.arange(3), "y": torch.ones(2, 2, dtype=torch.bfloat16)}
    path = tmp_path / ("f.safetensors" if safe else "f.bin")
    save(state, str(path), safe_serialization=safe)
    found = load(path)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    with open(tmp_path / "g", "wb") as file:
        save(state, file)
    with open(tmp_path / "g", "rb") as file:
        assert torch.equal(load(file)["x"], state["x"])
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, "g"])


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    save({"x": torch.ones(1)}, tmp_path / "f")
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save({"x": lambda: None}, tmp_path / "f")
    assert load(tmp_path / "f")["x"] == 1 and os.listdir(tmp_path) == ["f"]


def test_load_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {tmp_path}/ran",))

    torch.save(Bomb(), tmp_path / "f")
    with pytest.raises(Exception, match="[Ww]eights"):
        load(tmp_path / "f", weights_only=False)
    assert not (tmp_path / "ran").exists()


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 100))
def test_split_keeps_everything_within_the_limit(sizes: list[int], limit: int) -> None:
    state = {str(place): torch.zeros(size, dtype=torch.uint8) for place, size in enumerate(sizes)}
    groups = split(state, limit)
    assert sorted(name for group in groups for name in group) == sorted(state)
    assert all(len(group) == 1 or sum(state[name].numel() for name in group) <= limit for group in groups)


@pytest.mark.parametrize(("text", "size"), [("10GB", 10**10), ("1KiB", 1024), ("1.5 mb", 1_500_000), (7, 7)])
def test_sizes(text: Any, size: int) -> None:
    assert size_in_bytes(text) == size


def test_a_size_that_is_none() -> None:
    with pytest.raises(ValueError, match="10GB"):
        size_in_bytes("large")


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.uint16, torch.float8_e4m3fn],
)
def test_the_safetensors_files_are_what_the_library_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {
        "m": torch.ones(3, 5).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 3).to(dtype),
        "b": torch.ones(3, dtype=torch.uint8),
        "t": torch.arange(6.0).view(2, 3).t(),
    }
    write_file(tmp_path / "f", "f", lambda writer: write_safetensors(state, writer))
    assert (8 + int.from_bytes((tmp_path / "f").read_bytes()[:8], "little")) % 64 == 0
    for found in (load_file(tmp_path / "f"), read_safetensors(tmp_path / "f")):
        assert set(found) == set(state)
        for name, value in state.items():
            assert found[name].dtype == value.dtype and found[name].shape == value.shape
            assert torch.equal(found[name].float(), value.float())


@pytest.mark.parametrize("value", [3, torch.eye(2).to_sparse()])
def test_what_safetensors_cannot_hold(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="safe_serialization=False"):
        write_file(tmp_path / "f", "f", lambda writer: write_safetensors({"x": value}, writer))


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda descriptor, data, place: original(descriptor, data[: max(1, len(data) // 3)], place)
    )
    content = os.urandom(3 * BLOCK_SIZE + 5000)

    def write(writer: FileWriter) -> None:
        writer.write(content)

    record = write_file(tmp_path / "f", "f", write)
    assert (tmp_path / "f").read_bytes() == content and record == fingerprint(tmp_path / "f", "f")


@pytest.mark.parametrize("safe", [True, False])
def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe: bool) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    name = "model.safetensors" if safe else "pytorch_model.bin"
    with pytest.raises(OSError, match=f"No space left on device.*{name}") as caught:
        Accelerator(cpu=True).save_model(torch.nn.Linear(2, 2), tmp_path / "m", safe_serialization=safe)
    assert caught.value.errno == errno.ENOSPC and list((tmp_path / "m").iterdir()) == []


@pytest.mark.parametrize(
    ("rank", "local", "each", "writes"),
    [(0, 0, False, True), (2, 0, False, False), (2, 0, True, True), (3, 1, True, False)],
)
def test_who_writes_on_several_machines(tmp_path: Path, rank: int, local: int, each: bool, writes: bool) -> None:
    accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(save_on_each_node=each))
    world.set_current(replace(world.current(), rank=rank, local_rank=local))
    accelerator.save({"a": torch.ones(1)}, tmp_path / "object.bin")
    assert (tmp_path / "object.bin").exists() is writes
