"""The loop over a prepared loader: its signals, what it reads ahead, epochs, and what is kept of the original."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
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
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from accelerate.data_loader import (
    DataLoaderShard,
    SeedableRandomSampler,
    get_sampler,
    override_even_batches,
    prepare_data_loader,
    skip_first_batches,
)
from accelerate.state import GradientState


class Watched:
    """A dataset that notes what is fetched."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(index)
        self.fetched.append(index)
        return index


class Stream(IterableDataset):
    def __init__(self, n: int, fails_at: int | None = None) -> None:
        self.n = n
        self.fails_at = fails_at
        self.read: list[int] = []

    def __iter__(self) -> Iterator[int]:
        for number in range(self.n):
            if number == self.fails_at:
                raise ValueError(f"sample {number} is broken")
            self.read.append(number)
            yield number


def rows(loader: Any) -> list[Any]:
    return [batch.tolist() for batch in loader]


# Reading ahead ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_map_style_dataset_is_not_read_ahead(ranks: int) -> None:
    dataset = Watched(12)
    loader = prepare_data_loader(DataLoader(dataset, batch_size=2), num_processes=ranks, process_index=0)
    ends = []
    for number, _ in enumerate(loader, 1):
        assert len(dataset.fetched) == 2 * number
        ends.append(loader.end_of_dataloader)
    assert ends == [False] * (len(loader) - 1) + [True]


def test_a_stream_is_read_one_batch_ahead() -> None:
    dataset = Stream(7)
    loader = prepare_data_loader(DataLoader(dataset, batch_size=2))
    read, ends = [], []
    for _ in loader:
        read.append(len(dataset.read))
        ends.append(loader.end_of_dataloader)
    assert read == [4, 6, 7, 7]
    assert ends == [False, False, False, True]


class Misleading(BatchSampler):
    """A batch sampler whose length is wrong, as estimates are."""

    def __len__(self) -> int:
        return 100


def test_the_last_batch_is_identified_with_a_wrong_length() -> None:
    sampler = Misleading(SequentialSampler(range(6)), 2, False)
    loader = prepare_data_loader(DataLoader(list(range(6)), batch_sampler=sampler))
    assert [loader.end_of_dataloader for _ in loader] == [False, False, True]


def test_a_broken_sample_of_a_stream_belongs_to_its_own_batch() -> None:
    loader = prepare_data_loader(DataLoader(Stream(9, fails_at=5), batch_size=2))
    seen = []
    with pytest.raises(ValueError, match="sample 5 is broken"):
        for batch in loader:
            seen.append((batch.tolist(), loader.end_of_dataloader))
    assert seen == [([0, 1], False), ([2, 3], False)]
    assert not GradientState().in_dataloader


# GradientState ------------------------------------------------------------------------------------------------------


def test_loops_inside_loops() -> None:
    outer = prepare_data_loader(DataLoader(list(range(4)), batch_size=2))
    inner = prepare_data_loader(DataLoader(list(range(3)), batch_size=1))
    state = GradientState()
    assert not state.in_dataloader
    ends = []
    for _ in outer:
        assert state.active_dataloader is outer
        for _ in inner:
            assert state.active_dataloader is inner
        assert state.active_dataloader is outer
        ends.append(state.end_of_dataloader)
    assert ends == [False, True]
    assert not state.in_dataloader
    assert state.end_of_dataloader is False
    assert state.remainder == -1


def test_leaving_a_loop_unregisters_the_loader() -> None:
    state = GradientState()
    loader = prepare_data_loader(DataLoader(list(range(4)), batch_size=2))
    for _ in loader:
        break
    assert not state.in_dataloader
    with pytest.raises(KeyError):
        for _ in loader:
            raise KeyError
    assert not state.in_dataloader
    assert loader.iteration == 0, "only what was gone through to the end counts as an epoch"


def test_dropping_an_iterator_unregisters_the_loader() -> None:
    state = GradientState()
    loader = prepare_data_loader(DataLoader(list(range(4)), batch_size=2))
    batches = iter(loader)
    next(batches)
    assert state.active_dataloader is loader
    del batches
    gc.collect()
    assert not state.in_dataloader


