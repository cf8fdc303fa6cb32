"""Positions saved and resumed, on torchdata's StatefulDataLoader."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

pytest.importorskip("torchdata.stateful_dataloader")

from torchdata.stateful_dataloader import StatefulDataLoader

from accelerate.data_loader import (
    DataLoaderDispatcher,
    DataLoaderShard,
    prepare_data_loader,
    skip_first_batches,
)

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


class Stream(IterableDataset):
    """A stream that has to be read again from the start."""

    def __init__(self, n: int = 23) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


class Remembering(Stream):
    """A stream that knows its place."""

    def __init__(self, n: int = 23) -> None:
        super().__init__(n)
        self.place = 0
        self.resumed = False

    def __iter__(self) -> Iterator[int]:
        start, self.resumed = (self.place if self.resumed else 0), False
        for number in range(start, self.n):
            self.place = number + 1
            yield number
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]
        self.resumed = True


def make(dataset: Any, ranks: int = 1, rank: int = 0, **options: Any) -> Any:
    loader_options = {name: options.pop(name) for name in ("shuffle", "num_workers", "drop_last") if name in options}
    loader = DataLoader(dataset, batch_size=3, **loader_options)
    return prepare_data_loader(
        loader,
        num_processes=ranks,
        process_index=rank,
        put_on_device=True,
        use_stateful_dataloader=True,
        rng_types=["generator"],
        **options,
    )


def rows(loader: Any) -> list[Any]:
    return [batch.tolist() for batch in loader]


def _seen(loader: Any, batch: Any) -> tuple[Any, ...]:
    # What completes the last batch of a stream comes from the first batch that was read: after resuming that is
    # another.
    given = batch.tolist() if loader.step_sizes is None else len(batch)
    return given, loader.end_of_dataloader, loader.remainder, loader.step_sizes


CASES = [
    ("map", {}),
    ("map", {"shuffle": True}),
    ("map", {"shuffle": True, "use_seedable_sampler": True, "data_seed": 3}),
    ("map", {"num_workers": 2}),
    ("map", {"num_workers": 2, "shuffle": True}),
    ("map", {"dispatch_batches": True}),
    ("map", {"dispatch_batches": True, "shuffle": True}),
    ("stream", {"dispatch_batches": False}),
    ("remembering", {"dispatch_batches": False}),
    ("remembering", {"dispatch_batches": False, "num_workers": 1}),
    ("remembering", {"dispatch_batches": True}),
    ("remembering", {"dispatch_batches": True, "drop_last": True}),
]
DATASETS: dict[str, Any] = {"map": lambda: list(range(23)), "stream": Stream, "remembering": Remembering}


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_resuming_from_a_saved_position(kind: str, options: dict[str, Any], ranks: int, rank: int) -> None:
    torch.manual_seed(4)
    loader = make(DATASETS[kind](), ranks, rank, **options)
    rows(loader)  # positions in the second epoch, too, are positions
    states, seen = [], []
    for batch in loader:
        seen.append(_seen(loader, batch))
        states.append(pickle.dumps(loader.state_dict()))
    assert [step[1] for step in seen] == [False] * (len(seen) - 1) + [True]
    for done in {1, len(seen) // 2, len(seen) - 1}:
        torch.manual_seed(99)  # the order is the saved one's, not the present seed's
        resumed = make(DATASETS[kind](), ranks, rank, **options)
        resumed.load_state_dict(pickle.loads(states[done - 1]))
        assert [_seen(resumed, batch) for batch in resumed] == seen[done:], done
        assert resumed.iteration == 2
        assert len(rows(resumed)) == len(seen), "the epoch after that is a whole one"


@pytest.mark.parametrize("kind", ["map", "remembering"])
def test_a_position_between_epochs(kind: str) -> None:
    loader = make(DATASETS[kind](), dispatch_batches=False)
    everything = rows(loader)
    resumed = make(DATASETS[kind](), dispatch_batches=False)
    resumed.load_state_dict(loader.state_dict())
    assert rows(resumed) == everything
    fresh = make(DATASETS[kind](), dispatch_batches=False)
    resumed.load_state_dict(fresh.state_dict())
    assert rows(resumed) == everything
    assert rows(fresh) == everything


def test_a_position_that_others_saved() -> None:
    # As torchdata leaves it for a sampler without a state: only the count.
    loader = make(list(range(12)))
    batches = iter(loader)
    next(batches)
    next(batches)
    state = loader.state_dict()
    assert {"_num_yielded", "_sampler_iter_yielded", "_iterator_finished"} <= set(state)
    state["_sampler_iter_state"] = None
    del state["_iteration"]
    resumed = make(list(range(12)))
    resumed.load_state_dict(state)
    assert rows(resumed) == [[6, 7, 8], [9, 10, 11]]


def test_they_derive_from_torchdata() -> None:
    shard, dispatcher = make(list(range(4))), make(list(range(4)), dispatch_batches=True)
    assert isinstance(shard, StatefulDataLoader)
    assert isinstance(shard, DataLoaderShard)
    assert isinstance(dispatcher, StatefulDataLoader)
    assert isinstance(dispatcher, DataLoaderDispatcher)
    assert rows(pickle.loads(pickle.dumps(shard))) == [[0, 1, 2], [3]]
    assert rows(skip_first_batches(shard, 1)) == [[3]]
    by_hand = DataLoaderShard(list(range(4)), use_stateful_dataloader=True)
    assert isinstance(by_hand, StatefulDataLoader)
    kept = prepare_data_loader(StatefulDataLoader(list(range(4)), batch_size=2, snapshot_every_n_steps=7))
    assert isinstance(kept, StatefulDataLoader)
    assert kept.snapshot_every_n_steps == 7


def test_torchdatas_own_shuffling_is_kept() -> None:
    plain = StatefulDataLoader(list(range(10)), batch_size=2, shuffle=True)
    by_rank = [rows(prepare_data_loader(plain, num_processes=1)) for _ in range(2)]
    assert sorted(row for batch in by_rank[0] for row in batch) == list(range(10))


def test_a_loader_without_a_position_raises() -> None:
    loader = prepare_data_loader(DataLoader(list(range(4))))
    with pytest.raises(TypeError, match="use_stateful_dataloader=True"):
        loader.state_dict()
    with pytest.raises(TypeError, match="use_stateful_dataloader=True"):
        loader.load_state_dict({})


def test_a_plain_stateful_loader_can_be_skipped() -> None:
    later = skip_first_batches(StatefulDataLoader(Stream(7), batch_size=2, snapshot_every_n_steps=3), 2)
    assert isinstance(later, StatefulDataLoader)
    assert rows(later) == [[4, 5], [6]]
