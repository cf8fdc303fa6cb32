"""Every reader of a file that names files meets the same hostile names and the same files that are none: it raises an error
of ours, reads and changes nothing outside of its folder, and never waits for a pipe.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import accelerate
from accelerate import Accelerator
from accelerate.checkpointing import LoadError
from accelerate.checkpointing.discovery import is_whole, latest_valid, problems_of
from accelerate.checkpointing.merge import merge_fsdp_weights
from accelerate.checkpointing.sharded.dcp_reader import DCPReader
from accelerate.utils import (
    OffloadedWeightsLoader,
    load_offloaded_weight,
    offload_state_dict,
    offload_weight,
    save_offload_index,
)
from tests.helpers import hostile
from tests.unit.checkpointing.test_merge import shards_of

VICTIM = b"12345678"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder two levels down, with files around it that must stay as they are."""
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    for place in (tmp_path, tmp_path / "outer"):
        (place / "victim.bin").write_bytes(VICTIM)
        (place / "victim.bin.dat").write_bytes(VICTIM)
        (place / "victim.dat").write_bytes(VICTIM)
    yield folder
    for place in (tmp_path, tmp_path / "outer"):
        found = {path.name for path in place.iterdir()} - {"outer", "inner"}
        assert found == {"victim.bin", "victim.bin.dat", "victim.dat"}
        assert all((place / name).read_bytes() == VICTIM for name in found)


def run() -> tuple[Accelerator, nn.Module]:
    accelerator = Accelerator(cpu=True)
    return accelerator, accelerator.prepare(nn.Linear(1, 1))


def checkpoint(folder: Path) -> tuple[Accelerator, nn.Module, Path]:
    accelerator, model = run()
    return accelerator, model, Path(accelerator.save_state(folder / "ckpt"))


# Readers of names -----------------------------------------------------------------------------------------------------


def manifest(folder: Path, name: str) -> None:
    accelerator, _, target = checkpoint(folder)
    hostile.name_in_manifest(target, name, VICTIM)
    assert problems_of(target) and not is_whole(target)
    accelerator.load_state(target)


def weight_map_of_safetensors(folder: Path, name: str) -> None:
    accelerate.load_checkpoint_in_model(nn.Linear(2, 2), hostile.index_naming(folder, name))


def weight_map_of_pickled(folder: Path, name: str) -> None:
    accelerate.load_checkpoint_in_model(nn.Linear(2, 2), hostile.index_naming(folder, name, "bin").parent)


def offloaded_state(folder: Path, name: str) -> None:
    offload_state_dict(folder, {name.removesuffix(".dat"): torch.zeros(2)})


def offloaded_index(folder: Path, name: str) -> None:
    save_offload_index({name: {"dtype": "float32", "shape": [2]}}, folder)


def offload_index_read(folder: Path, name: str) -> None:
    (folder / "index.json").write_text(json.dumps({name: {"dtype": "float32", "shape": [2]}}))
    OffloadedWeightsLoader(save_folder=folder)[name]


def offload_index_given(folder: Path, name: str) -> None:
    OffloadedWeightsLoader(save_folder=folder, index={name: {"dtype": "float32", "shape": [2]}})[name]


def offload_index_read_ahead(folder: Path, name: str) -> None:
    index = {"w": {"dtype": "float32", "shape": [2], "weight_name": name}}
    OffloadedWeightsLoader(save_folder=folder, index=index).read(["w"])


def shards(folder: Path, name: str) -> None:
    source = shards_of(folder / "pytorch_model_fsdp_0", {"model": {"a": torch.ones(2)}})
    hostile.name_in_description(source, name)
    merge_fsdp_weights(str(source), str(folder / "out"))


def url_in_memory(folder: Path, name: str) -> None:
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe_file("/run/manifest.json", b"{}")
    files.store[f"/run/{name}"] = files.store["/run/manifest.json"]  # as a store of objects may have it
    try:
        run()[0].load_state("memory://run")
    finally:
        files.store.clear()


def url_of_an_archive(folder: Path, name: str) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("manifest.json", b"{}")
        archive.writestr(name or ".", b"evil")
    run()[0].load_state(f"zip://::{folder / 'a.zip'}")


# Weights' own names get ".dat" at their end, which makes a file of some of the names.
SUFFIXED = (
    offloaded_state,
    offloaded_index,
    offload_index_read,
    offload_index_given,
    offload_index_read_ahead,
)
READERS = (
    manifest,
    weight_map_of_safetensors,
    weight_map_of_pickled,
    *SUFFIXED,
    shards,
    url_in_memory,
    url_of_an_archive,
)


