"""The length of every sampler, shard and loader is the number of items it yields, for all options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from accelerate.data_loader import (
    BatchSamplerShard,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    build_loader,
    skip_first_batches,
)
from accelerate.data_loader.sampling.samplers import SamplerShard
from tests.unit.data_loader.simulate import plans


class Sized(IterableDataset):
    """A stream that has a length."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


def agrees(sized: Any) -> None:
    wanted = len(sized)
    assert sum(1 for _ in sized) == wanted


everything: Any = {
    "n": st.integers(0, 50),
    "ranks": st.integers(1, 4),
    "rows_per_rank": st.integers(1, 5),
    "drop_last": st.booleans(),
    "split": st.booleans(),
    "even": st.booleans(),
    "skip": st.integers(0, 4),
}


@given(**everything)
def test_samplers(n: int, ranks: int, rows_per_rank: int, drop_last: bool, split: bool, even: bool, skip: int) -> None:
    agrees(SeedableRandomSampler(range(n)) if n else SequentialSampler(range(n)))
    for rank in range(ranks):
        batches = BatchSampler(
            SequentialSampler(range(n)), rows_per_rank * ranks if split else rows_per_rank, drop_last
        )
        shard = BatchSamplerShard(batches, ranks, rank, split_batches=split, even_batches=even)
        for sampler in (shard, SamplerShard(range(n), ranks, rank, even), SamplerShard(batches, ranks, rank, even)):
            agrees(sampler)
            agrees(SkipBatchSampler(sampler, skip))


@given(
    lengths=st.lists(st.integers(1, 4), max_size=12),
    ranks=st.integers(1, 4),
    even=st.booleans(),
    drop_last=st.booleans(),
    size=st.sampled_from([None, 2, 4]),
)
def test_shards_of_varying_batches(
    lengths: list[int], ranks: int, even: bool, drop_last: bool, size: int | None
) -> None:
    class Batches(list):
        pass

    batches = Batches([[0] * length for length in lengths])
    batches.batch_size, batches.drop_last = size, drop_last
    for rank in range(ranks):
        agrees(BatchSamplerShard(batches, ranks, rank, even_batches=even))


@given(**everything)
def test_iterable_shards(
    n: int, ranks: int, rows_per_rank: int, drop_last: bool, split: bool, even: bool, skip: int
) -> None:
    for rank in range(ranks):
        shard = IterableDatasetShard(
            Sized(n),
            rows_per_rank * ranks if split else rows_per_rank,
            drop_last,
            ranks,
            rank,
            split,
            even_batches=even,
        )
        agrees(shard)


@pytest.mark.parametrize("kind", ["map", "stream", "items", "shuffled"])
@given(**everything, dispatch=st.booleans())
def test_loaders(
    kind: str,
    n: int,
    ranks: int,
    rows_per_rank: int,
    drop_last: bool,
    split: bool,
    even: bool,
    skip: int,
    dispatch: bool,
) -> None:
    dataset: Any = Sized(n) if kind == "stream" else list(range(n))
    size: int | None = rows_per_rank * ranks if split else rows_per_rank
    if kind == "items":
        size, drop_last, split = None, False, False
    shuffle = kind == "shuffled" and n > 0
    plain: DataLoader[Any] = DataLoader(dataset, batch_size=size, drop_last=drop_last, shuffle=shuffle)
    settings = {"split_batches": split, "even_batches": even, "dispatch_batches": dispatch}
    for plan in plans(plain, ranks, **settings):
        loader = build_loader(plan)
        agrees(loader)
        agrees(loader)
        agrees(skip_first_batches(loader, skip))
    agrees(skip_first_batches(plain, skip))
