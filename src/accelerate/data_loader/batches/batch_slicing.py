"""Batches cut along their rows, and joined: what the dispatcher does at the end of the data. No process, no messages.

A batch's rows are dimension 0 of its tensors and arrays, and the items of lists of plain values that are as long. What
is neither (a single number, a 0-dimensional tensor, a list of another length) belongs to the whole batch and goes
along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch

from ...runtime.tensors.pytree import honor_type, ignorant_find_batch_size
from .batch_sharding import StepSizes, irregular_sizes

_SCALARS = (str, int, float, bool, bytes, type(None))
SliceFn = Callable[..., Any]


class BatchSlicingError(ValueError):
    """A batch whose rows cannot be told, or batches that cannot be joined."""


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf.ndim > 0


def _is_plain_list(data: Any) -> bool:
    return type(data) in (list, tuple) and len(data) > 0 and all(isinstance(item, _SCALARS) for item in data)


def _leaves(data: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        for key in data:
            yield from _leaves(data[key], f"{path}[{key!r}]")
    elif isinstance(data, (list, tuple)) and not _is_plain_list(data):
        for index, item in enumerate(data):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, data


def batch_length(batch: Any) -> int | None:
    """How many rows a batch has: those of its tensors, else of its lists of plain values; None where it has neither.

    Raises:
        CannotCutError: when its tensors do not agree.
    """
    leaves = list(_leaves(batch))
    sizes = {path: len(leaf) for path, leaf in leaves if _has_rows(leaf)}
    if len(set(sizes.values())) > 1:
        raise BatchSlicingError(
            f"a batch cannot be cut into parts for the ranks, because its tensors have different numbers of rows: {sizes}. "
            "Give them one size in dimension 0, say how to cut with slice_fn_for_dispatch, or let every rank read its own "
            "part: DataLoaderConfiguration(dispatch_batches=False)."
        )
    if sizes:
        return next(iter(sizes.values()))
    lists = [len(leaf) for _, leaf in leaves if _is_plain_list(leaf)]
    if lists:
        return lists[0]
    return len(batch) if isinstance(batch, list) and batch else None


def slice_batch(batch: Any, start: int, stop: int, rows: int | None = None) -> Any:
    """Rows `start` to `stop` of a batch, in its containers."""
    rows = batch_length(batch) if rows is None else rows
    if _has_rows(batch):
        return batch[start:stop]
    if _is_plain_list(batch):
        return batch[start:stop] if len(batch) == rows else batch
    if isinstance(batch, Mapping):
        return like_mapping(batch, {key: slice_batch(batch[key], start, stop, rows) for key in batch})
    if isinstance(batch, list) and len(batch) == rows and not any(_has_rows(leaf) for _, leaf in _leaves(batch)):
        return batch[start:stop]  # a list of samples, not of columns
    if isinstance(batch, (list, tuple)):
        return honor_type(batch, [slice_batch(item, start, stop, rows) for item in batch])
    return batch


def concat_batches(batches: Sequence[Any]) -> Any:
    """Batches of one structure, one below the other.

    Raises:
        CannotCutError: when structures, or shapes beyond dimension 0, differ.
    """
    return _concat(batches, [BatchSlicer().rows(batch) for batch in batches])


def _concat(batches: Sequence[Any], rows: Sequence[int | None]) -> Any:
    first = batches[0]
    if any(type(batch) is not type(first) for batch in batches):
        raise BatchSlicingError(f"batches hold different things: {[type(batch).__name__ for batch in batches]}")
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
    if lists and not _is_plain_list(first):
        if any(len(batch) != len(first) for batch in batches):
            raise BatchSlicingError(f"batches have different lengths: {[len(batch) for batch in batches]}")
        return honor_type(first, [_concat(items, rows) for items in zip(*batches, strict=True)])
    return first


def _is_row_list(data: Any, rows: int | None) -> bool:
    """Whether a list's items are rows: plain values, or whole samples."""
    if len(data) != rows:
        return False
    return _is_plain_list(data) or (type(data) is list and not any(_has_rows(leaf) for _, leaf in _leaves(data)))


def like_mapping(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the class of `batch` with other items."""
    return items if type(batch) is dict else type(batch)(items)  # type: ignore[call-arg]


class BatchSlicer:
    """How a dispatcher cuts batches: along their rows, or as its user says.

    Args:
        slice_fn: Called as ``slice_fn(batch, slice, process_index=…, num_processes=…)``; None: `slice_batch`.
    """

    def __init__(self, slice_fn: SliceFn | None = None) -> None:
        self.slice_fn = slice_fn

    def rows(self, batch: Any) -> int | None:
        """How many rows a batch has; None where that cannot be told. With a `slice_fn`, the first tensor decides."""
        if self.slice_fn is not None and (found := ignorant_find_batch_size(batch)) is not None:
            return found
        try:
            return batch_length(batch)
        except BatchSlicingError:
            return None

    def slice_batch(self, batch: Any, start: int, stop: int, rows: int, rank: int = 0, ranks: int = 1) -> Any:
        """Rows `start` to `stop` of a batch that has `rows`, for one rank."""
        if self.slice_fn is None:
            return slice_batch(batch, start, stop, rows)
        return self.slice_fn(batch, slice(start, stop), process_index=rank, num_processes=ranks)

    def clone_rows(self, batches: Sequence[Any], count: int) -> list[Any]:
        """The first `count` rows of successive batches, in memory of their own; fewer where there are not so many."""
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
        """What was read for one step of all ranks, as one part a rank.

        As many equal batches as ranks are given out as they are. Otherwise all rows are joined and cut into parts of
        one size, rows from the start being repeated to make them even. Batches that cannot be joined, because their
        shapes differ, or whose rows cannot be told, are given out as they are, and repeated whole.

        Args:
            batches: One batch a rank, or fewer, or shorter ones, at the end of the data; with `split`, the one batch.
            ranks: How many parts.
            start: The first rows of the data, as a list of batches (see `clone_rows`).
            split: The batch has to be cut.

        Returns:
            The parts, the number of rows read (None if rows cannot be told), and the `StepSizes` if it is no plain one.

        Raises:
            CannotCutError: when a batch is to be split and its rows cannot be told.
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
            full = self._pad(
                concat_batches(batches) if len(batches) > 1 else batches[0], rows, rows_per_rank * ranks, start
            )
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
        except BatchSlicingError:  # the start has other shapes than the end: repeat what is here
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
    except BatchSlicingError as error:  # its tensors disagree, which the message says
        return error
    return BatchSlicingError(
        f"a batch of type {type(batch).__name__} cannot be split into parts for the ranks: it holds no tensor with a "
        "dimension and no list. Have collate_fn make one, say how to cut with slice_fn_for_dispatch, or use "
        "split_batches=False."
    )


def clone_batch(data: Any) -> Any:
    """Returns a batch in memory of its own: tensors, arrays and containers are copied, other objects are not."""
    if isinstance(data, torch.Tensor):
        return data.clone()
    if isinstance(data, np.ndarray):
        return data.copy()
    if isinstance(data, Mapping):
        return like_mapping(data, {key: clone_batch(data[key]) for key in data})
    if isinstance(data, (list, tuple)):
        return honor_type(data, [clone_batch(item) for item in data])
    return data
