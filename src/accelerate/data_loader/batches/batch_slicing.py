"""Slices batches along their rows and concatenates them, for the end of dispatched data. Pure functions of one process.

The rows of a batch are dimension 0 of its tensors and arrays, and the items of lists of scalars of the same length. All
other objects (a single number, a 0-dimensional tensor, a list of another length) belong to the whole batch and are
repeated in every slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch

from ...runtime.tensors.pytree import honor_type, ignorant_find_batch_size, recursively_apply
from .batch_sharding import StepSizes, irregular_sizes

_SCALARS = (str, int, float, bool, bytes, type(None))
SliceFn = Callable[..., Any]


class BatchSlicingError(ValueError):
    """A batch whose number of rows is undefined, or batches that cannot be concatenated."""


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf.ndim > 0


def _is_scalar_list(data: Any) -> bool:
    return type(data) in (list, tuple) and len(data) > 0 and all(isinstance(item, _SCALARS) for item in data)


def _leaves(data: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        for key in data:
            yield from _leaves(data[key], f"{path}[{key!r}]")
    elif isinstance(data, (list, tuple)) and not _is_scalar_list(data):
        for index, item in enumerate(data):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, data


def _is_row_list(data: Any, rows: int | None) -> bool:
    """Returns whether the items of a list are rows: scalars, or whole samples instead of columns."""
    if len(data) != rows:
        return False
    return _is_scalar_list(data) or (type(data) is list and not any(_has_rows(leaf) for _, leaf in _leaves(data)))


def batch_length(batch: Any) -> int | None:
    """Returns the number of rows of a batch: of its tensors, else of its lists of scalars; None if it has neither.

    Raises:
        BatchSlicingError: If its tensors differ in their number of rows.
    """
    leaves = list(_leaves(batch))
    sizes = {path: len(leaf) for path, leaf in leaves if _has_rows(leaf)}
    if len(set(sizes.values())) > 1:
        raise BatchSlicingError(
            f"a batch cannot be split over the ranks, because its tensors have different numbers of rows: {sizes}. Give "
            "them the same size in dimension 0, pass a slice_fn_for_dispatch, or let every rank read its own shard: "
            "DataLoaderConfiguration(dispatch_batches=False)."
        )
    if sizes:
        return next(iter(sizes.values()))
    lists = [len(leaf) for _, leaf in leaves if _is_scalar_list(leaf)]
    if lists:
        return lists[0]
    return len(batch) if isinstance(batch, list) and batch else None


def slice_batch(batch: Any, start: int, stop: int, rows: int | None = None) -> Any:
    """Returns rows `start` to `stop` of a batch that has `rows`, in the same containers."""
    rows = batch_length(batch) if rows is None else rows
    if _has_rows(batch):
        return batch[start:stop]
    if isinstance(batch, Mapping):
        return like_mapping(batch, {key: slice_batch(batch[key], start, stop, rows) for key in batch})
    if isinstance(batch, (list, tuple)):
        if _is_row_list(batch, rows):
            return batch[start:stop]
        if not _is_scalar_list(batch):
            return honor_type(batch, [slice_batch(item, start, stop, rows) for item in batch])
    return batch


def concat_batches(batches: Sequence[Any]) -> Any:
    """Concatenates batches of the same structure along their rows.

    Raises:
        BatchSlicingError: If structures, or shapes beyond dimension 0, differ.
    """
    return _concat(batches, [BatchSlicer().rows(batch) for batch in batches])


def _concat(batches: Sequence[Any], rows: Sequence[int | None]) -> Any:
    first = batches[0]
    if any(type(batch) is not type(first) for batch in batches):
        raise BatchSlicingError(f"batches hold different types: {[type(batch).__name__ for batch in batches]}")
    if _has_rows(first):
        if any(batch.shape[1:] != first.shape[1:] for batch in batches):
            raise BatchSlicingError(f"batches have different shapes: {[tuple(batch.shape) for batch in batches]}")
        return torch.cat(list(batches)) if isinstance(first, torch.Tensor) else np.concatenate(list(batches))
    if isinstance(first, Mapping):
        if any(batch.keys() != first.keys() for batch in batches):
            raise BatchSlicingError(f"batches have different keys: {[list(batch) for batch in batches]}")
        return like_mapping(first, {key: _concat([batch[key] for batch in batches], rows) for key in first})
    lists = isinstance(first, (list, tuple))
    if lists and all(_is_row_list(batch, count) for batch, count in zip(batches, rows, strict=True)):
        return type(first)(item for batch in batches for item in batch)
    if lists and not _is_scalar_list(first):
        if any(len(batch) != len(first) for batch in batches):
            raise BatchSlicingError(f"batches have different lengths: {[len(batch) for batch in batches]}")
        return honor_type(first, [_concat(items, rows) for items in zip(*batches, strict=True)])
    return first


def like_mapping(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Returns a mapping of the class of `batch` with other items."""
    return items if type(batch) is dict else type(batch)(items)  # type: ignore[call-arg]


