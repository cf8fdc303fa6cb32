"""What is decided for a loader, before anything is built."""

from __future__ import annotations

import sys
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
    RandomSampler,
    SequentialSampler,
)

from accelerate.data_loader import (
    DataLoaderDispatcher,
    DataLoaderShard,
    DataPlan,
    DatasetKind,
    ReadMode,
    Shuffle,
    build_loader,
    data_ranks_of_mesh,
    plan_data,
    prepare_data_loader,
)
from accelerate.runtime.world import DataShard
from accelerate.settings.enums import RNGType
from accelerate.settings.handlers import DataLoaderConfiguration


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def plan(loader: Any, ranks: int = 2, put_on_device: bool = True, **settings: Any) -> DataPlan:
    return plan_data(loader, DataLoaderConfiguration(**settings), DataShard(0, ranks), put_on_device=put_on_device)


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
def test_who_reads(dataset: Any, ranks: int, put_on_device: bool, dispatch: bool | None, read_mode: ReadMode) -> None:
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
def test_what_is_read_from(loader: Any, dataset_kind: DatasetKind, size: int | None) -> None:
    made = plan(loader)
    assert (made.dataset_kind, made.batch_size) == (dataset_kind, size)
    assert made.total_batch_size == (None if size is None else 2 * size)


def test_where_the_order_comes_from() -> None:
    shuffled = DataLoader(range(8), shuffle=True)
    assert plan(shuffled, ranks=1).shuffle is Shuffle.UNCHANGED
    assert plan(shuffled, ranks=2).shuffle is Shuffle.GENERATOR
    assert plan(shuffled, ranks=2, dispatch_batches=True).shuffle is Shuffle.UNCHANGED
    assert plan(shuffled, ranks=1, use_stateful_dataloader=True).shuffle is Shuffle.GENERATOR
    assert plan(shuffled, ranks=1, use_seedable_sampler=True).shuffle is Shuffle.SEEDABLE
    assert plan(DataLoader(range(8)), use_seedable_sampler=True).shuffle is Shuffle.UNCHANGED
    assert plan(DataLoader(range(8), shuffle=True, generator=torch.Generator())).shuffle is Shuffle.UNCHANGED


def test_split_batches_has_the_loaders_batch_for_all() -> None:
    made = plan(DataLoader(range(8), batch_size=4), split_batches=True)
    assert (made.batch_size, made.total_batch_size) == (2, 4)
    assert plan(DataLoader(range(8), batch_size=3), ranks=1, split_batches=True).batch_size == 3


def test_a_batch_sampler_of_the_users_is_kept() -> None:
    class Own(BatchSampler):
        pass

    sampler = RandomSampler(range(8))
    batches = Own(sampler, 2, False)
    loader = build_loader(plan(DataLoader(range(8), batch_sampler=batches), use_seedable_sampler=True, data_seed=0))
    assert loader.batch_sampler.batch_sampler is batches  # type: ignore[union-attr]
    assert type(batches.sampler).__name__ == "SeedableRandomSampler"
    drawing = Own(RandomSampler(range(8)), 2, False)
    build_loader(plan(DataLoader(range(8), batch_sampler=drawing)))
    assert type(drawing.sampler) is RandomSampler


def test_a_custom_sampler_is_kept() -> None:
    class Own(RandomSampler):
        pass

    sampler = Own(range(8))
    made = plan(DataLoader(range(8), sampler=sampler))
    loader = build_loader(made)
    assert loader.sampler is sampler
    assert loader.synchronized_generator is sampler.generator is not None  # type: ignore[attr-defined]


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
def test_what_does_not_go_together(loader: Any, settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        plan(loader, **settings)


def test_ranks_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="process_index=2 is out of range for num_processes=2"):
        prepare_data_loader(DataLoader(range(4)), num_processes=2, process_index=2)


def test_torchdata_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torchdata")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchdata", None)
    with pytest.raises(ImportError, match=r"accelerate\[stateful\]"):
        DataLoaderShard(range(4), use_stateful_dataloader=True)


class Mesh:
    """What is asked of a `DeviceMesh`; the real one is in tests/processes."""

    def __init__(self, names: tuple[str, ...] | None, shape: tuple[int, ...], place: list[int] | None) -> None:
        self.mesh_dim_names = names
        self.shape = shape
        self.place = place

    def get_coordinate(self) -> list[int] | None:
        return self.place

    def size(self, dimension: int | None = None) -> int:
        if dimension is not None:
            return self.shape[dimension]
        total = 1
        for size in self.shape:
            total *= size
        return total

    def get_group(self, name: str) -> str:
        return f"group of {name}"


