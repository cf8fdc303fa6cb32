"""Loaders from a later batch on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from accelerate.data_loader import SkipBatchSampler, SkipDataLoader, prepare_data_loader, skip_first_batches
from accelerate.state import GradientState


class Watched(list):
    def __init__(self, n: int) -> None:
        super().__init__(range(n))
        self.fetched: list[int] = []

    def __getitem__(self, index: Any) -> int:
        self.fetched.append(index)
        return index


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def rows(loader: Any) -> list[Any]:
    return [batch.tolist() for batch in loader]


def test_skipped_samples_are_not_fetched() -> None:
    dataset = Watched(12)
    loader = prepare_data_loader(DataLoader(dataset, batch_size=2), num_processes=2, process_index=1)
    later = skip_first_batches(loader, 1)
    assert type(later) is type(loader)
    assert rows(later) == [[6, 7], [10, 11]]
    assert dataset.fetched == [6, 7, 10, 11]
    assert len(later) == 2
    assert rows(loader) == [[2, 3], [6, 7], [10, 11]], "the original is whole"
    assert later.total_batch_size == 4


def test_plain_loaders_too() -> None:
    dataset = Watched(7)
    plain = DataLoader(dataset, batch_size=2, shuffle=False)
    later = skip_first_batches(plain, 2)
    assert (type(later), len(later)) == (DataLoader, 2)
    assert rows(later) == [[4, 5], [6]]
    assert dataset.fetched == [4, 5, 6]
    single = skip_first_batches(DataLoader(list(range(4)), batch_size=None, collate_fn=torch.tensor), 3)
    assert rows(single) == [3]


def test_skipping_twice_adds_up() -> None:
    plain = DataLoader(list(range(8)), batch_size=2)
    for loader in (plain, prepare_data_loader(plain), prepare_data_loader(DataLoader(Stream(), batch_size=2))):
        assert rows(skip_first_batches(skip_first_batches(loader, 1), 2))[0] == [6, 7]


@pytest.mark.parametrize("arguments", [{}, {"dispatch_batches": True, "put_on_device": True}])
@pytest.mark.parametrize("drop_last", [False, True])
def test_skipped_batches_of_iterable_datasets_are_read(arguments: dict[str, Any], drop_last: bool) -> None:
    by_rank = []
    for rank in range(2):
        loader = prepare_data_loader(
            DataLoader(Stream(), batch_size=2, drop_last=drop_last), num_processes=2, process_index=rank, **arguments
        )
        later = skip_first_batches(loader, 1)
        seen = [(batch.tolist(), later.end_of_dataloader) for batch in later]
        by_rank.append(seen)
        assert len(rows(loader)) == len(seen) + 1
    assert [seen[0] for seen in by_rank] == [([4, 5], drop_last), ([6, 7], drop_last)]


def test_a_dispatcher_skips_steps_without_fetching() -> None:
    dataset = Watched(12)
    loader = prepare_data_loader(
        DataLoader(dataset, batch_size=2), num_processes=2, process_index=0, dispatch_batches=True, put_on_device=True
    )
    later = skip_first_batches(loader, 2)
    assert (len(later), rows(later)) == (1, [[8, 9]])
    assert dataset.fetched == [8, 9, 10, 11]


def test_skipping_more_than_all_batches() -> None:
    for dataset in (list(range(4)), Stream()):
        loader = prepare_data_loader(DataLoader(dataset, batch_size=2))
        assert rows(skip_first_batches(loader, 99)) == []
        assert not GradientState().in_dataloader


def test_the_original_continues_with_the_next_epoch() -> None:
    plain = DataLoader(list(range(8)), batch_size=2, shuffle=True)
    loader = prepare_data_loader(plain, use_seedable_sampler=True, data_seed=0)
    epochs = [rows(loader) for _ in range(3)]
    resumed = prepare_data_loader(plain, use_seedable_sampler=True, data_seed=0)
    resumed.set_epoch(1)
    assert rows(skip_first_batches(resumed, 2)) == epochs[1][2:]
    assert resumed.iteration == 2
    assert rows(resumed) == epochs[2]


def test_the_last_batch_is_still_identified() -> None:
    loader = prepare_data_loader(DataLoader(list(range(9)), batch_size=2), num_processes=2, process_index=0)
    later = skip_first_batches(loader, 1)
    assert [(later.end_of_dataloader, later.remainder) for _ in later] == [(False, 1), (True, 1)]
    raw = SkipDataLoader(Stream(), batch_size=4, skip_batches=1)
    assert [raw.end_of_dataloader for _ in raw] == [False, True]
    by_hand = SkipDataLoader(list(range(6)), batch_size=2, skip_batches=1)
    assert (len(by_hand), rows(by_hand)) == (2, [[2, 3], [4, 5]])


def test_skip_batch_sampler() -> None:
    batches = [[0, 1], [2, 3], [4]]
    later = SkipBatchSampler(batches, 2)
    assert (list(later), len(later), later.total_length) == ([[4]], 1, 3)
    assert len(SkipBatchSampler(batches, 5)) == 0


def test_bad_input() -> None:
    plain = DataLoader(list(range(4)))
    with pytest.raises(ValueError, match="cannot be negative; got -1"):
        skip_first_batches(plain, -1)
    with pytest.raises(TypeError, match=r"an integer; got 1\.5"):
        skip_first_batches(plain, 1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got list"):
        skip_first_batches([1, 2], 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Prepare the full loader"):
        prepare_data_loader(skip_first_batches(DataLoader(Stream()), 1))