def test_an_error_of_the_dataset_unregisters_the_loader() -> None:
    class Broken(Watched):
        def __getitem__(self, index: int) -> int:
            raise OSError("disk on fire")

    loader = prepare_data_loader(DataLoader(Broken(4)))
    with pytest.raises(OSError, match="disk on fire"):
        list(loader)
    assert not GradientState().in_dataloader


def test_the_state_does_not_keep_a_loader_alive() -> None:
    loader = prepare_data_loader(DataLoader(list(range(4))))
    next(iter(loader))
    del loader
    gc.collect()
    assert GradientState().active_dataloader is None


# Epochs and orders --------------------------------------------------------------------------------------------------


class EpochSampler(SequentialSampler):
    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.epoch = 0
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.told.append(epoch)


@pytest.mark.parametrize("ranks", [1, 2])
def test_samplers_get_the_epoch(ranks: int) -> None:
    sampler = EpochSampler(range(8))
    loader = prepare_data_loader(
        DataLoader(list(range(8)), batch_size=2, sampler=sampler), num_processes=ranks, process_index=0
    )
    list(loader)
    list(loader)
    assert sampler.told == [0, 1]
    loader.set_epoch(7)
    assert (sampler.epoch, loader.iteration) == (7, 7)
    list(loader)
    assert (sampler.told, loader.iteration) == ([0, 1, 7, 7], 8)


