"""All ranks of a prepared loader in one process: each rank's loop is run by itself, and what they would gather is put
together step by step from the `Round`s they saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from accelerate.data_loader import DataPlan, Round, plan_data
from accelerate.runtime.world import DataRanks
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
    round: Round | None


def plans(loader: DataLoader[Any], ranks: int, **settings: Any) -> list[DataPlan]:
    """The plan of each rank."""
    config = DataLoaderConfiguration(**settings)
    return [plan_data(loader, config, DataRanks(rank, ranks), rng_types=None) for rank in range(ranks)]


def loop(loader: Any) -> list[Seen]:
    """One rank's loop."""
    return [Seen(batch.tolist(), loader.end_of_dataloader, loader.remainder, loader.round) for batch in loader]


def gathered(by_rank: list[list[Seen]]) -> list[Any]:
    """What rank 0 gathers at each step, one step after the other."""
    result: list[Any] = []
    for step, first in enumerate(by_rank[0]):
        held = [seen[step] for seen in by_rank if len(seen) > step]
        assert all(seen.round == first.round for seen in held), "all ranks see the same round"
        if first.round is None:
            assert len(held) == len(by_rank), "a plain step is one of all ranks"
            assert len({len(seen.rows) for seen in held}) == 1, "and as large on each"
            result += [row for seen in held for row in seen.rows]
            continue
        assert first.round.holders == len(held)
        assert not first.round.padded or first.round.ragged or len({len(seen.rows) for seen in held}) == 1
        if first.round.whole:
            held = held[: first.round.rows]
            result += [row for seen in held for row in seen.rows]
        else:
            assert first.round.sizes[: len(held)] == tuple(len(seen.rows) for seen in held)
            result += [row for seen in held for row in seen.rows][: first.round.rows]
    return result
