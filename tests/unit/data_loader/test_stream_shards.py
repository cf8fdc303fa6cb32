"""Which iterable datasets ranks read by shards of their own, and what a rank gets of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from accelerate.data_loader import ReadMode, plan_data
from accelerate.data_loader.iterable import PaddingMarker, StreamShard
from accelerate.data_loader.stream_shards import has_shards, supports_lockstep
from accelerate.runtime.world import DataShard
from accelerate.settings.handlers import DataLoaderConfiguration
from accelerate.state import PartialState


class Shards(IterableDataset):
    """Numbers in shards."""

    def __init__(self, *shards: list[int]) -> None:
        self.shards = shards
        self.epoch = 0

    @property
    def n_shards(self) -> int:
        return len(self.shards)

    def shard(self, num_shards: int, index: int) -> Shards:
        return Shards(*self.shards[index::num_shards])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for shard in self.shards:
            yield from shard


class Sized(Shards):
    def __len__(self) -> int:
        return sum(map(len, self.shards))


def reading(
    dataset: Any, ranks: int = 2, lockstep: bool = True, batch_size: int | None = 2, **settings: Any
) -> ReadMode:
    drop_last = settings.pop("drop_last", False)
    loader: Any = DataLoader(dataset, batch_size=batch_size, drop_last=drop_last)
    config = DataLoaderConfiguration(**{"dispatch_batches": False, **settings})
    return plan_data(loader, config, DataShard(0, ranks), lockstep=lockstep).read_mode


def test_own_shards() -> None:
    stream = Shards([1], [2], [3])
    assert reading(stream) is reading(stream, 3) is ReadMode.OWN_SHARDS
    assert reading(stream, split_batches=True) is ReadMode.OWN_SHARDS
    assert reading(stream, 1) is ReadMode.WHOLE
    assert reading(stream, dispatch_batches=None) is ReadMode.DISPATCH
    assert reading(stream, 4) is ReadMode.SHARD, "fewer shards than ranks"
    assert reading(stream, lockstep=False) is ReadMode.SHARD
    assert reading(stream, even_batches=False) is ReadMode.SHARD
    assert reading(stream, drop_last=True) is ReadMode.SHARD
    assert reading(stream, batch_size=None) is ReadMode.SHARD
    assert reading(Sized([1], [2], [3])) is ReadMode.SHARD, "its length is that of the present way"


def test_has_shards() -> None:
    assert has_shards(Shards([], []), 2)
    assert not has_shards(object(), 1)
    counted = Shards([], [])
    counted.shard = None  # type: ignore[method-assign, assignment]
    assert not has_shards(counted, 2)
    counted.shard = lambda number: counted  # type: ignore[method-assign, assignment]
    assert not has_shards(counted, 2), "a method of that name with other arguments"


def test_a_single_process_has_no_lockstep() -> None:
    PartialState(cpu=True)
    assert not supports_lockstep(DataShard(0, 1))
    assert not supports_lockstep(DataShard(0, 2))


@pytest.mark.parametrize(("numbers", "rows"), [([1, 2, 3, 4, 5], 2), ([1], 1), ([1, 2, 3], None), ([], None)])
def test_the_last_batch_is_padded_from_the_start(numbers: list[int], rows: int | None) -> None:
    samples = list(StreamShard(Shards(numbers, [9]), 3, DataShard(0, 2)))
    marks = [sample for sample in samples if isinstance(sample, PaddingMarker)]
    assert [mark.step_sizes.rows for mark in marks] == ([] if rows is None else [rows])
    plain = [sample.sample if isinstance(sample, PaddingMarker) else sample for sample in samples]
    assert plain[: len(numbers)] == numbers
    assert plain[len(numbers) :] == (numbers * 3)[: -len(numbers) % 3]


def test_the_epoch_is_set_on_dataset_and_shard() -> None:
    whole = Shards([1], [2])
    shard = StreamShard(whole, 1, DataShard(1, 2))
    shard.set_epoch(4)
    assert shard.epoch == whole.epoch == shard.shard.epoch == 4