class MadeByEpoch(SequentialSampler):
    """A sampler that makes its state when it is given the epoch, and has none before."""

    def set_epoch(self, epoch: int) -> None:
        self.order = [(index + epoch) % 8 for index in range(8)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


class BatchesByEpoch(BatchSampler):
    def set_epoch(self, epoch: int) -> None:
        self.batches = [[(index + epoch) % 8, (index + epoch + 1) % 8] for index in range(0, 8, 2)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class StreamByEpoch(Stream):
    def set_epoch(self, epoch: int) -> None:
        self.order = [(index + epoch) % 8 for index in range(8)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


class RowsByEpoch(list):
    def set_epoch(self, epoch: int) -> None:
        self.offset = epoch

    def __getitem__(self, index: Any) -> int:
        return (index + self.offset) % 8


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(list(range(8)), batch_size=2, sampler=MadeByEpoch(range(8))),
        lambda: DataLoader(list(range(8)), batch_sampler=BatchesByEpoch(SequentialSampler(range(8)), 2, False)),
        lambda: DataLoader(StreamByEpoch(8), batch_size=2),
        lambda: DataLoader(RowsByEpoch(range(8)), batch_size=2),
        lambda: DataLoader(StreamByEpoch(8), batch_size=2, num_workers=1),
    ],
    ids=["sampler", "batch sampler", "stream", "dataset", "stream in a worker"],
)
@pytest.mark.parametrize("options", [{}, {"dispatch_batches": True}, {"use_stateful_dataloader": True}], ids=str)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_state_derived_from_the_epoch_exists_from_the_first_epoch(make: Any, options: Any) -> None:
    def orders(loader: Any, epochs: int) -> list[Any]:
        return [[row for batch in rows(loader) for row in batch] for _ in range(epochs)]

    def expected(epoch: int) -> list[int]:
        return [(index + epoch) % 8 for index in range(8)]

    def prepared() -> Any:
        return prepare_data_loader(make(), put_on_device=True, **options)

    assert orders(prepared(), 3) == [expected(epoch) for epoch in range(3)]
    assert orders(skip_first_batches(prepared(), 1), 1) == [expected(0)[2:]]
    loader = prepared()
    loader.set_epoch(5)
    assert orders(loader, 2) == [expected(5), expected(6)]
    loader = prepared()
    loader.set_epoch(5)
    assert orders(skip_first_batches(loader, 1), 1) == [expected(5)[2:]]
    assert orders(loader, 1) == [expected(6)]


def test_a_sampler_that_was_used_before_starts_anew() -> None:
    sampler = DistributedSampler(range(8), num_replicas=1, rank=0, shuffle=True)
    sampler.set_epoch(4)
    loader = prepare_data_loader(DataLoader(list(range(8)), sampler=sampler))
    list(loader)
    assert sampler.epoch == 0


def test_an_epoch_set_by_the_user_is_kept_when_batches_are_skipped() -> None:
    sampler = DistributedSampler(range(8), num_replicas=1, rank=0, shuffle=True)
    loader = prepare_data_loader(DataLoader(list(range(8)), sampler=sampler))
    sampler.set_epoch(5)
    list(skip_first_batches(loader, 1))
    assert sampler.epoch == 5
    loader = prepare_data_loader(DataLoader(list(range(8)), sampler=sampler))
    loader.iteration = 3
    list(skip_first_batches(loader, 1))
    assert sampler.epoch == 3
    list(loader)
    assert sampler.epoch == 4, "what the later start set is not taken for the user's"


def test_batch_samplers_and_datasets_get_the_epoch() -> None:
    class Batches(BatchSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    class Dataset(Watched):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    batches, dataset = Batches(SequentialSampler(range(8)), 2, False), Dataset(8)
    loader = prepare_data_loader(DataLoader(dataset, batch_sampler=batches), num_processes=2, process_index=1)
    loader.set_epoch(3)
    assert (batches.epoch, dataset.epoch) == (3, 3)
    assert loader.batch_sampler.batch_sampler is batches, "custom batch samplers are kept"
    loader.batch_sampler.set_epoch(5)
    assert batches.epoch == 5


def test_iterable_datasets_get_the_epoch_through_their_shard() -> None:
    class Epochs(Stream):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    dataset = Epochs(8)
    loader = prepare_data_loader(DataLoader(dataset, batch_size=2), num_processes=2, process_index=0)
    list(loader)
    list(loader)
    assert dataset.epoch == 1
    loader.set_epoch(4)
    assert dataset.epoch == 4
    dataset.set_epoch(9)
    list(loader)
    assert dataset.epoch == 9, "the user's word counts"


def test_an_epoch_set_by_the_user_is_kept() -> None:
    sampler = DistributedSampler(range(8), num_replicas=1, rank=0, shuffle=True)
    loader = prepare_data_loader(DataLoader(list(range(8)), sampler=sampler))
    for epoch in (5, 6):  # a run that was resumed, in the manner of plain DDP scripts
        sampler.set_epoch(epoch)
        seen = rows(loader)
        assert sampler.epoch == epoch
        assert seen == [[index] for index in sampler]


def test_a_shuffled_loader_yields_the_batches_of_the_plain_one() -> None:
    plain = DataLoader(list(range(20)), batch_size=3, shuffle=True)
    torch.manual_seed(5)
    expected = [rows(plain) for _ in range(2)]
    torch.manual_seed(5)
    loader = prepare_data_loader(plain)
    assert [rows(loader) for _ in range(2)] == expected
    for stateful in (False, True):
        by_rank = []
        for rank in range(2):
            shard = prepare_data_loader(plain, num_processes=2, process_index=rank, use_stateful_dataloader=stateful)
            torch.manual_seed(5)
            by_rank.append([rows(shard) for _ in range(2)])
        for epoch in range(2):
            dealt = [batch for step in zip(by_rank[0][epoch], by_rank[1][epoch], strict=True) for batch in step]
            assert dealt[: len(expected[epoch]) - 1] == expected[epoch][:-1]


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(range(11)),
        RandomSampler(range(11), generator=torch.Generator().manual_seed(3)),
        SubsetRandomSampler(range(11)),
    ],
)
def test_a_drawing_sampler_of_one_seed_divides_the_data(sampler: Any) -> None:
    plain = DataLoader(list(range(11)), batch_size=2, sampler=sampler)
    before = sampler.generator
    seen: list[int] = []
    for rank in range(3):
        if before is not None:
            before.manual_seed(3)
        loader = prepare_data_loader(plain, num_processes=3, process_index=rank, even_batches=False)
        torch.manual_seed(8)
        seen += [row for batch in rows(loader) for row in batch]
    assert sorted(seen) == list(range(11))
    assert sampler.generator is before, "the user's sampler is left alone"


