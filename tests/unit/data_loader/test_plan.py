"""Plans of loaders, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
)

from accelerate.data_loader import (
    DataLoaderDispatcher,
    DataLoaderShard,
    DatasetKind,
    ReadMode,
    Shuffle,
    build_loader,
    plan_data,
    prepare_data_loader,
)
from accelerate.runtime.world import DataShard
from accelerate.settings.enums import RNGType
from accelerate.settings.handlers import DataLoaderConfiguration
from tests.unit.data_loader.simulate import plan


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def test_a_plan_is_a_value() -> None:
    loader = DataLoader(range(8), batch_size=2)
    one, other = plan(loader), plan(loader)
    assert one == other
    assert plan(loader, even_batches=False) != one
    assert plan(loader, ranks=3) != one
    assert "read_mode=<ReadMode.SHARD: 'shard'>" in repr(one)
    with pytest.raises(FrozenInstanceError):
        one.batch_size = 3  # type: ignore[misc]


def test_planning_changes_and_draws_nothing() -> None:
    class Untouchable:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> int:
            raise AssertionError("fetched")

    loader = DataLoader(Untouchable(), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    plan(loader, use_seedable_sampler=True)
    plan(loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert loader.sampler.generator is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("dataset", "ranks", "put_on_device", "dispatch", "read_mode"),
    [
        ([1, 2], 1, True, None, ReadMode.WHOLE),
        ([1, 2], 2, True, None, ReadMode.SHARD),
        ([1, 2], 2, True, True, ReadMode.DISPATCH),
        ([1, 2], 1, True, True, ReadMode.DISPATCH),
        (Stream(), 1, True, None, ReadMode.WHOLE),
        (Stream(), 2, True, None, ReadMode.DISPATCH),
        (Stream(), 2, False, None, ReadMode.SHARD),
        (Stream(), 2, True, False, ReadMode.SHARD),
    ],
)
def test_read_mode(dataset: Any, ranks: int, put_on_device: bool, dispatch: bool | None, read_mode: ReadMode) -> None:
    made = plan(DataLoader(dataset), ranks, put_on_device, dispatch_batches=dispatch)
    assert made.read_mode is read_mode
    assert type(build_loader(made)) is (DataLoaderDispatcher if read_mode is ReadMode.DISPATCH else DataLoaderShard)


@pytest.mark.parametrize(
    ("loader", "dataset_kind", "size"),
    [
        (DataLoader(range(8), batch_size=4), DatasetKind.MAP_BATCHED, 4),
        (DataLoader(range(8), batch_sampler=[[1, 2], [3]]), DatasetKind.MAP_BATCHED, None),
        (DataLoader(range(8), sampler=BatchSampler(range(8), 3, False), batch_size=None), DatasetKind.MAP_BATCHED, 3),
        (DataLoader(range(8), batch_size=None), DatasetKind.MAP_UNBATCHED, None),
        (DataLoader(Stream(), batch_size=5), DatasetKind.ITERABLE, 5),
        (DataLoader(Stream(), batch_size=None), DatasetKind.ITERABLE, None),
    ],
)
def test_dataset_kind(loader: Any, dataset_kind: DatasetKind, size: int | None) -> None:
    made = plan(loader)
    assert (made.dataset_kind, made.batch_size) == (dataset_kind, size)
    assert made.total_batch_size == (None if size is None else 2 * size)


def test_shuffle() -> None:
    shuffled = DataLoader(range(8), shuffle=True)
    assert plan(shuffled, ranks=1).shuffle is Shuffle.UNCHANGED
    assert plan(shuffled, ranks=2).shuffle is Shuffle.GENERATOR
    assert plan(shuffled, ranks=2, dispatch_batches=True).shuffle is Shuffle.UNCHANGED
    assert plan(shuffled, ranks=1, use_stateful_dataloader=True).shuffle is Shuffle.GENERATOR
    assert plan(shuffled, ranks=1, use_seedable_sampler=True).shuffle is Shuffle.SEEDABLE
    assert plan(DataLoader(range(8)), use_seedable_sampler=True).shuffle is Shuffle.UNCHANGED
    assert plan(DataLoader(range(8), shuffle=True, generator=torch.Generator())).shuffle is Shuffle.UNCHANGED


def test_split_batches_divides_the_batch_size() -> None:
    made = plan(DataLoader(range(8), batch_size=4), split_batches=True)
    assert (made.batch_size, made.total_batch_size) == (2, 4)
    assert plan(DataLoader(range(8), batch_size=3), ranks=1, split_batches=True).batch_size == 3


@pytest.mark.parametrize(
    ("loader", "settings", "error", "match"),
    [
        ([1, 2], {}, TypeError, "DataLoader to prepare, got list"),
        (DataLoader(range(8), batch_size=3), {"split_batches": True}, ValueError, "batch_size=3 and there are 2"),
        (
            DataLoader(range(8), batch_size=None),
            {"split_batches": True},
            ValueError,
            "needs a loader with a batch_size",
        ),
        (
            DataLoader(Stream(), batch_size=None),
            {"split_batches": True},
            ValueError,
            "needs a loader with a batch_size",
        ),
        (
            DataLoader(range(8), batch_sampler=[[1], [2]]),
            {"split_batches": True},
            ValueError,
            "a batch sampler without that attribute",
        ),
        (
            DataLoader(range(8), batch_size=3),
            {"split_batches": True, "dispatch_batches": True},
            ValueError,
            "2 processes",
        ),
        (
            DataLoader(range(8)),
            {"dispatch_batches": True, "put_on_device": False},
            ValueError,
            "put_on_device=True is needed",
        ),
    ],
)
def test_incompatible_settings_are_rejected(
    loader: Any, settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        plan(loader, **settings)


def test_a_rank_out_of_range_is_rejected() -> None:
    with pytest.raises(ValueError, match="process_index=2 is out of range for num_processes=2"):
        prepare_data_loader(DataLoader(range(4)), num_processes=2, process_index=2)


def test_warnings_are_part_of_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    divided = DataLoader(range(8), sampler=DistributedSampler(range(8), num_replicas=2, rank=0))
    (warning,) = plan(divided).warnings
    assert "shards that shard once more" in warning
    assert plan(divided, ranks=1).warnings == ()
    (warning,) = plan(DataLoader(range(8), num_workers=2, in_order=False)).warnings
    assert "in_order=False" in warning
    build_loader(plan(divided))
    assert "DistributedSampler" in caplog.text


def test_drop_last_of_a_custom_batch_sampler() -> None:
    for drop_last in (False, True):
        batches = BatchSampler(SequentialSampler(range(7)), 2, drop_last=drop_last)
        loader = DataLoader(range(7), batch_sampler=batches)  # type: ignore[arg-type]
        assert plan(loader).drop_last is drop_last
        rank_1 = build_loader(plan_data(loader, DataLoaderConfiguration(), DataShard(1, 2)), "cpu")
        assert [batch.tolist() for batch in rank_1] == ([[2, 3]] if drop_last else [[2, 3], [6, 0]])


def test_settings_are_part_of_the_plan() -> None:
    loader = DataLoader(range(8), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    settings = {"even_batches": False, "data_seed": 7, "non_blocking": True, "use_seedable_sampler": True}
    found = plan_data(loader, DataLoaderConfiguration(**settings), DataShard(0, 2), rng_types=["torch"], slice_fn=print)
    assert (found.even_batches, found.data_seed, found.non_blocking) == (False, 7, True)
    assert (found.rng_types, found.slice_fn) == ((RNGType.TORCH,), print)
    built = build_loader(found, "cpu")
    assert built._non_blocking and built.rng_types == [RNGType.TORCH]  # type: ignore[attr-defined]
