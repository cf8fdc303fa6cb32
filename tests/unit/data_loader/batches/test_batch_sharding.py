"""Sharding of index batches: all ranks at once, in one process."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from accelerate.data_loader.batches.batch_sharding import (
    ShardedStep,
    StepSizes,
    grouped,
    irregular_sizes,
    pad_cyclic,
    shard_batches,
    shard_items,
    split_evenly,
)
from accelerate.data_loader.sampling.samplers import BatchSamplerShard, SamplerShard

sizes = st.integers(0, 50)
ranks = st.integers(1, 4)


def _batches(n: int, batch_size: int, drop_last: bool = False) -> list[list[int]]:
    return list(BatchSampler(SequentialSampler(range(n)), batch_size, drop_last))


def _data(steps: list[ShardedStep]) -> list[int]:
    """What is data, by the rounds' own account."""
    found: list[int] = []
    for parts, step_sizes in steps:
        rows = [row for part in parts for row in part]
        found += rows if step_sizes is None else rows[: step_sizes.rows]
    return found


@given(
    n=sizes,
    ranks=ranks,
    rows_per_rank=st.integers(1, 4),
    drop_last=st.booleans(),
    split=st.booleans(),
    even=st.booleans(),
)
def test_every_sample_is_sharded_once_in_order(
    n: int, ranks: int, rows_per_rank: int, drop_last: bool, split: bool, even: bool
) -> None:
    batch_size = rows_per_rank * ranks if split else rows_per_rank
    batches = _batches(n, batch_size, drop_last)
    steps = list(shard_batches(batches, ranks, batch_size=batch_size, split=split, even=even, drop_last=drop_last))
    full = rows_per_rank * ranks
    expected = n - n % full if drop_last else n
    assert _data(steps) == list(range(expected))
    for number, (parts, step_sizes) in enumerate(steps):
        assert len(parts) == ranks
        last = number == len(steps) - 1
        if not last or n % full == 0 or drop_last:
            assert step_sizes is None or ranks == 1
            assert all(len(part) == rows_per_rank for part in parts) or ranks == 1
        elif even and ranks > 1:
            assert [len(part) for part in parts] == [rows_per_rank] * ranks
            assert step_sizes == StepSizes((rows_per_rank,) * ranks, n % full)
        elif ranks > 1:
            assert step_sizes is None or step_sizes.sizes == tuple(len(part) for part in parts)
            held = [bool(part) for part in parts]
            assert held == sorted(held, reverse=True), "ranks without a batch are the last ones"
            assert sum(map(len, parts)) == n % full


@given(n=st.integers(1, 50), ranks=st.integers(2, 4), rows_per_rank=st.integers(1, 4), split=st.booleans())
def test_the_last_step_is_padded_from_the_start(n: int, ranks: int, rows_per_rank: int, split: bool) -> None:
    batch_size = rows_per_rank * ranks if split else rows_per_rank
    steps = list(shard_batches(_batches(n, batch_size), ranks, batch_size=batch_size, split=split))
    rows = [row for parts, _ in steps for part in parts for row in part]
    first_round = list(range(min(n, rows_per_rank * ranks)))
    assert rows[n:] == (first_round * (len(rows) + 1))[: len(rows) - n]


@given(
    lengths=st.lists(st.integers(1, 4), max_size=12),
    ranks=st.integers(2, 4),
    even=st.booleans(),
    drop_last=st.booleans(),
    known=st.booleans(),
)
def test_batches_of_varying_size_are_not_split(
    lengths: list[int], ranks: int, even: bool, drop_last: bool, known: bool
) -> None:
    numbers = iter(range(1000))
    batches = [[next(numbers) for _ in range(length)] for length in lengths]
    batch_size = max(lengths, default=1) if known else None
    steps = list(shard_batches(batches, ranks, batch_size=batch_size, even=even, drop_last=drop_last))
    kept = len(batches) - len(batches) % ranks if drop_last else len(batches)
    assert _data(steps) == [row for batch in batches[:kept] for row in batch]
    if even:
        assert all(part for parts, _ in steps for part in parts), "every rank has a batch in every round"


@given(n=sizes, ranks=ranks, even=st.booleans(), drop_last=st.booleans())
def test_items_are_distributed_in_turn(n: int, ranks: int, even: bool, drop_last: bool) -> None:
    steps = list(shard_items(range(n), ranks, even=even, drop_last=drop_last))
    expected = n - n % ranks if drop_last else n
    assert _data(steps) == list(range(expected))
    assert all(step_sizes is None or step_sizes.counts_batches for _, step_sizes in steps)
    if even:
        assert all(len(part) == 1 for parts, _ in steps for part in parts)


@given(
    n=sizes,
    ranks=ranks,
    rows_per_rank=st.integers(1, 3),
    drop_last=st.booleans(),
    split=st.booleans(),
    even=st.booleans(),
)
def test_a_batch_sampler_shard_is_one_rank_of_the_step(
    n: int, ranks: int, rows_per_rank: int, drop_last: bool, split: bool, even: bool
) -> None:
    batch_size = rows_per_rank * ranks if split else rows_per_rank
    inner = BatchSampler(SequentialSampler(range(n)), batch_size, drop_last)
    steps = list(shard_batches(list(inner), ranks, batch_size=batch_size, split=split, even=even, drop_last=drop_last))
    for rank in range(ranks):
        shard = BatchSamplerShard(inner, ranks, rank, split_batches=split, even_batches=even)
        assert list(shard) == [parts[rank] for parts, _ in steps if parts[rank]]
        assert shard.total_length == len(inner)
        assert len(shard) == len(list(shard))
        assert [step_sizes for _, step_sizes in shard.with_step_sizes()] == [
            step_sizes for parts, step_sizes in steps if parts[rank]
        ]


@given(n=sizes, ranks=ranks, even=st.booleans())
def test_length_of_a_sampler_shard(n: int, ranks: int, even: bool) -> None:
    for rank in range(ranks):
        shard = SamplerShard(SequentialSampler(range(n)), ranks, rank, even_batches=even)
        assert len(shard) == len(list(shard))


@given(items=st.lists(st.integers()), size=st.integers(1, 5))
def test_the_last_group_is_marked(items: list[int], size: int) -> None:
    groups = list(grouped(items, size))
    assert [item for group, _ in groups for item in group] == items
    assert [last for _, last in groups] == [False] * (len(groups) - 1) + [True] * bool(groups)


def test_grouping_reads_one_item_ahead() -> None:
    drawn: list[int] = []

    def source() -> Any:
        for number in range(10):
            drawn.append(number)
            yield number

    next(grouped(source(), 3))
    assert drawn == [0, 1, 2, 3]


def test_step_sizes() -> None:
    assert irregular_sizes([2, 2], 4) is None
    uneven = irregular_sizes([2, 1, 0], 3)
    assert uneven is not None
    assert (uneven.active_ranks, uneven.ragged, uneven.padded) == (2, True, False)
    padded = irregular_sizes([2, 2], 3)
    assert padded is not None
    assert (padded.active_ranks, padded.ragged, padded.padded) == (2, False, True)


def test_padding_and_splitting() -> None:
    assert pad_cyclic([9], [0, 1], 4) == [9, 0, 1, 0]
    assert pad_cyclic([1, 2, 3], [0], 2) == [1, 2, 3]
    assert split_evenly([1, 2, 3, 4], 2) == [[1, 2], [3, 4]]


def test_a_batch_larger_than_batch_size_is_rejected() -> None:
    with pytest.raises(ValueError, match="batch_size=2 but returned a batch of 3"):
        list(shard_batches([[1, 2, 3]], 2, batch_size=2, split=True))
