"""Writes checkpoints in the format of torch.distributed.checkpoint (DCP) without communication: each rank writes one file.

Each rank returns a list of `WriteResult`; one rank then writes the metadata of all files.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..storage.file_writer import FileWriter
from ..storage.formats import write_torch
from ..storage.staging import byte_view, is_dense_cpu
from .dcp_reader import METADATA_FILE
from .shard_layout import Chunk, LocalShard, check_tiled

Key = tuple[Any, ...]
"""Path of keys to a value in a nested state, such as ``("model", "layer.weight")``."""


@dataclass(frozen=True)
class WriteItem:
    """A value in a rank's file.

    Attributes:
        keys: Paths of the value; several for tied tensors.
        shape: Shape of the full tensor; None for values other than tensors.
        chunk: The chunk of it that is written.
    """

    keys: tuple[Key, ...]
    shape: tuple[int, ...] | None = None
    chunk: Chunk | None = None


@dataclass(frozen=True)
class WriteResult:
    """Location of a written item.

    Attributes:
        item: The item.
        dtype: Dtype of the tensor; None for other values.
        file: Name of the rank's file in the folder.
        offset, length: Byte range in it.
    """

    item: WriteItem
    dtype: torch.dtype | None
    file: str
    offset: int
    length: int


def shard_file(rank: int) -> str:
    """Returns the name of a rank's file."""
    return f"__{rank}_0.distcp"


def plan_writes(state: Mapping[Key, Any]) -> list[tuple[WriteItem, Any]] | None:
    """Returns the items that this rank writes, with views of their live values; None if there are none.

    Args:
        state: `LocalShard` tensors and other values, by path. This rank writes all other values.
    """
    keys_of: dict[Any, list[Key]] = {}
    for key, value in state.items():
        keys_of.setdefault(id(value) if isinstance(value, LocalShard) else key, []).append(key)
    found: list[tuple[WriteItem, Any]] = []
    for keys in keys_of.values():
        value = state[keys[0]]
        if not isinstance(value, LocalShard):
            found.append((WriteItem(tuple(keys)), value))
        elif value.layout.is_writer:
            shape = value.layout.shape
            found += [(WriteItem(tuple(keys), shape, chunk), view) for chunk, view in value.chunk_views()]
    return found or None


def write_items(state: Sequence[tuple[WriteItem, Any]], writer: FileWriter, file: str) -> list[WriteResult]:
    """Writes a rank's file."""
    results = []
    for item, value in state:
        offset = writer.size
        is_tensor = item.chunk is not None
        write_torch(_compact(value) if is_tensor else value, writer)
        results.append(WriteResult(item, value.dtype if is_tensor else None, file, offset, writer.size - offset))
    return results


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor over a storage of its own size, since `torch.save` writes whole storages."""
    tensor = tensor.detach()
    if is_dense_cpu(tensor) and tensor.numel():
        if tensor.untyped_storage().nbytes() == tensor.nbytes and type(tensor) is torch.Tensor:
            return tensor
        return torch.frombuffer(memoryview(byte_view(tensor)), dtype=tensor.dtype).view(tensor.shape)
    return tensor.to("cpu", copy=True).contiguous()


def write_metadata(folder: Path, results: Iterable[WriteResult]) -> None:
    """Writes the metadata file of a folder.

    Args:
        folder: The folder.
        results: Results of all ranks.

    Raises:
        ValueError: if the chunks of a tensor do not tile it.
    """
    with open(folder / METADATA_FILE, "xb") as file:
        pickle.dump(build_metadata(results), file)


def build_metadata(results: Iterable[WriteResult]) -> Any:
    """Returns DCP's metadata of a folder. Of replicas of a chunk, the first counts."""
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
    for result in results:
        chunk, shape = result.item.chunk, result.item.shape
        for key in result.item.keys:
            name = ".".join(map(str, key))
            index = MetadataIndex(name, None if chunk is None else torch.Size(chunk.offsets))
            if index in stored:
                continue
            paths[name] = key
            stored[index] = _StorageInfo(result.file, result.offset, result.length)
            if chunk is None or shape is None or result.dtype is None:
                values[name] = BytesStorageMetadata()
                continue
            tensor = TensorStorageMetadata(TensorProperties(dtype=result.dtype), torch.Size(shape), [])
            part = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            values.setdefault(name, tensor).chunks.append(part)
    for name, value in values.items():
        if isinstance(value, TensorStorageMetadata):
            check_tiled(name, tuple(value.size), [(tuple(part.offsets), tuple(part.sizes)) for part in value.chunks])
    return Metadata(values, planner_data=paths, storage_data=stored)