@pytest.mark.parametrize("name", hostile.NAMES)
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_hostile_names(world: Path, reader: Callable[[Path, str], None], name: str) -> None:
    text = hostile.NAMES[name].replace("{outside}", str(world.parent))
    if reader in SUFFIXED and name in ("empty", "dot", "dots"):
        pytest.skip("with .dat at its end it is a name like any other")
    if reader is url_of_an_archive and name in ("NUL", "surrogate", "empty"):
        pytest.skip("no archive has it")
    if reader is url_in_memory and name == "empty":
        pytest.skip("it is the folder itself")
    with pytest.raises((ValueError, LoadError)) as caught:
        reader(world, text)
    assert type(caught.value).__module__.startswith("accelerate.")
    assert not (world / "out").exists()


# What is beside a checkpoint, and what a save replaces --------------------------------------------------------------------


@pytest.mark.parametrize("name", hostile.NAMES)
def test_a_hostile_replacement_is_not_finished(world: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """`ckpt.committed` stands beside a good checkpoint: loading must not touch what its manifest names."""
    text = hostile.NAMES[name].replace("{outside}", str(world.parent))
    accelerator, model, target = checkpoint(world)
    before = model.weight.detach().clone()
    committed = shutil.copytree(target, world / "ckpt.committed")
    hostile.name_in_manifest(committed, text, VICTIM)
    with torch.no_grad():
        model.weight.zero_()
    accelerator.load_state(target)
    assert (
        torch.equal(model.weight, before)
        and (committed / "optimizer.bin").exists() == (target / "optimizer.bin").exists()
    )
    assert "is not complete" in caplog.text and str(committed) in caplog.text
    with pytest.raises(accelerate.checkpointing.SaveError, match="move it away"):
        accelerator.save_state(target)
    assert not problems_of(target)


@pytest.mark.parametrize("damage", ["content", "missing", "extra name", "no manifest"])
def test_a_damaged_replacement_is_left_alone(world: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    accelerator, model, target = checkpoint(world)
    before = model.weight.detach().clone()
    committed = shutil.copytree(target, world / "ckpt.committed")
    weights = committed / "model.safetensors"
    if damage == "content":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    elif damage == "missing":
        # In the target there is another one than the manifest has.
        weights.unlink()
        save_file({"weight": torch.ones(1, 1), "bias": torch.ones(1)}, committed / "other")
        os.replace(committed / "other", target / "model.safetensors")
    elif damage == "extra name":
        hostile.name_in_manifest(committed, "notes.txt", VICTIM)
    else:
        (committed / "manifest.json").unlink()
    there = {path.name: path.read_bytes() for path in committed.iterdir()}
    if damage == "missing":
        with pytest.raises(LoadError, match="model.safetensors"):
            accelerator.load_state(target)
    else:
        accelerator.load_state(target)
        assert torch.equal(model.weight, before)
    assert {path.name: path.read_bytes() for path in committed.iterdir()} == there
    assert "is not complete" in caplog.text


def test_a_damaged_replacement_of_nothing_is_not_renamed(world: Path) -> None:
    accelerator, _, target = checkpoint(world)
    committed = target.rename(world / "ckpt.committed")
    (committed / "random_states_0.pkl").write_bytes(b"short")
    with pytest.raises(LoadError, match="no such folder"):
        accelerator.load_state(target)
    assert not target.exists() and committed.exists()


def test_a_good_replacement_is_finished(world: Path) -> None:
    accelerator, model, target = checkpoint(world)
    with torch.no_grad():
        model.weight.fill_(7)
    accelerator.save_state(world / "new")
    os.rename(world / "new", world / "ckpt.committed")
    os.replace(world / "ckpt.committed" / "model.safetensors", target / "model.safetensors")  # it had begun
    with torch.no_grad():
        model.weight.zero_()
    accelerator.load_state(target)
    assert model.weight.item() == 7 and not (world / "ckpt.committed").exists() and not problems_of(target)


@pytest.mark.parametrize("name", hostile.NAMES)
def test_saving_over_a_hostile_checkpoint(world: Path, name: str) -> None:
    """The older manifest names what is to be removed; it is not trusted either."""
    text = hostile.NAMES[name].replace("{outside}", str(world.parent))
    accelerator, _, target = checkpoint(world)
    hostile.name_in_manifest(target, text, VICTIM)
    accelerator.save_state(target)
    assert not problems_of(target)
    accelerator.load_state(target)


def test_links_in_a_checkpoint_are_replaced_and_not_followed(world: Path) -> None:
    """A folder of shards that is a link: what is behind it is neither removed nor written to."""
    accelerator, _, target = checkpoint(world)
    elsewhere = world / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "victim.bin").write_bytes(VICTIM)
    (target / "pytorch_model_fsdp_0").symlink_to(elsewhere)
    hostile.name_in_manifest(target, "pytorch_model_fsdp_0/victim.bin", VICTIM)
    accelerator.load_state(target, strict=False)  # reading through a link is allowed
    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: (
            (Path(folder) / "pytorch_model_fsdp_0").mkdir(),
            (Path(folder) / "pytorch_model_fsdp_0" / "victim.bin").write_bytes(b"mine"),
        )
    )
    accelerator.save_state(target)
    assert (elsewhere / "victim.bin").read_bytes() == VICTIM and not (target / "pytorch_model_fsdp_0").is_symlink()
    assert (target / "pytorch_model_fsdp_0" / "victim.bin").read_bytes() == b"mine" and not problems_of(target)


