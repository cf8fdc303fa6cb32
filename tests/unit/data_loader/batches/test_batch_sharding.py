"""Dealing batches to ranks: all ranks at once, over sizes, in one process."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from accelerate.data_loader.batches.batch_sharding import (
    Deal,
    Round,
    chunks,
    deal_batches,
    deal_items,
    describe,
    fill,
    grouped,
)
from accelerate.data_loader.sampling.samplers import BatchSamplerShard, SamplerShard

sizes = st.integers(0, 50)
ranks = st.integers(1, 4)


def _batches(n: int, batch_size: int, drop_last: bool = False) -> list[list[int]]:
    return list(BatchSampler(SequentialSampler(range(n)), batch_size, drop_last))


def _data(deals: list[Deal]) -> list[int]:
    """What is data, by the rounds' own account."""
    found: list[int] = []
    for parts, round in deals:
        rows = [row for part in parts for row in part]
        found += rows if round is None else rows[: round.rows]
    return found


@given(n=sizes, ranks=ranks, share=st.integers(1, 4), drop_last=st.booleans(), split=st.booleans(), even=st.booleans())
def test_every_sample_is_dealt_once_in_order(
    n: int, ranks: int, share: int, drop_last: bool, split: bool, even: bool
) -> None:
    batch_size = share * ranks if split else share
    batches = _batches(n, batch_size, drop_last)
    deals = list(deal_batches(batches, ranks, batch_size=batch_size, split=split, even=even, drop_last=drop_last))
    full = share * ranks
    expected = n - n % full if drop_last else n
    assert _data(deals) == list(range(expected))
    for number, (parts, round) in enumerate(deals):
        assert len(parts) == ranks
        last = number == len(deals) - 1
        if not last or n % full == 0 or drop_last:
            assert round is None or ranks == 1
            assert all(len(part) == share for part in parts) or ranks == 1
        elif even and ranks > 1:
            assert [len(part) for part in parts] == [share] * ranks
            assert round == Round((share,) * ranks, n % full)
        elif ranks > 1:
            assert round is None or round.sizes == tuple(len(part) for part in parts)
            held = [bool(part) for part in parts]
            assert held == sorted(held, reverse=True), "ranks without a batch are the last ones"
            assert sum(map(len, parts)) == n % full


@given(n=st.integers(1, 50), ranks=st.integers(2, 4), share=st.integers(1, 4), split=st.booleans())
def test_what_completes_the_last_round_comes_from_the_start(n: int, ranks: int, share: int, split: bool) -> None:
    batch_size = share * ranks if split else share
    deals = list(deal_batches(_batches(n, batch_size), ranks, batch_size=batch_size, split=split))
    rows = [row for parts, _ in deals for part in parts for row in part]
    first_round = list(range(min(n, share * ranks)))
    assert rows[n:] == (first_round * (len(rows) + 1))[: len(rows) - n]


@given(
    lengths=st.lists(st.integers(1, 4), max_size=12),
    ranks=st.integers(2, 4),
    even=st.booleans(),
    drop_last=st.booleans(),
    known=st.booleans(),
)
def test_batches_of_any_size_are_dealt_whole(
    lengths: list[int], ranks: int, even: bool, drop_last: bool, known: bool
) -> None:
    numbers = iter(range(1000))
    batches = [[next(numbers) for _ in range(length)] for length in lengths]
    batch_size = max(lengths, default=1) if known else None
    deals = list(deal_batches(batches, ranks, batch_size=batch_size, even=even, drop_last=drop_last))
    kept = len(batches) - len(batches) % ranks if drop_last else len(batches)
    assert _data(deals) == [row for batch in batches[:kept] for row in batch]
    if even:
        assert all(part for parts, _ in deals for part in parts), "every rank has a batch in every round"


@given(n=sizes, ranks=ranks, even=st.booleans(), drop_last=st.booleans())
def test_items_are_dealt_in_turn(n: int, ranks: int, even: bool, drop_last: bool) -> None:
    deals = list(deal_items(range(n), ranks, even=even, drop_last=drop_last))
    expected = n - n % ranks if drop_last else n
    assert _data(deals) == list(range(expected))
    assert all(round is None or round.whole for _, round in deals)
    if even:
        assert all(len(part) == 1 for parts, _ in deals for part in parts)


@given(n=sizes, ranks=ranks, share=st.integers(1, 3), drop_last=st.booleans(), split=st.booleans(), even=st.booleans())
def test_a_shard_is_its_rank_of_the_deal(
    n: int, ranks: int, share: int, drop_last: bool, split: bool, even: bool
) -> None:
    batch_size = share * ranks if split else share
    inner = BatchSampler(SequentialSampler(range(n)), batch_size, drop_last)
    deals = list(deal_batches(list(inner), ranks, batch_size=batch_size, split=split, even=even, drop_last=drop_last))
    for rank in range(ranks):
        shard = BatchSamplerShard(inner, ranks, rank, split_batches=split, even_batches=even)
        assert list(shard) == [parts[rank] for parts, _ in deals if parts[rank]]
        assert shard.total_length == len(inner)
        assert len(shard) == len(list(shard))
        assert [round for _, round in shard.rounds()] == [round for parts, round in deals if parts[rank]]


@given(n=sizes, ranks=ranks, even=st.booleans())
def test_a_sampler_shard_knows_its_length(n: int, ranks: int, even: bool) -> None:
    for rank in range(ranks):
        shard = SamplerShard(SequentialSampler(range(n)), ranks, rank, even_batches=even)
        assert len(shard) == len(list(shard))


@given(items=st.lists(st.integers()), size=st.integers(1, 5))
def test_groups_say_which_is_the_last(items: list[int], size: int) -> None:
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


def test_a_round_tells_who_has_what() -> None:
    assert describe([2, 2], 4) is None
    uneven = describe([2, 1, 0], 3)
    assert uneven is not None
    assert (uneven.holders, uneven.ragged, uneven.padded) == (2, True, False)
    padded = describe([2, 2], 3)
    assert padded is not None
    assert (padded.holders, padded.ragged, padded.padded) == (2, False, True)


def test_filling_and_cutting() -> None:
    assert fill([9], [0, 1], 4) == [9, 0, 1, 0]
    assert fill([1, 2, 3], [0], 2) == [1, 2, 3]
    assert chunks([1, 2, 3, 4], 2) == [[1, 2], [3, 4]]


def test_a_batch_larger_than_announced_is_refused_where_samples_would_be_lost() -> None:
    with pytest.raises(ValueError, match="batch_size=2 but gave a batch of 3"):
        list(deal_batches([[1, 2, 3]], 2, batch_size=2, split=True))
