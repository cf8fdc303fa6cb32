"""Every damage to a file of weights is told before anything changed, but for a flip among the values of a tensor.

A plain safetensors file has no checksum: values are whatever its bytes say. Its header is compared with its length.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import nn

import accelerate
from accelerate.offload.checkpoints import WeightsError, open_weights
from accelerate.offload.io.safetensors_file import SafetensorsFile
from tests.helpers.corruption import Bomb

FIRST, SECOND = "model-00001-of-00002", "model-00002-of-00002"


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))


def saved(folder: Path, suffix: str) -> Path:
    """A small checkpoint in two shards with an index."""
    state = net().state_dict()
    shards = {FIRST: ["0.weight", "0.bias"], SECOND: ["1.weight", "1.bias"]}
    for file, names in shards.items():
        part = {name: state[name].clone() for name in names}
        path = folder / f"{file}.{suffix}"
        save_file(part, path, {"format": "pt"}) if suffix == "safetensors" else torch.save(part, path)
    places = {name: f"{file}.{suffix}" for file, names in shards.items() for name in names}
    (folder / f"model.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / f"{FIRST}.{suffix}"


def told(folder: Path, name: str, *, strict: bool = False) -> bool:
    """Whether loading fails, with the file's name and without having changed anything."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    try:
        accelerate.load_checkpoint_in_model(model, folder, strict=strict)
    except WeightsError as error:
        return name in str(error) and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    return False


def flips(content: bytes, stop: int) -> Iterator[tuple[int, bytes]]:
    for place in range(stop):
        for bit in range(8):
            yield place, content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_every_bit_of_a_header(tmp_path: Path) -> None:
    path = saved(tmp_path, "safetensors")
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    note = content.index(b'"__metadata__"'), content.index(b"}") + 1  # says nothing about tensors
    missed = []
    for place, changed in flips(content, header):
        path.write_bytes(changed)
        if note[0] <= place < note[1] and not told(tmp_path, path.name):
            assert all(torch.equal(value, load(content)[name]) for name, value in load_all(path).items())
        elif not told(tmp_path, path.name):
            missed.append((place, changed[8:header]))
    assert missed == []


def load_all(path: Path) -> dict[str, torch.Tensor]:
    return dict(SafetensorsFile(path))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_every_length_and_what_else_happens_to_files(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path, suffix)
    other, content = path.with_name(f"{SECOND}.{suffix}"), path.read_bytes()
    Bomb.target = str(tmp_path / "executed")
    step = 1 if suffix == "safetensors" else 23
    changes = [content[:length] for length in range(0, len(content), step)]
    changes += [bytes(len(content)), pickle.dumps({"0.weight": Bomb()}), pickle.dumps(Bomb(), protocol=2)]
    if suffix == "safetensors":
        changes += [content + b"\0", save({"0.weight": torch.zeros(2, 3), "0.bias": torch.zeros(3)})]
    for changed in changes:
        path.write_bytes(changed)
        assert told(tmp_path, path.name), (len(changed), changed[:80])
    torch.save({"0.weight": Bomb()}, path)
    assert told(tmp_path, path.name)
    path.write_bytes(other.read_bytes())  # one shard in the place of another
    assert told(tmp_path, path.name)
    path.unlink()
    assert told(tmp_path, path.name)
    path.mkdir()
    assert told(tmp_path, path.name)
    assert not (tmp_path / "executed").exists()


def test_flips_in_a_pickled_file_run_nothing_and_end_nothing(tmp_path: Path) -> None:
    """What torch cannot see either (its archives' checksums are optional) gives other values, and no more."""
    path = saved(tmp_path, "bin")
    content = path.read_bytes()
    seen = 0
    for place in range(0, len(content), 11):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        seen += told(tmp_path, path.name)
    assert seen > 5


def test_what_the_library_refuses_ours_refuses(tmp_path: Path) -> None:
    """And the other way round: both read the same files."""
    entry: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers: list[Any] = [
        {"x": entry},
        {"x": entry, "__metadata__": {"a": "b"}},
        {"x": {**entry, "dtype": "F8_E8M0", "shape": [8]}},
        {"x": {**entry, "dtype": "F99"}},
        {"x": {**entry, "dtype": "F16"}},
        {"x": {**entry, "dtype": 3}},
        {"x": {**entry, "shape": [-2]}},
        {"x": {**entry, "shape": [2.0]}},
        {"x": {**entry, "shape": [3]}},
        {"x": {**entry, "shape": 2}},
        {"x": {**entry, "data_offsets": [4, 12]}},
        {"x": {**entry, "data_offsets": [8, 0]}},
        {"x": {**entry, "data_offsets": [0]}},
        {"x": {"shape": [2]}},
        {"x": [1]},
        {"x": entry, "y": entry},
        {"x": {**entry, "shape": [1], "data_offsets": [0, 4]}, "y": {**entry, "shape": [1], "data_offsets": [4, 8]}},
        {"x": {**entry, "shape": [1], "data_offsets": [0, 4]}},
        {"x": entry, "empty": {"dtype": "I64", "shape": [0, 3], "data_offsets": [8, 8]}},
        {},
        [],
        "x",
    ]
    for header in headers:
        text = json.dumps(header).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        assert readable_by_ours(path) == readable_by_theirs(path), header


def readable_by_ours(path: Path) -> bool:
    try:
        return open_weights(path) is not None and load_all(path) is not None
    except ValueError:
        return False


def readable_by_theirs(path: Path) -> bool:
    try:
        load_file(path)
    except (SafetensorError, AttributeError):  # AttributeError: a dtype that this release of torch lacks
        return False
    return True


def test_tensors_are_those_of_the_library_and_mapped_privately(tmp_path: Path) -> None:
    kinds = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool]
    kinds += [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.complex64, torch.uint16]
    state = {f"{kind}": torch.randint(0, 2, (3, 5)).to(kind) for kind in kinds}
    state |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    content, file = path.read_bytes(), SafetensorsFile(path)
    for name, value in load_file(path).items():
        mine = file[name]
        assert (
            mine.dtype == value.dtype and mine.shape == value.shape and mine.untyped_storage().nbytes() == mine.nbytes
        )
        assert torch.equal(mine.contiguous().view(-1).view(torch.uint8), value.contiguous().view(-1).view(torch.uint8))
    file["torch.float32"].zero_()
    assert path.read_bytes() == content and torch.equal(file["torch.float32"], state["torch.float32"]) is False