def test_a_save_refuses_names_that_no_load_takes(world: Path) -> None:
    accelerator, _ = run()
    accelerator.register_save_state_pre_hook(lambda m, w, folder: (Path(folder) / "two\nlines").write_bytes(b""))
    with pytest.raises(accelerate.checkpointing.SaveError, match="control characters"):
        accelerator.save_state(world / "ckpt")
    assert os.listdir(world) == []


# Links that people have ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_snapshots_of_the_hub_are_links(world: Path, suffix: str) -> None:
    snapshot, blobs = world / "snapshots" / "1", world / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    save_file(state, blobs / "w") if suffix == "safetensors" else torch.save(state, blobs / "w")
    shutil.move(hostile.index_naming(snapshot, f"m.{suffix}", suffix), blobs / "i")
    (snapshot / f"m.{suffix}").symlink_to("../../blobs/w")
    (snapshot / f"model.{suffix}.index.json").symlink_to("../../blobs/i")
    model = nn.Linear(2, 2)
    accelerate.load_checkpoint_in_model(model, snapshot)
    assert torch.equal(model.weight, torch.ones(2, 2))


# Files that are none --------------------------------------------------------------------------------------------------


def a_manifest(folder: Path, make: Callable[[Path], object]) -> None:
    accelerator, _, target = checkpoint(folder)
    replaced(target / "manifest.json", make)
    assert problems_of(target) and not is_whole(target)
    accelerator.load_state(target)


def a_listed_file(folder: Path, make: Callable[[Path], object]) -> None:
    accelerator, _, target = checkpoint(folder)
    replaced(target / "progress.json", make)
    assert problems_of(target) and not is_whole(target)
    accelerator.load_state(target)


def a_file_without_a_manifest(folder: Path, make: Callable[[Path], object]) -> None:
    accelerator, _, target = checkpoint(folder)
    os.unlink(target / "manifest.json")
    states = torch.load(target / "random_states_0.pkl", weights_only=False)
    torch.save({key: value for key, value in states.items() if key != "format"}, target / "random_states_0.pkl")
    accelerator.load_state(target)
    replaced(target / "model.safetensors", make)
    accelerator.load_state(target)


def progress_without_a_manifest(folder: Path, make: Callable[[Path], object]) -> None:
    accelerator, _, target = checkpoint(folder)
    os.unlink(target / "manifest.json")
    states = torch.load(target / "random_states_0.pkl", weights_only=False)
    torch.save({key: value for key, value in states.items() if key != "format"}, target / "random_states_0.pkl")
    replaced(target / "progress.json", make)
    accelerator.load_state(target)


def a_weights_file(folder: Path, make: Callable[[Path], object]) -> None:
    make(folder / "m.safetensors")
    accelerate.load_checkpoint_in_model(nn.Linear(2, 2), hostile.index_naming(folder, "m.safetensors"))


def a_weights_index(folder: Path, make: Callable[[Path], object]) -> None:
    make(folder / "model.safetensors.index.json")
    accelerate.load_checkpoint_in_model(nn.Linear(2, 2), folder)


