"""What a merge of shards refuses, and what it leaves behind."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from accelerate.checkpointing import LoadError, SaveError
from accelerate.checkpointing.merge import merge_fsdp_weights
from accelerate.checkpointing.sharded.dcp_reader import DCPReader

STATE = {"a.weight": torch.arange(600.0).reshape(20, 30), "b": torch.ones(7, dtype=torch.float16), "c": torch.tensor(3)}


def shards_of(folder: Path, state: dict[str, Any]) -> Path:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it remarks that there is one process
        dcp.save(state, checkpoint_id=folder)
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return shards_of(tmp_path / "pytorch_model_fsdp_0", {"model": STATE})


def merged(source: Path, **options: Any) -> dict[str, torch.Tensor]:
    merge_fsdp_weights(str(source), str(source.parent / "out"), **options)
    return load_file(source.parent / "out" / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refused(source: Path, *words: str, **options: Any) -> None:
    """The merge fails with one error that has these words, and writes nothing."""
    with pytest.raises(LoadError) as caught:
        merge_fsdp_weights(str(source), str(source.parent / "out"), **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert caught.value.problems or "does not hold" in words[0]
    assert not (source.parent / "out").exists()


def test_a_state_without_a_name_around_it(tmp_path: Path) -> None:
    assert equal(merged(shards_of(tmp_path / "s", {"model.a": torch.ones(3)})), {"model.a": torch.ones(3)})


def test_pieces_and_their_index_replace_what_was_there(shards: Path, tmp_path: Path) -> None:
    assert equal(merged(shards), STATE)
    merge_fsdp_weights(str(shards), str(tmp_path / "out"), max_shard_size="1KB")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    pieces = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert names == [*pieces, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / names[-1]).read_text())
    assert index["metadata"]["total_size"] == 600 * 4 + 7 * 2 + 8
    assert set(index["weight_map"]) == set(STATE)
    together = {**load_file(tmp_path / "out" / pieces[0]), **load_file(tmp_path / "out" / pieces[1])}
    assert equal(together, STATE)
    assert equal(merged(shards), STATE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_the_shards_are_removed_only_when_asked_and_done(shards: Path, tmp_path: Path) -> None:
    merged(shards)
    assert shards.exists()
    for inside in (shards, shards / "deeper"):
        with pytest.raises(SaveError, match="is to be removed"):
            merge_fsdp_weights(str(shards), str(inside), remove_checkpoint_dir=True)
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="is a file"):
        merge_fsdp_weights(str(shards), str(tmp_path / "file"), remove_checkpoint_dir=True)
    merged(shards, remove_checkpoint_dir=True)
    assert not shards.exists()


def test_a_missing_and_a_short_file_are_one_error(shards: Path) -> None:
    data = next(shards.glob("*.distcp"))
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    refused(shards, data.name, "bytes")
    data.unlink()
    refused(shards, data.name, "missing")


def test_a_changed_byte_is_noticed(shards: Path) -> None:
    data = next(shards.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    where = content.find(STATE["a.weight"][4].numpy().tobytes())
    assert where > 0
    content[where + 5] ^= 1
    data.write_bytes(content)
    refused(shards, data.name, "corrupt")


@pytest.mark.parametrize("at", range(60))
def test_a_damaged_description_is_noticed_or_harmless(shards: Path, at: int) -> None:
    path = shards / ".metadata"
    content = bytearray(path.read_bytes())
    place = at * len(content) // 60
    content[place] ^= 0x55
    path.write_bytes(content)
    try:
        assert set(merged(shards)) != set() or not STATE
    except LoadError as error:
        assert error.problems or "does not hold" in str(error)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code from the file ran",))


def test_nothing_from_the_files_is_run(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / ".metadata").write_bytes(pickle.dumps(Evil()))
    refused(shards, "builtins.print", "no place in DCP metadata")
    shutil.rmtree(shards)
    shards_of(shards, {"model": {**STATE, "extra": Evil()}})
    with pytest.raises(LoadError, match="something else than tensors"):
        merge_fsdp_weights(str(shards), str(tmp_path / "out"), safe_serialization=False)
    assert "ran" not in capsys.readouterr().out


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    optimizer = shards_of(tmp_path / "optimizer_0", {"optimizer": {"state": {"a": {"step": torch.tensor(1.0)}}}})
    refused(optimizer, "does not hold the weights of a model, but optimizer", "pytorch_model_fsdp_0")
    refused(tmp_path, "no file .metadata", "optimizer_0")
    refused(tmp_path / "nothing", "no such folder")


def test_extra_state_goes_into_pickled_files_only(tmp_path: Path) -> None:
    shards = shards_of(tmp_path / "s", {"model": {**STATE, "a._extra_state": {"scale": 2.0, "history": torch.ones(2)}}})
    with pytest.raises(SaveError, match="unsafe_serialization"):
        merged(shards)
    merge_fsdp_weights(str(shards), str(tmp_path / "out"), safe_serialization=False)
    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    extra = found.pop("a._extra_state")
    assert equal(found, STATE) and extra["scale"] == 2.0 and torch.equal(extra["history"], torch.ones(2))


def test_a_file_outside_the_folder_is_not_read(shards: Path) -> None:
    path = shards / ".metadata"
    name = next(shards.glob("*.distcp")).name
    path.write_bytes(path.read_bytes().replace(name.encode(), b"../" + name[3:].encode()))
    refused(shards, "not the name of a file in the folder")


def test_a_manifest_around_the_shards_is_held_to(tmp_path: Path) -> None:
    from accelerate.checkpointing.storage.atomic import commit, stage

    staging = stage(tmp_path / "checkpoint_0")
    torch.serialization.set_crc32_options(False)  # as our own checkpoints are written
    try:
        shards_of(staging / "pytorch_model_fsdp_0", {"model": STATE})
    finally:
        torch.serialization.set_crc32_options(True)
    commit(staging, tmp_path / "checkpoint_0", [], world_size=1, step=0, number=0)
    shards = tmp_path / "checkpoint_0" / "pytorch_model_fsdp_0"
    assert equal(merged(shards), STATE)
    shutil.rmtree(shards.parent / "out")
    data = next(shards.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[content.find(STATE["a.weight"][4].numpy().tobytes()) + 5] ^= 1
    data.write_bytes(content)
    refused(shards, data.name, "checksum")


def test_a_folder_is_read_one_tensor_at_a_time(shards: Path) -> None:
    stored = DCPReader(shards)
    assert {name: entry.shape for name, entry in stored.entries.items()} == {
        "model.a.weight": (20, 30),
        "model.b": (7,),
        "model.c": (),
    }
    assert torch.equal(stored.read_tensor("model.a.weight"), STATE["a.weight"])


# Pieces ---------------------------------------------------------------------------------------------------------------


def cut(shards: Path, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Has the description say that the tensor ``a.weight`` consists of these pieces, all in the place of the whole one."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    path = shards / ".metadata"
    with open(path, "rb") as file:
        found = pickle.load(file)
    name = "model.a.weight"
    [info] = [found.storage_data.pop(index) for index in list(found.storage_data) if index.fqn == name]
    found.state_dict_metadata[name].chunks[:] = [
        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes
    ]
    for offsets, _ in boxes:
        found.storage_data[MetadataIndex(name, torch.Size(offsets))] = info
    path.write_bytes(pickle.dumps(found))


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (10, 30)), ((0, 0), (10, 30))],  # the same half twice
        [((0, 0), (10, 30)), ((5, 0), (10, 30))],
        [((0, 0), (20, 15)), ((0, 10), (20, 15))],
        [((0, 0), (20, 10)), ((0, 10), (10, 20)), ((5, 10), (10, 20))],
        [((0, 0), (20, 29))],
        [((0, 0), (20, 31))],
    ],
)
def test_pieces_that_overlap_or_leave_something_out(shards: Path, boxes: Any) -> None:
    cut(shards, boxes)
    refused(shards, "a.weight: its chunks overlap or do not cover the shape (20, 30)")


def test_a_piece_larger_than_its_bytes(shards: Path) -> None:
    path = shards / ".metadata"
    with open(path, "rb") as file:
        found = pickle.load(file)
    facts = found.state_dict_metadata["model.b"]
    facts.size = facts.chunks[0].__dict__["sizes"] = torch.Size([2**40])
    path.write_bytes(pickle.dumps(found))
    refused(shards, "model.b", "cannot hold it")


@pytest.mark.parametrize("size", [(2**62, 2**62, 0), (-1,), ("a",)])
def test_dimensions_that_no_tensor_has(shards: Path, size: Any) -> None:
    path = shards / ".metadata"
    with open(path, "rb") as file:
        found = pickle.load(file)
    found.state_dict_metadata["model.b"].size = list(size)
    path.write_bytes(pickle.dumps(found))
    with pytest.raises(LoadError):
        DCPReader(shards)