class BatchSlicer:
    """Slices the batches of a dispatcher: along their rows, or by a function of the user.

    Args:
        slice_fn: Called as ``slice_fn(batch, slice, process_index=…, num_processes=…)``; None: `slice_batch`.
    """

    def __init__(self, slice_fn: SliceFn | None = None) -> None:
        self.slice_fn = slice_fn

    def rows(self, batch: Any) -> int | None:
        """Returns the number of rows of a batch, or None if undefined. With a `slice_fn`, the first tensor counts."""
        if self.slice_fn is not None and (found := ignorant_find_batch_size(batch)) is not None:
            return found
        try:
            return batch_length(batch)
        except BatchSlicingError:
            return None

    def slice_batch(self, batch: Any, start: int, stop: int, rows: int, rank: int = 0, ranks: int = 1) -> Any:
        """Returns rows `start` to `stop` of a batch that has `rows`, for one rank."""
        if self.slice_fn is None:
            return slice_batch(batch, start, stop, rows)
        return self.slice_fn(batch, slice(start, stop), process_index=rank, num_processes=ranks)

    def clone_rows(self, batches: Sequence[Any], count: int) -> list[Any]:
        """Returns copies of the first `count` rows of successive batches; fewer if there are not as many."""
        cloned: list[Any] = []
        for batch in batches:
            rows = self.rows(batch)
            if not rows or count <= 0:
                break
            cloned.append(clone_batch(self.slice_batch(batch, 0, min(rows, count), rows)))
            count -= rows
        return cloned

    def shard(
        self, batches: Sequence[Any], ranks: int, start: Sequence[Any], split: bool
    ) -> tuple[list[Any], int | None, StepSizes | None]:
        """Turns the batches read for one step into one shard per rank.

        If there are as many batches as ranks and all have the same size, they are the shards. Otherwise their rows are
        concatenated, padded with rows from the start, and split into shards of equal size. Batches that cannot be
        concatenated, because their shapes differ or their rows are undefined, become shards as they are, and are
        repeated whole.

        Args:
            batches: One batch per rank, or fewer or shorter ones at the end of the data; with `split`, a single batch.
            ranks: Number of shards.
            start: The first rows of the data, as a list of batches (see `clone_rows`).
            split: The batch must be split.

        Returns:
            The shards, the number of rows read (None if undefined), and the `StepSizes` unless all shards are full.

        Raises:
            BatchSlicingError: If a batch must be split and its rows are undefined.
        """
        sizes = [self.rows(batch) for batch in batches]
        if not split and self.slice_fn is None and len(batches) == ranks and len(set(sizes)) == 1:
            return list(batches), None if sizes[0] is None else sizes[0] * ranks, None
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            if split:
                raise _unsplittable_error(batches[0])
            parts = [batches[rank % len(batches)] for rank in range(ranks)]
            return parts, None, StepSizes((1,) * ranks, len(batches), counts_batches=True)
        rows = sum(known)
        rows_per_rank = -(-rows // ranks)
        try:
            full = concat_batches(batches) if len(batches) > 1 else batches[0]
            full = self._pad(full, rows, rows_per_rank * ranks, start)
        except BatchSlicingError:
            if self.slice_fn is not None or len(batches) == 1:
                raise
            held = [known[rank % len(known)] for rank in range(ranks)]
            return [batches[rank % len(batches)] for rank in range(ranks)], rows, irregular_sizes(held, rows)
        bounds = [(rank * rows_per_rank, (rank + 1) * rows_per_rank) for rank in range(ranks)]
        parts = [self.slice_batch(full, *bounds[rank], rows_per_rank * ranks, rank, ranks) for rank in range(ranks)]
        return parts, rows, irregular_sizes([rows_per_rank] * ranks, rows)

    def _pad(self, batch: Any, rows: int, target_rows: int, start: Sequence[Any]) -> Any:
        if target_rows == rows:
            return batch
        try:
            return concat_batches(self._with_repeated_rows(batch, target_rows - rows, start or [batch]))
        except BatchSlicingError:  # shapes differ between start and end: repeat rows of this batch
            return concat_batches(self._with_repeated_rows(batch, target_rows - rows, [batch]))

    def _with_repeated_rows(self, batch: Any, missing: int, source: Sequence[Any]) -> list[Any]:
        pieces = [batch]
        for piece in cycle(source):
            rows = self.rows(piece)
            assert rows
            pieces.append(self.slice_batch(piece, 0, min(missing, rows), rows))
            missing -= rows
            if missing <= 0:
                return pieces
        raise AssertionError("unreachable: a cycle does not end")


def _unsplittable_error(batch: Any) -> BatchSlicingError:
    try:
        batch_length(batch)
    except BatchSlicingError as error:  # its tensors differ in length
        return error
    return BatchSlicingError(
        f"a batch of type {type(batch).__name__} cannot be split over the ranks: it holds no tensor with a dimension and "
        "no list. Return one from collate_fn, pass a slice_fn_for_dispatch, or use split_batches=False."
    )


def clone_batch(data: Any) -> Any:
    """Returns a copy of a batch: tensors, arrays and containers are copied, other objects are shared."""
    return recursively_apply(_clone, data, test_type=_is_array)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (torch.Tensor, np.ndarray))


def _clone(array: Any) -> Any:
    return array.clone() if isinstance(array, torch.Tensor) else array.copy()
