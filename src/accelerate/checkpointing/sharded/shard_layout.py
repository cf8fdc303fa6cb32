"""Tensors of which each rank holds a part: where the part lies in the whole, as boxes, and who saves it.

A box is a stretch of every dimension. A shard along a dimension is one box; a stretch of a flattened tensor is a few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ...runtime.tensors.dtensor import is_dtensor


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor.

    Attributes:
        offsets, sizes: Where it begins, and how far it goes, in every dimension.
        start: Where its values begin in what the rank holds, flattened.
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
    """What a rank holds of a tensor.

    Attributes:
        shape: The whole tensor's.
        boxes: The parts, in the order in which their values lie in memory.
        writes: Of ranks that hold the same, this one saves it.
    """

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    is_writer: bool

    @property
    def writes_scalars(self) -> bool:
        """Whether this rank saves the first element, and with it what exists once for the whole tensor."""
        return self.is_writer and any(not any(chunk.offsets) for chunk in self.chunks)

    def rebased(self) -> ShardLayout:
        """The same of a rank that holds nothing in front of it."""
        at = self.chunks[0].start if self.chunks else 0
        return replace(self, chunks=tuple(replace(chunk, start=chunk.start - at) for chunk in self.chunks))


@dataclass(frozen=True, eq=False)
class LocalShard:
    """A tensor of which this rank holds a part.

    Attributes:
        layout: Which part.
        local: Its values: those of the boxes, one behind the other.
    """

    layout: ShardLayout
    local: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's."""
        return self.layout.shape

    def chunk_views(self) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """Each box with the live values in it."""
        for chunk in self.layout.chunks:
            if tuple(self.local.shape) == chunk.sizes:
                yield chunk, self.local
            else:
                yield chunk, self.local.view(-1)[chunk.start : chunk.start + chunk.numel].view(chunk.sizes)


def full_layout(shape: tuple[int, ...], is_writer: bool) -> ShardLayout:
    """The layout of a tensor that a rank holds as a whole."""
    return ShardLayout(tuple(shape), (Chunk((0,) * len(shape), tuple(shape)),), is_writer)


def flat_range_to_layout(shape: tuple[int, ...], start: int, stop: int, at: int, is_writer: bool) -> ShardLayout:
    """The layout of elements `start` to `stop` of a flattened tensor, which lie at `at` in what the rank holds."""
    chunks = []
    for offsets, sizes in _flat_range_to_chunks(tuple(shape), start, stop):
        chunks.append(Chunk(offsets, sizes, at))
        at += math.prod(sizes)
    return ShardLayout(tuple(shape), tuple(chunks), is_writer)


def _flat_range_to_chunks(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A stretch of a flattened tensor as boxes: the rest of a row, whole rows, the beginning of a row."""
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
    """What this rank holds of a tensor: a shard of a DTensor, and all of any other. The values are the live ones."""
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
            f"a tensor of shape {list(shape)} waits to be summed over ranks ({placements}): it has no state"
        )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return ShardLayout(shape, (), False)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    # Meshes beside the one of rank 0 hold copies of it, and so do ranks along dimensions that are not sharded.
    is_writer = bool((mesh.mesh == 0).any()) and all(
        at == 0 for at, placement in zip(coordinate, placements, strict=True) if placement.is_replicate()
    )
    chunk = Chunk(tuple(offsets), tuple(sizes))
    if not math.prod(shape):
        chunk = Chunk((0,) * len(shape), shape)
        is_writer = dist.get_rank() == 0
    return ShardLayout(shape, (chunk,) if chunk.numel or not math.prod(shape) else (), is_writer)


def overlap(one: Chunk, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Chunk | None:
    """The part that a box shares with another, if there is one."""
    starts = tuple(map(max, one.offsets, offsets))
    ends = tuple(min(a + m, b + n) for a, m, b, n in zip(one.offsets, one.sizes, offsets, sizes, strict=True))
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        return None
    return Chunk(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))


def is_tiled(shape: tuple[int, ...], chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """True if boxes lie within a shape and every element lies in exactly one of them.

    Boxes within the shape that do not overlap and have as many elements as it cover it. A sweep along the dimension in which
    most of them begin apart finds overlaps: boxes cut along one dimension, or along the rows of a flattened tensor, take
    ``n log n`` steps.

    Args:
        shape: The tensor's.
        boxes: (offsets, sizes) of each.
    """
    whole_tensor = ((0,) * len(shape), tuple(shape))
    if len(chunks) == 1 and chunks[0] == whole_tensor:
        return all(size >= 0 for size in shape)
    for offsets, sizes in chunks:
        if not len(offsets) == len(sizes) == len(shape):
            return False
        if any(not 0 <= at <= at + size <= most for at, size, most in zip(offsets, sizes, shape, strict=True)):
            return False
    filled = [(offsets, sizes) for offsets, sizes in chunks if math.prod(sizes)]
    if math.prod(shape) != sum(math.prod(sizes) for _, sizes in filled):
        return False
    return not _any_overlap(filled, len(shape))


def _any_overlap(chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], dimensions: int) -> bool:
    """Whether any two boxes with elements share one."""
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
    """The view of a box, in a tensor that begins at `origin` of the whole one."""
    for dimension, (offset, size, at) in enumerate(zip(chunk.offsets, chunk.sizes, origin, strict=True)):
        tensor = tensor.narrow(dimension, offset - at, size)
    return tensor
