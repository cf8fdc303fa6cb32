"""Folders in torch.distributed.checkpoint's layout, written without a word between the ranks: each one its own file.

When all are written, one rank describes them. What that takes is what each rank says of its file: a list of `WriteResult`.
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
from ..storage.staging import byte_view, is_dense_cpu
from .dcp_reader import METADATA_FILE
from .shard_layout import Chunk, LocalShard, is_tiled

Key = tuple[Any, ...]
"""The keys that lead to a value in a nested state, such as ``("model", "layer.weight")``."""


@dataclass(frozen=True)
class WriteItem:
    """What belongs into a rank's file, besides the value.

    Attributes:
        keys: Where the value belongs; several where tensors are tied.
        shape: The whole tensor's; None for a value that is no tensor.
        box: Which part of it.
    """

    keys: tuple[Key, ...]
    shape: tuple[int, ...] | None = None
    chunk: Chunk | None = None


@dataclass(frozen=True)
class WriteResult:
    """Where a piece was written.

    Attributes:
        shard: What was written.
        dtype: The tensor's; None for other values.
        file: The rank's file in the folder.
        start, length: Its bytes.
    """

    item: WriteItem
    dtype: torch.dtype | None
    file: str
    offset: int
    length: int


def shard_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"__{rank}_0.distcp"


def plan_writes(state: Mapping[Key, Any]) -> list[tuple[WriteItem, Any]] | None:
    """What this rank writes of a state, with the live values; None: nothing.

    Args:
        state: `LocalShard` tensors and other values, by the keys that lead there. Other values are this rank's to write.
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
    """Writes a rank's file; gives what is to be said of it."""
    results = []
    for item, value in state:
        offset = writer.size
        is_tensor = item.chunk is not None
        write_torch(_compact(value) if is_tensor else value, writer)
        results.append(WriteResult(item, value.dtype if is_tensor else None, file, offset, writer.size - offset))
    return results


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory that holds nothing else, since `torch.save` writes all of it."""
    tensor = tensor.detach()
    if is_dense_cpu(tensor) and tensor.numel():
        if tensor.untyped_storage().nbytes() == tensor.nbytes and type(tensor) is torch.Tensor:
            return tensor
        return torch.frombuffer(memoryview(byte_view(tensor)), dtype=tensor.dtype).view(tensor.shape)
    return tensor.to("cpu", copy=True).contiguous()  # the first is a copy of this tensor alone


def write_metadata(folder: Path, results: Iterable[WriteResult]) -> None:
    """Writes the file that says what is in a folder.

    Args:
        folder: The folder.
        places: What all ranks said of their files.

    Raises:
        ValueError: when a tensor was not written as a whole.
    """
    with open(folder / METADATA_FILE, "xb") as file:
        pickle.dump(build_metadata(results), file)


def build_metadata(results: Iterable[WriteResult]) -> Any:
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
            known = values.setdefault(
                name, TensorStorageMetadata(TensorProperties(dtype=result.dtype), torch.Size(shape), [])
            )
            known.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
    _check_tiled(values)
    return Metadata(values, planner_data=paths, storage_data=stored)


def _check_tiled(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        chunks = getattr(value, "chunks", None)
        if chunks is None:
            continue
        chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
        if not is_tiled(tuple(value.size), chunks):
            count = sum(chunk.sizes.numel() for chunk in chunks)
            raise ValueError(
                f"{name} of shape {list(value.size)} has {value.size.numel()} elements, and the ranks wrote {count}, in "
                f"pieces that leave some out or write some twice: {short_repr(chunks)}"
            )
