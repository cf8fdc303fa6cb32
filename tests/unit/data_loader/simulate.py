"""Simulates all ranks of a prepared loader in one process.

Each rank's loop runs by itself, and their batches are gathered step by step according to the `StepSizes` they saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from accelerate.data_loader import DataPlan, StepSizes, plan_data
from accelerate.runtime.world import DataShard
from accelerate.settings.handlers import DataLoaderConfiguration


class Numbers(IterableDataset):
    """The numbers below `n`, of unknown length."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


@dataclass
class Seen:
    """What one rank saw at one step."""

    rows: list[Any]
    end: bool
    remainder: int
    step_sizes: StepSizes | None


def plan(loader: Any, ranks: int = 2, put_on_device: bool = True, **settings: Any) -> DataPlan:
    """The plan of rank 0."""
    return plan_data(loader, DataLoaderConfiguration(**settings), DataShard(0, ranks), put_on_device=put_on_device)


def plans(loader: DataLoader[Any], ranks: int, **settings: Any) -> list[DataPlan]:
    """The plan of each rank."""
    config = DataLoaderConfiguration(**settings)
    return [plan_data(loader, config, DataShard(rank, ranks), rng_types=None) for rank in range(ranks)]


def loop(loader: Any) -> list[Seen]:
    """One rank's loop."""
    return [Seen(batch.tolist(), loader.end_of_dataloader, loader.remainder, loader.step_sizes) for batch in loader]


def gathered(by_rank: list[list[Seen]]) -> list[Any]:
    """What rank 0 gathers at each step, one step after the other."""
    result: list[Any] = []
    for step, first in enumerate(by_rank[0]):
        held = [seen[step] for seen in by_rank if len(seen) > step]
        assert all(seen.step_sizes == first.step_sizes for seen in held), "all ranks see the same round"
        if first.step_sizes is None:
            assert len(held) == len(by_rank), "a plain step is one of all ranks"
            assert len({len(seen.rows) for seen in held}) == 1, "and as large on each"
            result += [row for seen in held for row in seen.rows]
            continue
        assert first.step_sizes.active_ranks == len(held)
        assert not first.step_sizes.padded or first.step_sizes.ragged or len({len(seen.rows) for seen in held}) == 1
        if first.step_sizes.counts_batches:
            held = held[: first.step_sizes.rows]
            result += [row for seen in held for row in seen.rows]
        else:
            assert first.step_sizes.sizes[: len(held)] == tuple(len(seen.rows) for seen in held)
            result += [row for seen in held for row in seen.rows][: first.step_sizes.rows]
    return result
