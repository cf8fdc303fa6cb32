"""Random numbers that belong to a sample: those drawn while it is read are a function of (seed, epoch, index).

So an augmentation is the same whoever reads the sample, whatever was read before it, and after resuming. `SampleSeeds`
is the loader's part; `SeededDataset` is the dataset as the iterator and its workers see it.
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, get_worker_info

from ...runtime import world


class SampleSeeds:
    """The seed and the epoch of a loader's samples, where its workers can read them too.

    Args:
        seed: The seed; None: rank 0's default seed of torch when the first epoch begins.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        # In shared memory: workers that persist learn of the next epoch here. It begins when all have answered that they
        # are done with the last.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()

    def begin(self, epoch: int, synchronize: bool) -> None:
        """An epoch begins.

        Args:
            epoch: Its number.
            agree: All ranks read: where nobody chose a seed, rank 0's counts.
        """
        if self.seed is None:
            self.seed = torch.initial_seed()
            if synchronize:
                (self.seed,) = world.current().collectives.broadcast_object_list([self.seed])
        self._shared[0], self._shared[1] = self.seed & (2**63 - 1), epoch

    def seed_for(self, index: Any) -> int:
        """The seed of a sample, or of a batch of them."""
        seed, epoch = self._shared.tolist()
        digest = hashlib.blake2b(f"{seed}/{epoch}/{_plain(index)}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


def _plain(index: Any) -> Any:
    """An index by its value: numpy's and torch's numbers count as Python's."""
    if isinstance(index, (list, tuple)):
        return [_plain(part) for part in index]
    try:
        return operator.index(index)
    except TypeError:
        return repr(index)


class SeededDataset:
    """A map-style dataset whose samples are read with random states of their own; otherwise it is the dataset itself.

    torch's, numpy's and Python's generators are seeded before each sample. A dataset that reads whole batches
    (``__getitems__``) is seeded before each batch, by its indices.

    Args:
        dataset: The dataset.
        seeds: The loader's.
    """

    def __init__(self, dataset: Any, seeds: SampleSeeds) -> None:
        self.__dict__.update(_dataset=dataset, _seeds=seeds)

    # What a worker_init_fn looks up or sets on `get_worker_info().dataset` is the dataset's.
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # while it is unpickled there is no dataset yet
            raise AttributeError(name)
        return getattr(self.__dict__["_dataset"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        with _preserve_rng_state():
            return self._read(index)

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        with _preserve_rng_state():
            if reads_batches(self._dataset):
                _seed(self._seeds.seed_for(indices))
                batch: list[Any] = self._dataset.__getitems__(indices)
                return batch
            return [self._read(index) for index in indices]

    def _read(self, index: Any) -> Any:
        _seed(self._seeds.seed_for(index))
        return self._dataset[index]


class StatefulSeededDataset(SeededDataset):
    """The same for a dataset with a state, which torchdata looks for on the class."""

    def state_dict(self) -> dict[str, Any]:
        """The dataset's."""
        state: dict[str, Any] = self._dataset.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The dataset's."""
        self._dataset.load_state_dict(state)


def with_sample_seeds(dataset: Any, seeds: SampleSeeds) -> SeededDataset:
    """A dataset with samples that have random states of their own."""
    stateful = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
    return (StatefulSeededDataset if stateful else SeededDataset)(dataset, seeds)


def reads_batches(dataset: Any) -> bool:
    """Whether a dataset reads whole batches at once."""
    while isinstance(dataset, Subset):  # it has the method for the sake of the dataset in it
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextmanager
def _preserve_rng_state() -> Iterator[None]:
    """In the process that trains, whose random numbers are for the model; a worker reads and does nothing else."""
    if get_worker_info() is not None:
        yield
        return
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