def test_a_weighted_sampler_is_given_a_generator_too() -> None:
    sampler = WeightedRandomSampler([1.0, 2.0, 3.0], 6)
    loader = prepare_data_loader(DataLoader([0, 1, 2], sampler=sampler), num_processes=2, process_index=0)
    assert isinstance(loader.synchronized_generator, torch.Generator)
    assert sampler.generator is None


def test_the_seedable_order_is_one_of_seed_and_epoch() -> None:
    sampler = SeedableRandomSampler(range(10), data_seed=1)
    first, second = list(sampler), list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    one = prepare_data_loader(DataLoader(range(10), shuffle=True), use_seedable_sampler=True, data_seed=1)
    for _ in one:
        break
    assert [row for batch in rows(one) for row in batch] == first, "an interrupted epoch is not counted"
    assert [row for batch in rows(one) for row in batch] == second


def test_a_sampler_can_be_replaced() -> None:
    loader = prepare_data_loader(DataLoader(range(6), batch_size=2), num_processes=2, process_index=0)
    list(loader)
    sampler = SequentialSampler(range(3))
    loader.set_sampler(sampler)
    assert loader.get_sampler() is get_sampler(loader) is loader.sampler is sampler
    assert rows(loader) == [[0, 1]]
    seedable = SeedableRandomSampler(range(6), data_seed=0)
    seedable.set_epoch(4)
    loader.set_sampler(seedable)
    assert loader.iteration == 4
    with pytest.raises(ValueError, match="comes from a Stream"):
        prepare_data_loader(DataLoader(Stream(3))).set_sampler(sampler)


# What is kept -------------------------------------------------------------------------------------------------------


def _seed_worker(worker: int) -> None:
    del worker


def _listed(samples: list[int]) -> list[int]:
    return samples


def test_the_loaders_arguments_are_kept() -> None:
    plain = DataLoader(
        range(8),
        batch_size=3,
        drop_last=True,
        num_workers=1,
        collate_fn=_listed,
        timeout=7,
        worker_init_fn=_seed_worker,
        multiprocessing_context="spawn",
        generator=torch.Generator(),
        prefetch_factor=3,
        persistent_workers=True,
    )
    for ranks in (1, 2):
        loader = prepare_data_loader(plain, num_processes=ranks, process_index=0)
        assert isinstance(loader, DataLoader)
        for name in [
            "dataset",
            "batch_size",
            "drop_last",
            "num_workers",
            "collate_fn",
            "timeout",
            "worker_init_fn",
            "generator",
            "prefetch_factor",
            "persistent_workers",
            "pin_memory",
            "sampler",
            "multiprocessing_context",
        ]:
            assert getattr(loader, name) == getattr(plain, name), name


def test_the_original_loader_stays_usable() -> None:
    plain = DataLoader(range(6), batch_size=2)
    for rank in range(2):
        rows(prepare_data_loader(plain, num_processes=2, process_index=rank))
    assert rows(plain) == [[0, 1], [2, 3], [4, 5]]


def test_a_prepared_loader_is_returned_unchanged() -> None:
    plain = DataLoader(range(8), batch_size=2)
    loader = prepare_data_loader(plain, num_processes=2, process_index=0)
    assert prepare_data_loader(loader) is loader
    assert prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=True) is loader
    by_hand = DataLoaderShard(range(3))
    assert prepare_data_loader(by_hand, num_processes=4) is by_hand
    with pytest.raises(ValueError, match=r"num_processes=4 \(it has 2\)"):
        prepare_data_loader(loader, num_processes=4)
    with pytest.raises(ValueError, match="with other arguments than dispatch_batches=True"):
        prepare_data_loader(loader, dispatch_batches=True)


