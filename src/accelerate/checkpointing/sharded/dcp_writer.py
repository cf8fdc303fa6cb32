"""Folders in torch.distributed.checkpoint's layout, written without a word between the ranks: each one its own file.

When all are written, one rank describes them. What that takes is what each rank says of its file: a list of `Place`.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...runtime.system.file_names import short_repr
from ..storage.file_writer import FileWriter
from ..storage.formats import write_torch
from ..storage.staging import as_bytes, is_plain
from .dcp_reader import DESCRIPTION
from .shard_layout import Box, Held, is_tiled

Key = tuple[Any, ...]
"""The keys that lead to a value in a nested state, such as ``("model", "layer.weight")``."""


@dataclass(frozen=True)
class Shard:
    """What belongs into a rank's file, besides the value.

    Attributes:
        keys: Where the value belongs; several where tensors are tied.
        shape: The whole tensor's; None for a value that is no tensor.
        box: Which part of it.
    """

    keys: tuple[Key, ...]
    shape: tuple[int, ...] | None = None
    box: Box | None = None


@dataclass(frozen=True)
class Place:
    """Where a piece was written.

    Attributes:
        shard: What was written.
        dtype: The tensor's; None for other values.
        file: The rank's file in the folder.
        start, length: Its bytes.
    """

    shard: Shard
    dtype: torch.dtype | None
    file: str
    start: int
    length: int


def file_of(rank: int) -> str:
    """The name of a rank's file."""
    return f"__{rank}_0.distcp"


def own_shards(state: Mapping[Key, Any]) -> list[tuple[Shard, Any]] | None:
    """What this rank writes of a state, with the live values; None: nothing.

    Args:
        state: Tensors (as `Held`) and other values, by the keys that lead there. Other values are this rank's to write.
    """
    keys_of: dict[Any, list[Key]] = {}
    for key, value in state.items():
        keys_of.setdefault(id(value) if isinstance(value, Held) else key, []).append(key)
    found: list[tuple[Shard, Any]] = []
    for keys in keys_of.values():
        value = state[keys[0]]
        if not isinstance(value, Held):
            found.append((Shard(tuple(keys)), value))
        elif value.layout.writes:
            shape = value.layout.shape
            found += [(Shard(tuple(keys), shape, box), view) for box, view in value.pieces()]
    return found or None


def write_shards(state: Sequence[tuple[Shard, Any]], writer: FileWriter, file: str) -> list[Place]:
    """Writes a rank's file; gives what is to be said of it."""
    places = []
    for shard, value in state:
        start = writer.size
        is_tensor = shard.box is not None
        write_torch(_by_itself(value) if is_tensor else value, writer)
        places.append(Place(shard, value.dtype if is_tensor else None, file, start, writer.size - start))
    return places


def _by_itself(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory that holds nothing else, since `torch.save` writes all of it."""
    tensor = tensor.detach()
    if is_plain(tensor) and tensor.numel():
        if tensor.untyped_storage().nbytes() == tensor.nbytes and type(tensor) is torch.Tensor:
            return tensor
        return torch.frombuffer(memoryview(as_bytes(tensor)), dtype=tensor.dtype).view(tensor.shape)
    return tensor.to("cpu", copy=True).contiguous()  # the first is a copy of this tensor alone


def describe(folder: Path, places: Iterable[Place]) -> None:
    """Writes the file that says what is in a folder.

    Args:
        folder: The folder.
        places: What all ranks said of their files.

    Raises:
        ValueError: when a tensor was not written as a whole.
    """
    with open(folder / DESCRIPTION, "xb") as file:
        pickle.dump(description(places), file)


def description(places: Iterable[Place]) -> Any:
    """What is in a folder, as torch.distributed.checkpoint has it. Of copies of a piece, the first counts."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    values: dict[str, Any] = {}
    paths: dict[str, Key] = {}
    stored: dict[Any, Any] = {}
    for place in places:
        box, shape = place.shard.box, place.shard.shape
        for key in place.shard.keys:
            name = ".".join(map(str, key))
            index = MetadataIndex(name, None if box is None else torch.Size(box.offsets))
            if index in stored:
                continue
            paths[name] = key
            stored[index] = _StorageInfo(place.file, place.start, place.length)
            if box is None or shape is None or place.dtype is None:
                values[name] = BytesStorageMetadata()
                continue
            known = values.setdefault(
                name, TensorStorageMetadata(TensorProperties(dtype=place.dtype), torch.Size(shape), [])
            )
            known.chunks.append(ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)))
    _check_whole(values)
    return Metadata(values, planner_data=paths, storage_data=stored)


def _check_whole(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        chunks = getattr(value, "chunks", None)
        if chunks is None:
            continue
        boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
        if not is_tiled(tuple(value.size), boxes):
            count = sum(chunk.sizes.numel() for chunk in chunks)
            raise ValueError(
                f"{name} of shape {list(value.size)} has {value.size.numel()} elements, and the ranks wrote {count}, in "
                f"pieces that leave some out or write some twice: {short_repr(boxes)}"
            )
