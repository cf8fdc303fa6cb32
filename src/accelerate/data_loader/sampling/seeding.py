"""Random states per sample: random numbers drawn while reading a sample are a function of (seed, epoch, index).

So the augmentation of a sample depends neither on the process that reads it nor on the samples read before, and is the
same after resuming. `SampleSeeds` belongs to the loader; `SeededDataset` wraps the dataset for the iterator and its workers.
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
    """Seed and epoch of a loader's samples, in memory shared with its workers.

    Args:
        seed: The seed; None: torch's default seed on rank 0 when the first epoch starts.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        # Persistent workers read the next epoch here. It starts after all of them have finished the last.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()

    def begin(self, epoch: int, synchronize: bool) -> None:
        """Starts an epoch.

        Args:
            epoch: Its number.
            synchronize: Copy the default seed from rank 0, because all ranks read.
        """
        if self.seed is None:
            self.seed = torch.initial_seed()
            if synchronize:
                (self.seed,) = world.current().collectives.broadcast_object_list([self.seed])
        self._shared[0], self._shared[1] = self.seed & (2**63 - 1), epoch

    def seed_for(self, index: Any) -> int:
        """Returns the seed for a sample, or for a batch of samples."""
        seed, epoch = self._shared.tolist()
        digest = hashlib.blake2b(f"{seed}/{epoch}/{_plain(index)}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


def _plain(index: Any) -> Any:
    """Converts numbers of numpy and torch in an index to Python's."""
    if isinstance(index, (list, tuple)):
        return [_plain(part) for part in index]
    try:
        return operator.index(index)
    except TypeError:
        return repr(index)


class SeededDataset:
    """Wraps a map-style dataset, and seeds the generators of torch, numpy and Python before each sample is read.

    For a dataset that reads whole batches (``__getitems__``) they are seeded before each batch, by its indices.

    Args:
        dataset: The dataset.
        seeds: The seeds of the loader.
    """

    def __init__(self, dataset: Any, seeds: SampleSeeds) -> None:
        self.__dict__.update(_dataset=dataset, _seeds=seeds)

    # A worker_init_fn may read and set attributes of the dataset through `get_worker_info().dataset`.
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # during unpickling there is no dataset yet
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
    """A `SeededDataset` for a dataset with a state: torchdata looks these methods up on the class."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the dataset."""
        state: dict[str, Any] = self._dataset.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state of the dataset."""
        self._dataset.load_state_dict(state)


def with_sample_seeds(dataset: Any, seeds: SampleSeeds) -> SeededDataset:
    """Wraps a dataset in a `SeededDataset`."""
    stateful = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
    return (StatefulSeededDataset if stateful else SeededDataset)(dataset, seeds)


def reads_batches(dataset: Any) -> bool:
    """Returns whether a dataset reads whole batches at once."""
    while isinstance(dataset, Subset):  # has the method whether or not the dataset inside does
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextmanager
def _preserve_rng_state() -> Iterator[None]:
    """Restores random states on exit in the training process, where the model uses them; does nothing in a worker."""
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