def test_sizes() -> None:
    plain = DataLoader(range(9), batch_size=4)
    whole = prepare_data_loader(plain)
    assert (whole.total_batch_size, whole.total_dataset_length, len(whole)) == (4, 9, 3)
    dealt = prepare_data_loader(plain, num_processes=2, process_index=0)
    assert (dealt.total_batch_size, dealt.total_dataset_length, len(dealt)) == (8, 9, 2)
    cut = prepare_data_loader(plain, num_processes=2, process_index=0, split_batches=True)
    assert (cut.total_batch_size, cut.total_dataset_length, len(cut)) == (4, 9, 3)
    stream = prepare_data_loader(DataLoader(Stream(9), batch_size=4), num_processes=2, process_index=0)
    assert stream.total_batch_size == 8
    by_hand = DataLoaderShard(range(9), batch_sampler=cut.batch_sampler)
    assert (by_hand.total_batch_size, by_hand.total_dataset_length) == (4, 9)
    with pytest.raises(TypeError):
        len(stream)


def test_batches_go_to_the_device() -> None:
    loader = prepare_data_loader(DataLoader(range(4), batch_size=2), device="meta", put_on_device=True)
    assert [batch.device.type for batch in loader] == ["meta", "meta"]
    stays = prepare_data_loader(DataLoader(range(4), batch_size=2), device="meta")
    assert [batch.device.type for batch in stays] == ["cpu", "cpu"]


def test_a_prepared_loader_can_be_copied_and_pickled() -> None:
    loader = prepare_data_loader(DataLoader(list(range(9)), batch_size=2), num_processes=2, process_index=1)
    expected = rows(loader)
    assert rows(pickle.loads(pickle.dumps(loader))) == expected
    assert rows(copy.deepcopy(loader)) == expected
    assert rows(copy.copy(loader)) == expected


# Worker processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes(persistent: bool) -> None:
    loader = prepare_data_loader(
        DataLoader(list(range(11)), batch_size=2, num_workers=2, persistent_workers=persistent),
        num_processes=2,
        process_index=1,
    )
    for _ in range(2):
        seen = [(batch.tolist(), loader.end_of_dataloader, loader.step_sizes is None) for batch in loader]
        assert seen == [([2, 3], False, True), ([6, 7], False, True), ([10, 0], True, False)]
    for _ in loader:
        break
    assert rows(loader) == [[2, 3], [6, 7], [10, 0]]


class ShardedStream(Stream):
    """Each worker reads its own half."""

    def __iter__(self) -> Iterator[int]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        return iter(range(worker.id * 10, worker.id * 10 + self.n))


def test_each_workers_stream_ends_for_itself() -> None:
    # Two workers with five samples each, two ranks with batches of two: each worker's second round holds one sample.
    gathered: list[int] = []
    steps = []
    for rank in range(2):
        loader = prepare_data_loader(
            DataLoader(ShardedStream(5), batch_size=2, num_workers=2), num_processes=2, process_index=rank
        )
        steps.append([(batch.tolist(), loader.step_sizes) for batch in loader])
    for (first, step_sizes), (second, other) in zip(*steps, strict=True):
        assert step_sizes == other
        gathered += [*first, *second][: None if step_sizes is None else step_sizes.rows]
    assert sorted(gathered) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


def test_uneven_streams_of_several_workers_are_made_even(caplog: pytest.LogCaptureFixture) -> None:
    loader = prepare_data_loader(
        DataLoader(ShardedStream(5), batch_size=2, num_workers=2), num_processes=2, process_index=1, even_batches=False
    )
    assert loader.dataset.even_batches
    assert "even_batches=False is not possible" in caplog.text


# In a block ---------------------------------------------------------------------------------------------------------


def test_even_batches_can_be_overridden() -> None:
    loader = prepare_data_loader(DataLoader(range(5)), num_processes=2, process_index=1)
    stream = prepare_data_loader(DataLoader(Stream(5)), num_processes=2, process_index=1)
    with override_even_batches([loader, stream], False):
        assert rows(loader) == rows(stream) == [[1], [3]]
    assert rows(loader) == rows(stream) == [[1], [3], [0]]
    with override_even_batches([loader], None):
        assert rows(loader) == [[1], [3], [0]]


def test_a_batch_of_none_is_rejected() -> None:
    def nothing(samples: list[int]) -> None:
        return None

    loader = prepare_data_loader(DataLoader(range(4), batch_size=2, collate_fn=nothing), put_on_device=True)
    with pytest.raises(ValueError, match="None instead of a batch: its collate_fn"):
        list(loader)
    assert not GradientState().in_dataloader
