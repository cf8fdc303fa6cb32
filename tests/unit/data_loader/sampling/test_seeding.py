"""Random numbers drawn while samples are read: a function of seed, epoch and index, whoever reads, resumed or not."""

from __future__ import annotations

import os
import pickle
import random
import signal
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

pytest.importorskip("torchdata.stateful_dataloader")

from accelerate.data_loader import build_loader, plan_data
from accelerate.data_loader.sampling.seeding import SampleSeeds, with_sample_seeds
from accelerate.runtime.world import DataShard
from accelerate.settings.handlers import DataLoaderConfiguration

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
LENGTH = 24


class Augmented(Dataset[Any]):
    """Samples that are an index and a number from each generator."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = [torch.rand(()).item(), np.random.rand(), random.random()]
        return torch.tensor([index, *drawn], dtype=torch.float64)


class InBatches(Augmented):
    """The same, read a batch at a time."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


def loader(ranks: int = 1, rank: int = 0, workers: int = 0, total: int = 12, data: Any = None, **options: Any) -> Any:
    options = {"use_seedable_sampler": True, "data_seed": 5, "seed_samples": True, **options}
    config = DataLoaderConfiguration(use_stateful_dataloader=True, **options)
    plain = DataLoader(data or Augmented(), batch_size=total // ranks, shuffle=True, num_workers=workers)
    return build_loader(plan_data(plain, config, DataShard(rank, ranks)))


def draws(batches: Any) -> dict[int, tuple[float, ...]]:
    return {int(row[0]): tuple(row[1:].tolist()) for batch in batches for row in batch}


@pytest.fixture(scope="module")
def epochs() -> list[dict[int, tuple[float, ...]]]:
    """Three epochs, read by one process."""
    alone = loader()
    return [draws(alone) for _ in range(3)]


def test_each_sample_has_numbers_of_its_own_in_each_epoch(epochs: Any) -> None:
    numbers = [value for epoch in epochs for row in epoch.values() for value in row]
    assert [len(epoch) for epoch in epochs] == [LENGTH] * 3
    assert len(set(numbers)) == len(numbers) == 3 * LENGTH * 3
    other = draws(loader(data_seed=6))
    assert not set(other.values()) & set(epochs[0].values())


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (3, 1), (4, 0)])
def test_they_do_not_depend_on_the_reading_process(epochs: Any, ranks: int, workers: int) -> None:
    parts = [loader(ranks, rank, workers) for rank in range(ranks)]
    for wanted in epochs[:2]:
        found: dict[int, tuple[float, ...]] = {}
        for part in parts:
            found |= draws(part)
        assert found == wanted


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_continues_with_them(epochs: Any, workers: int) -> None:
    whole = loader(workers=workers, total=4)
    list(whole)
    batches = iter(whole)
    before = draws([next(batches), next(batches)])
    state = pickle.dumps(whole.state_dict())
    torch.manual_seed(99)
    resumed = loader(workers=workers, total=4, data_seed=77)  # the checkpoint's seed counts
    resumed.load_state_dict(pickle.loads(state))
    after = draws(resumed)
    assert before | after == epochs[1] and not before.keys() & after.keys()
    assert draws(resumed) == epochs[2]


def test_persistent_workers_get_the_next_epoch(epochs: Any) -> None:
    config = DataLoaderConfiguration(use_stateful_dataloader=True, use_seedable_sampler=True, data_seed=5)
    plain = DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True)
    prepared = build_loader(plan_data(plain, config, DataShard(0, 1)))
    next(iter(prepared))  # left in the middle, with batches on their way
    assert draws(prepared) == epochs[0]
    assert draws(prepared) == epochs[1]
    assert prepared.dataset is plain.dataset and prepared.worker_init_fn is None


def test_the_training_process_keeps_its_own_numbers() -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]

    batches = iter(loader())
    next(batches)
    before = states()
    next(batches)
    assert states() == before


def test_the_default_seed_is_torchs_and_part_of_the_position() -> None:
    torch.manual_seed(11)
    first = loader(data_seed=None)
    wanted = draws(first)
    torch.manual_seed(12)
    assert draws(loader(data_seed=None)).values() != wanted.values()
    again = loader(data_seed=None)
    again.load_state_dict(first.state_dict())
    assert draws(again) == draws(first)


def test_the_rule_of_the_default() -> None:
    def seeds(workers: int, **options: Any) -> bool:
        made = {"use_stateful_dataloader": True, "use_seedable_sampler": True, **options}
        return plan_data(
            DataLoader(Augmented(), num_workers=workers), DataLoaderConfiguration(**made), DataShard(0, 1)
        ).seed_samples

    assert seeds(1) and not seeds(0) and seeds(0, seed_samples=True) and not seeds(1, seed_samples=False)
    assert not seeds(1, use_seedable_sampler=False) and not seeds(1, use_stateful_dataloader=False)
    with pytest.raises(ValueError, match="use_stateful_dataloader=True"):
        DataLoaderConfiguration(seed_samples=True)


def test_datasets_that_read_batches_are_seeded_once_a_batch() -> None:
    seeds = SampleSeeds(3)
    seeds.begin(0, synchronize=False)
    for data in (InBatches(), Subset(InBatches(), range(4, LENGTH))):
        samples = with_sample_seeds(data, seeds)
        first = draws([samples.__getitems__([1, 2])])
        assert draws([samples.__getitems__([1, 2])]) == first
        assert draws([samples.__getitems__([2, 1])]) != first
    plain = with_sample_seeds(Subset(Augmented(), range(4, LENGTH)), seeds)
    assert draws([plain.__getitems__([1, 2])]) == draws([plain.__getitems__([2, 1])])
    assert torch.equal(plain[np.int64(2)], plain[torch.tensor(2)]) and not torch.equal(plain[2], plain[3])


class Opened(Augmented):
    handle = ""

    def __getitem__(self, index: int) -> Any:
        return self.handle, index


def open_it(worker: int) -> None:
    info: Any = get_worker_info()
    info.dataset.handle = f"opened by {worker} of {len(info.dataset)}"


def test_a_worker_init_fn_reaches_the_dataset() -> None:
    config = DataLoaderConfiguration(use_stateful_dataloader=True, seed_samples=True)
    plain = DataLoader(Opened(), batch_size=12, num_workers=2, worker_init_fn=open_it)
    handles = [batch[0][0] for batch in build_loader(plan_data(plain, config, DataShard(0, 1)))]
    assert handles == ["opened by 0 of 24", "opened by 1 of 24"]


class WithState(Augmented):
    """A dataset that counts what it has read, and says so to torchdata."""

    read = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read += 1
        return super().__getitem__(index)

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.read = state["read"]


def test_a_dataset_with_a_state_keeps_it() -> None:
    first = loader(data=WithState(), total=4)
    batches = iter(first)
    next(batches)
    next(batches)
    data = WithState()
    later = loader(data=data, total=4)
    later.load_state_dict(first.state_dict())
    next(iter(later))
    assert data.read == 12


class Stopping(Augmented):
    """A dataset whose workers are asked to stop, as schedulers ask all processes of a run."""

    def __getitem__(self, index: int) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_workers_survive_sigterm() -> None:
    prepared = loader(workers=2, data=Stopping(), total=4)
    assert len(draws(prepared)) == LENGTH