@pytest.mark.parametrize(
    ("names", "shape", "place", "expected"),
    [
        (("dp_replicate", "dp_shard"), (2, 3), [1, 2], (5, 6, None)),
        (("dp_shard", "tp"), (2, 4), [1, 3], (1, 2, "group of dp_shard")),
        (("dp_replicate", "tp"), (2, 4), [1, 3], (1, 2, "group of dp_replicate")),
        (("tp",), (4,), [2], (0, 1, None)),
    ],
)
def test_the_mesh_says_who_reads_what(names: Any, shape: Any, place: Any, expected: tuple[int, int, Any]) -> None:
    ranks = data_ranks_of_mesh(Mesh(names, shape, place))
    assert (ranks.index, ranks.count, ranks.group) == expected


def test_a_mesh_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="its dimensions have no names"):
        data_ranks_of_mesh(Mesh(None, (2,), [0]))
    with pytest.raises(ValueError, match="this process is not part of it"):
        data_ranks_of_mesh(Mesh(("dp_shard",), (2,), None))


def test_sequential_order_is_kept() -> None:
    made = build_loader(plan(DataLoader(range(8), batch_size=2), ranks=1))
    assert type(made.sampler) is SequentialSampler


def test_what_the_user_should_know_is_in_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    divided = DataLoader(range(8), sampler=DistributedSampler(range(8), num_replicas=2, rank=0))
    (warning,) = plan(divided).warnings
    assert "shards that shard once more" in warning
    assert plan(divided, ranks=1).warnings == ()
    (warning,) = plan(DataLoader(range(8), num_workers=2, in_order=False)).warnings
    assert "in_order=False" in warning
    build_loader(plan(divided))
    assert "DistributedSampler" in caplog.text


def test_the_class_is_chosen_by_name() -> None:
    with pytest.raises(TypeError, match="as a keyword argument"):
        DataLoaderShard(range(4), None, None, None, 0, True)


def test_a_class_of_ones_own_has_no_stateful_version() -> None:
    pytest.importorskip("torchdata")

    class Own(DataLoaderShard):
        pass

    with pytest.raises(TypeError, match="Own has none: derive from one of StatefulDataLoaderShard"):
        Own(range(4), use_stateful_dataloader=True)


def test_drop_last_of_a_batch_sampler_of_the_users_own() -> None:
    for drop_last in (False, True):
        batches = BatchSampler(SequentialSampler(range(7)), 2, drop_last=drop_last)
        loader = DataLoader(range(7), batch_sampler=batches)  # type: ignore[arg-type]
        assert plan(loader).drop_last is drop_last
        rank_1 = build_loader(plan_data(loader, DataLoaderConfiguration(), DataShard(1, 2)), "cpu")
        assert [batch.tolist() for batch in rank_1] == ([[2, 3]] if drop_last else [[2, 3], [6, 0]])


def test_what_a_plan_takes_over() -> None:
    loader = DataLoader(range(8), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    settings = {"even_batches": False, "data_seed": 7, "non_blocking": True, "use_seedable_sampler": True}
    found = plan_data(loader, DataLoaderConfiguration(**settings), DataShard(0, 2), rng_types=["torch"], slice_fn=print)
    assert (found.even_batches, found.data_seed, found.non_blocking) == (False, 7, True)
    assert (found.rng_types, found.slice_fn) == ((RNGType.TORCH,), print)
    built = build_loader(found, "cpu")
    assert built._non_blocking and built.rng_types == [RNGType.TORCH]  # type: ignore[attr-defined]


def test_arguments_of_torchs_loader_stay() -> None:
    def initialize(worker: int) -> None: ...

    options: dict[str, Any] = {
        "num_workers": 1,
        "persistent_workers": True,
        "prefetch_factor": 5,
        "timeout": 60,
        "worker_init_fn": initialize,
        "multiprocessing_context": "spawn",
        "collate_fn": list,
        "generator": torch.Generator(),
    }
    built = build_loader(plan(DataLoader(range(8), batch_size=2, **options)), "cpu")  # type: ignore[arg-type]
    context = options.pop("multiprocessing_context")
    assert built.multiprocessing_context.get_start_method() == context
    assert {name: getattr(built, name) for name in options} == options