def an_offload_index(folder: Path, make: Callable[[Path], object]) -> None:
    make(folder / "index.json")
    OffloadedWeightsLoader(save_folder=folder)


def an_offloaded_weight(folder: Path, make: Callable[[Path], object]) -> None:
    make(folder / "w.dat")
    load_offloaded_weight(folder / "w.dat", {"dtype": "float32", "shape": [2]})


def an_offloaded_weight_read_ahead(folder: Path, make: Callable[[Path], object]) -> None:
    make(folder / "w.dat")
    index = {"w": {"dtype": "float32", "shape": [2]}}
    OffloadedWeightsLoader(save_folder=folder, index=index).read(["w"])


def a_safetensors_file_of_an_index(folder: Path, make: Callable[[Path], object]) -> None:
    make(folder / "m.safetensors")
    index = {"w": {"safetensors_file": str(folder / "m.safetensors")}}
    OffloadedWeightsLoader(save_folder=folder, index=index)["w"]


def a_description(folder: Path, make: Callable[[Path], object]) -> None:
    source = shards_of(folder / "pytorch_model_fsdp_0", {"model": {"a": torch.ones(2)}})
    replaced(source / ".metadata", make)
    DCPReader(source)


def a_file_of_shards(folder: Path, make: Callable[[Path], object]) -> None:
    source = shards_of(folder / "pytorch_model_fsdp_0", {"model": {"a": torch.ones(2)}})
    replaced(source / "__0_0.distcp", make)
    DCPReader(source)


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


FILES = (
    a_manifest,
    a_listed_file,
    a_file_without_a_manifest,
    progress_without_a_manifest,
    a_weights_file,
    a_weights_index,
    an_offload_index,
    an_offloaded_weight,
    an_offloaded_weight_read_ahead,
    a_safetensors_file_of_an_index,
    a_description,
    a_file_of_shards,
)


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "socket", "folder", "link to itself"])
@pytest.mark.parametrize("reader", FILES, ids=lambda reader: reader.__name__)
def test_files_that_are_none(world: Path, reader: Callable[[Path, Any], None], kind: str) -> None:
    store = world / "elsewhere"
    store.mkdir()
    with pytest.raises((ValueError, LoadError, OSError)):
        reader(world, hostile.special_files(store)[kind])


def test_a_resume_passes_over_a_manifest_without_end(world: Path) -> None:
    project = accelerate.utils.ProjectConfiguration(project_dir=str(world), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=project)
    first, second = Path(accelerator.save_state()), Path(accelerator.save_state())
    (second / "manifest.json").unlink()
    (second / "manifest.json").symlink_to("/dev/zero")
    assert latest_valid(world).folder == first


# Writing --------------------------------------------------------------------------------------------------------------


def test_offloading_does_not_write_through_links(world: Path) -> None:
    outside = world.parent / "victim.bin"
    (world / "w.dat").symlink_to(outside)
    os.mkfifo(world / "v.dat")
    (world / "index.json").symlink_to(world / "none")
    (world / "index.incomplete").symlink_to(outside)
    offload_state_dict(world, {"w": torch.ones(2), "v": torch.zeros(2)})
    assert torch.equal(OffloadedWeightsLoader(save_folder=world)["w"], torch.ones(2))
    assert not (world / "w.dat").is_symlink() and not (world / "index.json").is_symlink()


def test_offloading_again_leaves_a_reader_its_values(world: Path) -> None:
    """The file is mapped where it is in use: it is replaced, not written over."""
    entry = offload_weight(torch.ones(1000), "w", world, {})["w"]
    mapped = load_offloaded_weight(world / "w.dat", entry)
    offload_weight(torch.zeros(10), "w", world)
    assert torch.equal(mapped, torch.ones(1000))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "save", "shape": [2]},
        {"dtype": 3, "shape": [2]},
        {"dtype": "float32", "shape": [-1]},
        {"dtype": "float32", "shape": [2**70]},
        {"dtype": "float32", "shape": [2**40, 2**40]},
        {"dtype": "float32", "shape": "22"},
        {"dtype": "float32"},
        [],
        None,
    ],
)
def test_entries_of_an_index_have_their_types(world: Path, entry: Any) -> None:
    (world / "index.json").write_text(json.dumps({"w": entry}))
    (world / "w.dat").write_bytes(bytes(8))
    with pytest.raises(ValueError, match="'w'|not a torch dtype"):
        OffloadedWeightsLoader(save_folder=world)
