"""Shards of tensors: which chunks of the full tensor a rank holds, and which rank saves them.

A chunk is a hyperrectangle, given by offsets and sizes as in DCP's `ChunkStorageMetadata`. A DTensor shard is one chunk; a
range of a flattened tensor (FSDP 1) decomposes into several.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ...runtime.system.file_names import short_repr
from ...runtime.tensors.dtensor import is_dtensor


@dataclass(frozen=True)
class Chunk:
    """A hyperrectangle of a tensor.

    Attributes:
        offsets, sizes: First index and extent in each dimension.
        start: Index of its first element in the flattened local shard.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class ShardLayout:
    """The chunks of a tensor that a rank holds.

    Attributes:
        shape: Shape of the full tensor.
        chunks: Chunks in the order of their elements in local memory.
        is_writer: True on the one rank among replicas that saves the chunks.
    """

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    is_writer: bool

    @property
    def writes_scalars(self) -> bool:
        """True on the rank that saves the first element, and with it values that exist once per tensor, such as a step."""
        return self.is_writer and any(not any(chunk.offsets) for chunk in self.chunks)

    def rebased(self) -> ShardLayout:
        """Returns the layout with `Chunk.start` counted from the first chunk."""
        at = self.chunks[0].start if self.chunks else 0
        return replace(self, chunks=tuple(replace(chunk, start=chunk.start - at) for chunk in self.chunks))


@dataclass(frozen=True, eq=False)
class LocalShard:
    """A rank's local part of a tensor.

    Attributes:
        layout: The chunks it consists of.
        local: Live memory with the elements of the chunks, one chunk after the other.
    """

    layout: ShardLayout
    local: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the full tensor."""
        return self.layout.shape

    def chunk_views(self) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """Yields each chunk with a view of its elements."""
        for chunk in self.layout.chunks:
            if tuple(self.local.shape) == chunk.sizes:
                yield chunk, self.local
            else:
                yield chunk, self.local.view(-1)[chunk.start : chunk.start + chunk.numel].view(chunk.sizes)


def full_layout(shape: tuple[int, ...], is_writer: bool) -> ShardLayout:
    """Returns the layout of an unsharded tensor."""
    return ShardLayout(tuple(shape), (Chunk((0,) * len(shape), tuple(shape)),), is_writer)


def flat_range_to_layout(shape: tuple[int, ...], start: int, stop: int, at: int, is_writer: bool) -> ShardLayout:
    """Returns the layout of elements `start` to `stop` of a flattened tensor, stored from index `at` of local memory."""
    chunks = []
    for offsets, sizes in _flat_range_to_chunks(tuple(shape), start, stop):
        chunks.append(Chunk(offsets, sizes, at))
        at += math.prod(sizes)
    return ShardLayout(tuple(shape), tuple(chunks), is_writer)


def _flat_range_to_chunks(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Decomposes a range of a flattened tensor into (offsets, sizes): the rest of a row, whole rows, the start of a row.

    Rows are slices along dimension 0; partial rows recurse into the other dimensions: at most ``2 * ndim - 1`` chunks.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    row, within = divmod(start, inner)
    if within:
        end = min(stop, (row + 1) * inner)
        for offsets, sizes in _flat_range_to_chunks(shape[1:], within, end - row * inner):
            yield (row, *offsets), (1, *sizes)
        start, row = end, row + 1
    rows = (stop - start) // inner
    if rows > 0:
        yield (row, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
        start, row = start + rows * inner, row + rows
    for offsets, sizes in _flat_range_to_chunks(shape[1:], 0, stop - start):
        yield (row, *offsets), (1, *sizes)


def local_shard(tensor: torch.Tensor) -> LocalShard:
    """Returns this rank's shard of a DTensor, or all of any other tensor, over live memory."""
    if is_dtensor(tensor):
        dtensor: Any = tensor
        return LocalShard(_dtensor_layout(dtensor), dtensor.detach().to_local())
    first = not dist.is_initialized() or dist.get_rank() == 0
    return LocalShard(full_layout(tuple(tensor.shape), first), tensor.detach())


def _dtensor_layout(tensor: Any) -> ShardLayout:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements, shape = tensor.device_mesh, tensor.placements, tuple(tensor.shape)
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"cannot save a tensor of shape {list(shape)} with partial placements {placements}: reduce it over ranks first"
        )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return ShardLayout(shape, (), False)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    # Meshes without rank 0 are replicas of its mesh, as are ranks along replicated mesh dimensions.
    is_writer = bool((mesh.mesh == 0).any()) and all(
        at == 0 for at, placement in zip(coordinate, placements, strict=True) if placement.is_replicate()
    )
    chunk = Chunk(tuple(offsets), tuple(sizes))
    if not math.prod(shape):
        chunk = Chunk((0,) * len(shape), shape)
        is_writer = dist.get_rank() == 0
    return ShardLayout(shape, (chunk,) if chunk.numel or not math.prod(shape) else (), is_writer)


def overlap(one: Chunk, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Chunk | None:
    """Returns the intersection of a chunk with another, or None if they are disjoint."""
    starts = tuple(map(max, one.offsets, offsets))
    ends = tuple(min(a + m, b + n) for a, m, b, n in zip(one.offsets, one.sizes, offsets, sizes, strict=True))
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        return None
    return Chunk(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))


def is_tiled(shape: tuple[int, ...], chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Returns True if chunks lie within a shape and every element of it lies in exactly one of them.

    Disjoint chunks within the shape cover it exactly when their element counts add up. Overlaps are found by a sweep along
    the dimension with the most distinct offsets: chunks cut along one dimension, or along the rows of a flattened tensor,
    take ``O(n log n)`` steps.

    Args:
        shape: Shape of the tensor.
        chunks: (offsets, sizes) of each chunk.
    """
    for offsets, sizes in chunks:
        if not len(offsets) == len(sizes) == len(shape):
            return False
        if any(not 0 <= at <= at + size <= most for at, size, most in zip(offsets, sizes, shape, strict=True)):
            return False
    filled = [(offsets, sizes) for offsets, sizes in chunks if math.prod(sizes)]
    if math.prod(shape) != sum(math.prod(sizes) for _, sizes in filled):
        return False
    return not _any_overlap(filled, len(shape))


def check_tiled(
    name: object, shape: tuple[int, ...], chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    """Raises ValueError if the chunks of all ranks leave gaps in a tensor, or overlap."""
    if not is_tiled(shape, chunks):
        raise ValueError(f"the chunks of {name} overlap or do not cover the shape {list(shape)}: {short_repr(chunks)}")


def _any_overlap(chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], dimensions: int) -> bool:
    """Returns True if any two non-empty chunks share an element."""
    if len(chunks) < 2:
        return False
    if not dimensions:
        return True
    along = max(range(dimensions), key=lambda dimension: len({offsets[dimension] for offsets, _ in chunks}))
    reached: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for offsets, sizes in sorted(chunks, key=lambda chunk: chunk[0][along]):
        reached = [chunk for chunk in reached if chunk[0][along] + chunk[1][along] > offsets[along]]
        if any(overlap(Chunk(offsets, sizes), *other) for other in reached):
            return True
        reached.append((offsets, sizes))
    return False


def narrow_to(tensor: torch.Tensor, chunk: Chunk, origin: tuple[int, ...]) -> torch.Tensor:
    """Returns the view of a chunk within a tensor whose first element has the index `origin` in the full tensor."""
    for dimension, (offset, size, at) in enumerate(zip(chunk.offsets, chunk.sizes, origin, strict=True)):
        tensor = tensor.narrow(dimension, offset - at, size)
    return tensor
