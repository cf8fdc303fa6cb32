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
class Box:
    """A part of a tensor.

    Attributes:
        offsets, sizes: Where it begins, and how far it goes, in every dimension.
        start: Where its values begin in what the rank holds, flattened.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int = 0

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Layout:
    """What a rank holds of a tensor.

    Attributes:
        shape: The whole tensor's.
        boxes: The parts, in the order in which their values lie in memory.
        writes: Of ranks that hold the same, this one saves it.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    writes: bool

    @property
    def leads(self) -> bool:
        """Whether this rank saves the first element, and with it what exists once for the whole tensor."""
        return self.writes and any(not any(box.offsets) for box in self.boxes)

    def by_itself(self) -> Layout:
        """The same of a rank that holds nothing in front of it."""
        at = self.boxes[0].start if self.boxes else 0
        return replace(self, boxes=tuple(replace(box, start=box.start - at) for box in self.boxes))


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor of which this rank holds a part.

    Attributes:
        layout: Which part.
        local: Its values: those of the boxes, one behind the other.
    """

    layout: Layout
    local: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's."""
        return self.layout.shape

    def pieces(self) -> Iterator[tuple[Box, torch.Tensor]]:
        """Each box with the live values in it."""
        for box in self.layout.boxes:
            if tuple(self.local.shape) == box.sizes:
                yield box, self.local
            else:
                yield box, self.local.view(-1)[box.start : box.start + box.count].view(box.sizes)


def whole(shape: tuple[int, ...], writes: bool) -> Layout:
    """The layout of a tensor that a rank holds as a whole."""
    return Layout(tuple(shape), (Box((0,) * len(shape), tuple(shape)),), writes)


def stretch(shape: tuple[int, ...], start: int, stop: int, at: int, writes: bool) -> Layout:
    """The layout of elements `start` to `stop` of a flattened tensor, which lie at `at` in what the rank holds."""
    boxes = []
    for offsets, sizes in _cut(tuple(shape), start, stop):
        boxes.append(Box(offsets, sizes, at))
        at += math.prod(sizes)
    return Layout(tuple(shape), tuple(boxes), writes)


def _cut(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
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
        for offsets, sizes in _cut(shape[1:], within, end - row * inner):
            yield (row, *offsets), (1, *sizes)
        start, row = end, row + 1
    rows = (stop - start) // inner
    if rows > 0:
        yield (row, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
        start, row = start + rows * inner, row + rows
    for offsets, sizes in _cut(shape[1:], 0, stop - start):
        yield (row, *offsets), (1, *sizes)


def held(tensor: torch.Tensor) -> Held:
    """What this rank holds of a tensor: a shard of a DTensor, and all of any other. The values are the live ones."""
    if is_dtensor(tensor):
        dtensor: Any = tensor
        return Held(_layout_of_dtensor(dtensor), dtensor.detach().to_local())
    first = not dist.is_initialized() or dist.get_rank() == 0
    return Held(whole(tuple(tensor.shape), first), tensor.detach())


def _layout_of_dtensor(tensor: Any) -> Layout:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements, shape = tensor.device_mesh, tensor.placements, tuple(tensor.shape)
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"a tensor of shape {list(shape)} waits to be summed over ranks ({placements}): it has no state"
        )
    place = mesh.get_coordinate()
    if place is None:
        return Layout(shape, (), False)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    # Meshes beside the one of rank 0 hold copies of it, and so do ranks along dimensions that are not sharded.
    writes = bool((mesh.mesh == 0).any()) and all(
        at == 0 for at, placement in zip(place, placements, strict=True) if placement.is_replicate()
    )
    box = Box(tuple(offsets), tuple(sizes))
    if not math.prod(shape):
        box = Box((0,) * len(shape), shape)
        writes = dist.get_rank() == 0
    return Layout(shape, (box,) if box.count or not math.prod(shape) else (), writes)


def overlap(one: Box, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Box | None:
    """The part that a box shares with another, if there is one."""
    starts = tuple(map(max, one.offsets, offsets))
    ends = tuple(min(a + m, b + n) for a, m, b, n in zip(one.offsets, one.sizes, offsets, sizes, strict=True))
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        return None
    return Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))


def is_tiled(shape: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """True if boxes lie within a shape and every element lies in exactly one of them.

    Boxes within the shape that do not overlap and have as many elements as it cover it. A sweep along the dimension in which
    most of them begin apart finds overlaps: boxes cut along one dimension, or along the rows of a flattened tensor, take
    ``n log n`` steps.

    Args:
        shape: The tensor's.
        boxes: (offsets, sizes) of each.
    """
    whole_tensor = ((0,) * len(shape), tuple(shape))
    if len(boxes) == 1 and boxes[0] == whole_tensor:
        return all(size >= 0 for size in shape)
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(shape):
            return False
        if any(not 0 <= at <= at + size <= most for at, size, most in zip(offsets, sizes, shape, strict=True)):
            return False
    filled = [(offsets, sizes) for offsets, sizes in boxes if math.prod(sizes)]
    if math.prod(shape) != sum(math.prod(sizes) for _, sizes in filled):
        return False
    return not _overlap_somewhere(filled, len(shape))


def _overlap_somewhere(boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], dimensions: int) -> bool:
    """Whether any two boxes with elements share one."""
    if len(boxes) < 2:
        return False
    if not dimensions:
        return True
    along = max(range(dimensions), key=lambda dimension: len({offsets[dimension] for offsets, _ in boxes}))
    reached: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for offsets, sizes in sorted(boxes, key=lambda box: box[0][along]):
        reached = [box for box in reached if box[0][along] + box[1][along] > offsets[along]]
        if any(overlap(Box(offsets, sizes), *other) for other in reached):
            return True
        reached.append((offsets, sizes))
    return False


def part_of(tensor: torch.Tensor, box: Box, origin: tuple[int, ...]) -> torch.Tensor:
    """The view of a box, in a tensor that begins at `origin` of the whole one."""
    for dimension, (offset, size, at) in enumerate(zip(box.offsets, box.sizes, origin, strict=True)):
        tensor = tensor.narrow(dimension, offset - at, size)
    return tensor
