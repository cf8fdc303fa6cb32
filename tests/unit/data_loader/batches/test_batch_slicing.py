"""Cutting and joining batches for the dispatcher."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate.data_loader.batches.batch_sharding import StepSizes
from accelerate.data_loader.batches.batch_slicing import (
    BatchSlicer,
    BatchSlicingError,
    batch_length,
    concat_batches,
    slice_batch,
)

Pair = namedtuple("Pair", ["left", "right"])


def _batch(start: int, stop: int) -> dict[str, Any]:
    """Rows `start` to `stop` of some data, of every kind that a batch may hold."""
    numbers = torch.arange(start, stop)
    return {
        "ids": numbers[:, None].expand(-1, 3),
        "label": numbers.numpy(),
        "text": [f"row {row}" for row in range(start, stop)],
        "nested": [Pair(numbers.float(), [numbers]), (numbers.bool(),)],
        "temperature": 0.5,
        "scale": torch.tensor(2.0),
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


@given(rows=st.integers(1, 9), data=st.data())
def test_a_slice_has_the_rows_of_all_columns(rows: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    batch = _batch(0, rows)
    assert batch_length(batch) == rows
    assert _same(slice_batch(batch, start, stop), _batch(start, stop))


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_concatenated_batches_have_all_rows(sizes: list[int]) -> None:
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    batches = [_batch(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
    assert _same(concat_batches(batches), _batch(0, bounds[-1]))


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    ranks=st.integers(1, 4),
    first=st.integers(1, 6),
    split=st.booleans(),
)
def test_a_step_is_sharded_to_the_last_row(sizes: list[int], ranks: int, first: int, split: bool) -> None:
    sizes = sizes[:1] if split else sizes[:ranks]
    bounds = [100]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    batches = [torch.arange(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
    slicer = BatchSlicer()
    start = slicer.clone_rows([torch.arange(first)], ranks)
    parts, rows, step_sizes = slicer.shard(batches, ranks, start, split)
    assert rows == sum(sizes)
    assert len(parts) == ranks
    given = [row for part in parts for row in part.tolist()]
    kept = given if step_sizes is None else given[: step_sizes.rows]
    assert kept == list(range(100, bounds[-1]))
    assert given[len(kept) :] == (list(range(min(first, ranks))) * ranks)[: len(given) - len(kept)]


def test_rows_to_repeat_are_copies() -> None:
    batch = {"x": torch.zeros(3, 2), "y": [1, 2, 3]}
    kept = BatchSlicer().clone_rows([batch, batch], 5)
    assert [batch_length(part) for part in kept] == [3, 2]
    batch["x"].fill_(7)
    assert all(part["x"].eq(0).all() for part in kept)


def test_full_batches_are_not_sliced() -> None:
    batches = [{"x": torch.ones(2, 5)}, {"x": torch.ones(2, 9)}]  # padded to the longest of each
    parts, rows, step_sizes = BatchSlicer().shard(batches, 2, [], split=False)
    assert parts == batches
    assert (rows, step_sizes) == (4, None)


def test_batches_that_cannot_be_concatenated_are_repeated() -> None:
    batches = [torch.ones(2, 5), torch.ones(1, 9)]
    parts, rows, step_sizes = BatchSlicer().shard(batches, 3, [], split=False)
    assert [tuple(part.shape) for part in parts] == [(2, 5), (1, 9), (2, 5)]
    assert rows == 3
    assert step_sizes == StepSizes((2, 1, 2), 3)


def test_padding_comes_from_the_batch_if_shapes_differ_at_the_start() -> None:
    parts, rows, step_sizes = BatchSlicer().shard([torch.ones(1, 9)], 2, [torch.ones(2, 5)], split=False)
    assert [tuple(part.shape) for part in parts] == [(1, 9), (1, 9)]
    assert (rows, step_sizes) == (1, StepSizes((1, 1), 1))


def test_batches_without_rows_are_not_sliced() -> None:
    parts, rows, step_sizes = BatchSlicer().shard([{"a": 1}, {"a": 2}], 2, [], split=False)
    assert (parts, rows, step_sizes) == ([{"a": 1}, {"a": 2}], None, None)
    parts, rows, step_sizes = BatchSlicer().shard([{"a": 1}], 2, [], split=False)
    assert (parts, rows, step_sizes) == ([{"a": 1}, {"a": 1}], None, StepSizes((1, 1), 1, counts_batches=True))


def test_lists_of_samples_are_sliced_by_sample() -> None:
    samples = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}, {"prompt": "c", "answer": 3}]
    parts, rows, step_sizes = BatchSlicer().shard([samples[:2], samples[2:]], 3, [], split=False)
    assert parts == [samples[:1], samples[1:2], samples[2:]]
    assert (rows, step_sizes) == (3, None)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (
            {"x": torch.ones(4), "weights": torch.ones(3)},
            r"batch\['x'\]': 4, \"batch\['weights'\]\": 3|different numbers",
        ),
        ({"a": 1}, "type dict cannot be split"),
    ],
)
def test_batches_that_cannot_be_split_are_rejected(batch: Any, found: str) -> None:
    with pytest.raises(BatchSlicingError, match=found):
        BatchSlicer().shard([batch], 2, [], split=True)


def test_slice_fn() -> None:
    calls = []

    def by_columns(batch: Any, bounds: slice, process_index: int, num_processes: int) -> Any:
        calls.append((bounds, process_index, num_processes))
        return {"x": batch["x"][bounds], "weights": batch["weights"]}

    batch = {"x": torch.arange(4), "weights": torch.ones(3)}
    parts, rows, step_sizes = BatchSlicer(by_columns).shard([batch], 2, [], split=True)
    assert [part["x"].tolist() for part in parts] == [[0, 1], [2, 3]]
    assert all(len(part["weights"]) == 3 for part in parts)
    assert calls == [(slice(0, 2), 0, 2), (slice(2, 4), 1, 2)]
    assert (rows, step_sizes) == (4, None)
