"""Random orders on several ranks: however the ranks were seeded, they agree on who has what."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from accelerate.data_loader import gather_for_metrics, prepare_data_loader
from accelerate.state import GradientState, PartialState

N = 13


class Shuffled(IterableDataset):
    """A stream with a generator of its own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(N, generator=self.generator).tolist())


class Own(BatchSampler):
    """A batch sampler of the user's with a generator of its own, as the documentation asks for."""

    def __init__(self, seed: int) -> None:
        super().__init__(range(N), 2, False)
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(N, generator=self.generator).tolist()
        return iter([order[start : start + 2] for start in range(0, N, 2)])


class Careless(BatchSampler):
    """One that draws from torch's own state."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(N).tolist()
        return iter([order[start : start + 2] for start in range(0, N, 2)])


def _orders() -> dict[str, Any]:
    rank = PartialState().process_index
    torch.manual_seed(rank)
    random.seed(rank)
    data = list(range(N))
    loaders = {
        "shuffle": (DataLoader(data, 2, shuffle=True), {}),
        "generator": (DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(rank)), {}),
        "subset": (DataLoader(data, 2, sampler=SubsetRandomSampler(range(N))), {}),
        "several workers": (DataLoader(data, 2, sampler=RandomSampler(data), num_workers=2), {}),
        "batch sampler": (DataLoader(data, batch_sampler=Own(rank)), {}),
        "seedable": (DataLoader(data, 2, shuffle=True), {"use_seedable_sampler": True}),
        "stateful": (DataLoader(data, 2, shuffle=True), {"use_stateful_dataloader": True}),
        "stream": (DataLoader(Shuffled(rank), 2), {"dispatch_batches": False}),
        "torch's state": (DataLoader(data, batch_sampler=Careless(range(N), 2, False)), {"rng_types": ["torch"]}),
    }
    results: dict[str, Any] = {"seed": torch.initial_seed()}
    for name, (plain, options) in loaders.items():
        options = {"rng_types": ["generator"], "even_batches": False, **options}
        loader = prepare_data_loader(plain, put_on_device=True, **options)
        results[name] = [[row for batch in loader for row in batch.tolist()] for _ in range(2)]
    return results


def test_every_order_is_one_of_all_ranks(run_ranks: Any) -> None:
    by_rank = run_ranks(3, _orders)
    assert len({results.pop("seed") for results in by_rank}) == 3, "the ranks were seeded differently"
    for name in by_rank[0]:
        epochs = [[row for results in by_rank for row in results[name][epoch]] for epoch in range(2)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(N))] * 2, name
        assert epochs[0] != epochs[1], name


def _equal_to_plain() -> list[Any]:
    plain = DataLoader(list(range(12)), batch_size=2, shuffle=True)
    torch.manual_seed(7)
    expected = [row for batch in plain for row in batch.tolist()]
    torch.manual_seed(7 + PartialState().process_index)  # rank 0's counts
    loader = prepare_data_loader(plain, put_on_device=True, rng_types=["generator"])
    return [expected, [batch.tolist() for batch in loader]]


def test_the_order_is_the_one_of_a_plain_loader_on_rank_0(run_ranks: Any) -> None:
    by_rank = run_ranks(2, _equal_to_plain)
    dealt = [row for step in zip(by_rank[0][1], by_rank[1][1], strict=True) for batch in step for row in batch]
    assert dealt == by_rank[0][0]


class MadeByEpoch(SequentialSampler):
    """A sampler that makes its state when it is given the epoch, and has none before."""

    def set_epoch(self, epoch: int) -> None:
        self.order = [(index + epoch) % 8 for index in range(8)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


def _by_epoch(dispatch: bool) -> list[list[int]]:
    state = GradientState()
    plain = DataLoader(list(range(8)), batch_size=2, sampler=MadeByEpoch(range(8)))
    loader = prepare_data_loader(plain, put_on_device=True, dispatch_batches=dispatch)
    return [[row for batch in loader for row in gather_for_metrics(batch, state).tolist()] for _ in range(3)]


@pytest.mark.parametrize("dispatch", [False, True])
def test_samplers_are_given_every_epoch(run_ranks: Any, dispatch: bool) -> None:
    expected = [[(index + epoch) % 8 for index in range(8)] for epoch in range(3)]
    assert run_ranks(2, _by_epoch, dispatch) == [expected] * 2
