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
from .batch_sharding import Round, describe

_PLAIN = (str, int, float, bool, bytes, type(None))
SliceFn = Callable[..., Any]


class CannotCutError(ValueError):
    """A batch whose rows cannot be told, or batches that cannot be joined."""


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf.ndim > 0


def _is_plain_list(data: Any) -> bool:
    return type(data) in (list, tuple) and len(data) > 0 and all(isinstance(item, _PLAIN) for item in data)


def _leaves(data: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        for key in data:
            yield from _leaves(data[key], f"{path}[{key!r}]")
    elif isinstance(data, (list, tuple)) and not _is_plain_list(data):
        for place, item in enumerate(data):
            yield from _leaves(item, f"{path}[{place}]")
    else:
        yield path, data


def rows_of(batch: Any) -> int | None:
    """How many rows a batch has: those of its tensors, else of its lists of plain values; None where it has neither.

    Raises:
        CannotCutError: when its tensors do not agree.
    """
    leaves = list(_leaves(batch))
    sizes = {path: len(leaf) for path, leaf in leaves if _has_rows(leaf)}
    if len(set(sizes.values())) > 1:
        raise CannotCutError(
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


def take(batch: Any, start: int, stop: int, rows: int | None = None) -> Any:
    """Rows `start` to `stop` of a batch, in its containers."""
    rows = rows_of(batch) if rows is None else rows
    if _has_rows(batch):
        return batch[start:stop]
    if _is_plain_list(batch):
        return batch[start:stop] if len(batch) == rows else batch
    if isinstance(batch, Mapping):
        return like_mapping(batch, {key: take(batch[key], start, stop, rows) for key in batch})
    if isinstance(batch, list) and len(batch) == rows and not any(_has_rows(leaf) for _, leaf in _leaves(batch)):
        return batch[start:stop]  # a list of samples, not of columns
    if isinstance(batch, (list, tuple)):
        return honor_type(batch, [take(item, start, stop, rows) for item in batch])
    return batch


def join(batches: Sequence[Any]) -> Any:
    """Batches of one structure, one below the other.

    Raises:
        CannotCutError: when structures, or shapes beyond dimension 0, differ.
    """
    return _join(batches, [Cutter().rows(batch) for batch in batches])


def _join(batches: Sequence[Any], rows: Sequence[int | None]) -> Any:
    first = batches[0]
    if any(type(batch) is not type(first) for batch in batches):
        raise CannotCutError(f"batches hold different things: {[type(batch).__name__ for batch in batches]}")
    if _has_rows(first):
        if any(batch.shape[1:] != first.shape[1:] for batch in batches):
            raise CannotCutError(f"batches have different shapes: {[tuple(batch.shape) for batch in batches]}")
        return torch.cat(list(batches)) if isinstance(first, torch.Tensor) else np.concatenate(list(batches))
    if isinstance(first, Mapping):
        if any(batch.keys() != first.keys() for batch in batches):
            raise CannotCutError(f"batches have different keys: {[list(batch) for batch in batches]}")
        return like_mapping(first, {key: _join([batch[key] for batch in batches], rows) for key in first})
    lists = isinstance(first, (list, tuple))
    if lists and all(_counts_rows(batch, count) for batch, count in zip(batches, rows, strict=True)):
        return type(first)(item for batch in batches for item in batch)
    if lists and not _is_plain_list(first):
        if any(len(batch) != len(first) for batch in batches):
            raise CannotCutError(f"batches have different lengths: {[len(batch) for batch in batches]}")
        return honor_type(first, [_join(items, rows) for items in zip(*batches, strict=True)])
    return first


def _counts_rows(data: Any, rows: int | None) -> bool:
    """Whether a list's items are rows: plain values, or whole samples."""
    if len(data) != rows:
        return False
    return _is_plain_list(data) or (type(data) is list and not any(_has_rows(leaf) for _, leaf in _leaves(data)))


def like_mapping(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the class of `batch` with other items."""
    return items if type(batch) is dict else type(batch)(items)  # type: ignore[call-arg]


class Cutter:
    """How a dispatcher cuts batches: along their rows, or as its user says.

    Args:
        slice_fn: Called as ``slice_fn(batch, slice, process_index=…, num_processes=…)``; None: `take`.
    """

    def __init__(self, slice_fn: SliceFn | None = None) -> None:
        self.slice_fn = slice_fn

    def rows(self, batch: Any) -> int | None:
        """How many rows a batch has; None where that cannot be told. With a `slice_fn`, the first tensor decides."""
        if self.slice_fn is not None and (found := ignorant_find_batch_size(batch)) is not None:
            return found
        try:
            return rows_of(batch)
        except CannotCutError:
            return None

    def take(self, batch: Any, start: int, stop: int, rows: int, rank: int = 0, ranks: int = 1) -> Any:
        """Rows `start` to `stop` of a batch that has `rows`, for one rank."""
        if self.slice_fn is None:
            return take(batch, start, stop, rows)
        return self.slice_fn(batch, slice(start, stop), process_index=rank, num_processes=ranks)

    def copy_rows(self, batches: Sequence[Any], count: int) -> list[Any]:
        """The first `count` rows of successive batches, in memory of their own; fewer where there are not so many."""
        kept: list[Any] = []
        for batch in batches:
            rows = self.rows(batch)
            if not rows or count <= 0:
                break
            kept.append(cloned(self.take(batch, 0, min(rows, count), rows)))
            count -= rows
        return kept

    def deal(
        self, batches: Sequence[Any], ranks: int, start: Sequence[Any], split: bool
    ) -> tuple[list[Any], int | None, Round | None]:
        """What was read for one step of all ranks, as one part a rank.

        As many equal batches as ranks are given out as they are. Otherwise all rows are joined and cut into parts of
        one size, rows from the start being repeated to make them even. Batches that cannot be joined, because their
        shapes differ, or whose rows cannot be told, are given out as they are, and repeated whole.

        Args:
            batches: One batch a rank, or fewer, or shorter ones, at the end of the data; with `split`, the one batch.
            ranks: How many parts.
            start: The first rows of the data, as a list of batches (see `copy_rows`).
            split: The batch has to be cut.

        Returns:
            The parts, the number of rows read (None if rows cannot be told), and the `Round` if it is no plain one.

        Raises:
            CannotCutError: when a batch is to be split and its rows cannot be told.
        """
        sizes = [self.rows(batch) for batch in batches]
        if not split and self.slice_fn is None and len(batches) == ranks and len(set(sizes)) == 1:
            return list(batches), None if sizes[0] is None else sizes[0] * ranks, None
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            if split:
                raise _without_rows(batches[0])
            parts = [batches[rank % len(batches)] for rank in range(ranks)]
            return parts, None, Round((1,) * ranks, len(batches), whole=True)
        rows = sum(known)
        share = -(-rows // ranks)
        try:
            full = self._filled(join(batches) if len(batches) > 1 else batches[0], rows, share * ranks, start)
        except CannotCutError:
            if self.slice_fn is not None or len(batches) == 1:
                raise
            held = [known[rank % len(known)] for rank in range(ranks)]
            return [batches[rank % len(batches)] for rank in range(ranks)], rows, describe(held, rows)
        bounds = [(rank * share, (rank + 1) * share) for rank in range(ranks)]
        parts = [self.take(full, *bounds[rank], share * ranks, rank, ranks) for rank in range(ranks)]
        return parts, rows, describe([share] * ranks, rows)

    def _filled(self, batch: Any, rows: int, wanted: int, start: Sequence[Any]) -> Any:
        if wanted == rows:
            return batch
        try:
            return join(self._pieces(batch, wanted - rows, start or [batch]))
        except CannotCutError:  # the start has other shapes than the end: repeat what is here
            return join(self._pieces(batch, wanted - rows, [batch]))

    def _pieces(self, batch: Any, missing: int, source: Sequence[Any]) -> list[Any]:
        pieces = [batch]
        for piece in cycle(source):
            rows = self.rows(piece)
            assert rows
            pieces.append(self.take(piece, 0, min(missing, rows), rows))
            missing -= rows
            if missing <= 0:
                return pieces
        raise AssertionError("unreachable: a cycle does not end")


def _without_rows(batch: Any) -> CannotCutError:
    try:
        rows_of(batch)
    except CannotCutError as error:  # its tensors disagree, which the message says
        return error
    return CannotCutError(
        f"a batch of type {type(batch).__name__} cannot be split into parts for the ranks: it holds no tensor with a "
        "dimension and no list. Have collate_fn make one, say how to cut with slice_fn_for_dispatch, or use "
        "split_batches=False."
    )


def cloned(data: Any) -> Any:
    """Returns a batch in memory of its own: tensors, arrays and containers are copied, other objects are not."""
    if isinstance(data, torch.Tensor):
        return data.clone()
    if isinstance(data, np.ndarray):
        return data.copy()
    if isinstance(data, Mapping):
        return like_mapping(data, {key: cloned(data[key]) for key in data})
    if isinstance(data, (list, tuple)):
        return honor_type(data, [cloned(item) for item in data])
    return data
