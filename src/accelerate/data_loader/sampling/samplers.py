"""Samplers and batch samplers: one rank's shard of another sampler, a later start, an order determined by a seed.

`BatchSamplerShard`, `SamplerShard` and `SkipBatchSampler` have a method ``with_step_sizes()``, which iterates like ``iter``
and adds the `StepSizes` of each step, from which the loader determines padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler

from ..batches.batch_sharding import StepSizes, shard_batches, shard_items


class SeedableRandomSampler(RandomSampler):
    """A `RandomSampler` whose order depends on a seed and the epoch only, and so is the same on every rank and run.

    The epoch advances after each complete iteration; `set_epoch` sets it.

    Args:
        *args: As for `torch.utils.data.RandomSampler`.
        data_seed: The seed; None takes torch's current default seed (``torch.initial_seed()``).
        **kwargs: As for `torch.utils.data.RandomSampler`.

    Attributes:
        initial_seed: The seed. Epoch n shuffles with ``initial_seed + n``.
        epoch: The epoch of the next iteration.

    Example:
        ```python
        sampler = SeedableRandomSampler(dataset, data_seed=42)
        sampler.set_epoch(3)  # the order of the fourth epoch
        ```
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        data_seed = kwargs.pop("data_seed", None)
        super().__init__(*args, **kwargs)
        self.initial_seed: int = torch.initial_seed() if data_seed is None else data_seed
        self.seed_is_shared = data_seed is not None
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            self.generator = torch.Generator()
        self.generator.manual_seed(self.initial_seed + self.epoch)
        yield from super().__iter__()
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch


def sampler_chain(sampler: Any) -> list[Any]:
    """Returns a sampler and those nested in it, outermost first."""
    chain: list[Any] = []
    while sampler is not None and not any(sampler is seen for seen in chain):
        chain.append(sampler)
        inner = getattr(sampler, "batch_sampler", None)
        inner = getattr(sampler, "sampler", None) if inner is None else inner
        sampler = inner if hasattr(inner, "__iter__") else None
    return chain


def samplers_with_epoch(sampler: Any) -> list[Any]:
    """Returns the samplers of a chain that have a ``set_epoch``, except ours, which only forward it."""
    return [
        link for link in sampler_chain(sampler) if hasattr(link, "set_epoch") and not isinstance(link, _StepSampler)
    ]


class _StepSampler:
    """Base of the samplers that wrap another one, and determine the `StepSizes` of each step."""

    def with_step_sizes(self) -> Iterator[tuple[Any, StepSizes | None]]:
        """Yields this rank's index batches (or items), each with the `StepSizes` of its step or None."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        return (indices for indices, _ in self.with_step_sizes())

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the samplers inside."""
        for receiver in samplers_with_epoch(self):
            receiver.set_epoch(epoch)


class BatchSamplerShard(_StepSampler, BatchSampler):
    """One rank's shard of the batches of another batch sampler.

    With `split_batches` every batch is split into `num_processes` shards; else rank 0 takes batch 0, rank 1 batch 1, and
    so on in turn.

    Args:
        batch_sampler: The batch sampler over the whole data. If it has no attribute ``batch_size``, its batches may have
            any size, and are never split.
        num_processes: Number of ranks.
        process_index: This rank.
        split_batches: Split batches instead of distributing them.
        even_batches: Repeat samples from the start so that all ranks get the same number of batches of equal size.
            False: at the end a rank may get a shorter batch, or one batch less.

    Raises:
        ValueError: With `split_batches`, if the batch size is unknown or not a multiple of `num_processes`.

    Example:
        ```python
        batches = BatchSampler(SequentialSampler(range(8)), batch_size=2, drop_last=False)
        list(BatchSamplerShard(batches, num_processes=2, process_index=1))  # [[2, 3], [6, 7]]
        ```
    """

    def __init__(
        self,
        batch_sampler: Any,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.even_batches = even_batches
        self.batch_size: int | None = getattr(batch_sampler, "batch_size", None)  # type: ignore[assignment]
        self.drop_last = getattr(batch_sampler, "drop_last", False)
        if split_batches:
            check_split(self.batch_size, num_processes)

    @property
    def total_length(self) -> int:
        """Number of batches of the whole data."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        batches = len(self.batch_sampler)
        if self.num_processes == 1:
            return batches
        if self.split_batches:
            return batches - self._misses_last_batch()
        full, extra = divmod(batches, self.num_processes)
        if self.drop_last or not extra:
            return full
        return full + (self.even_batches or self.process_index < extra)

    def _misses_last_batch(self) -> bool:
        """Returns whether this rank's shard of the last batch is empty; False if the size of that batch is unknown."""
        sampler: Any = getattr(self.batch_sampler, "sampler", None)
        if self.even_batches or self.drop_last or self.batch_size is None or not hasattr(sampler, "__len__"):
            return False
        rest = len(sampler) % self.batch_size
        return 0 < rest <= self.process_index * (self.batch_size // self.num_processes)

    def with_step_sizes(self) -> Iterator[tuple[list[Any], StepSizes | None]]:
        rank = self.process_index  # read now, not in the constructor: transformers changes both on a prepared loader
        for parts, step_sizes in shard_batches(
            self.batch_sampler,
            self.num_processes,
            batch_size=self.batch_size,
            split=self.split_batches,
            even=self.even_batches,
            drop_last=self.drop_last,
        ):
            if parts[rank]:
                yield parts[rank], step_sizes


def check_split(batch_size: int | None, num_processes: int) -> None:
    """Raises if batches cannot be split over the ranks.

    Raises:
        ValueError: If `batch_size` is None or not a multiple of `num_processes`.
    """
    if batch_size is None:
        raise ValueError(
            "split_batches=True splits each batch over the processes, which needs a loader with a batch_size; this one has "
            "none (batch_size=None, or a batch sampler without that attribute). Set one, or use split_batches=False."
        )
    if batch_size % num_processes:
        raise ValueError(
            f"split_batches=True needs a batch size that is a multiple of the number of processes, but batch_size="
            f"{batch_size} and there are {num_processes} processes. Change the batch size, or use split_batches=False, "
            "with which it is the batch size of each process."
        )


class SamplerShard(_StepSampler, Sampler[Any]):
    """One rank's shard of a sampler each of whose items is a batch (a loader with ``batch_size=None``).

    Args:
        sampler: The sampler over the whole data.
        num_processes: Number of ranks.
        process_index: This rank.
        even_batches: Repeat items from the start so that all ranks get the same number.
    """

    def __init__(self, sampler: Any, num_processes: int, process_index: int, even_batches: bool = True) -> None:
        self.sampler = sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.even_batches = even_batches

    def __len__(self) -> int:
        full, extra = divmod(len(self.sampler), self.num_processes)
        return full + (extra > 0 if self.even_batches else self.process_index < extra)

    def with_step_sizes(self) -> Iterator[tuple[Any, StepSizes | None]]:
        for parts, step_sizes in shard_items(self.sampler, self.num_processes, even=self.even_batches):
            if parts[self.process_index]:
                yield parts[self.process_index][0], step_sizes


class SkipBatchSampler(_StepSampler, BatchSampler):
    """A batch sampler (or sampler) without its first batches, which are drawn but never fetched.

    Args:
        batch_sampler: The batch sampler.
        skip_batches: Number of batches to skip.
    """

    def __init__(self, batch_sampler: Any, skip_batches: int = 0) -> None:
        self.batch_sampler = batch_sampler
        self.skip_batches = skip_batches
        self.batch_size = getattr(batch_sampler, "batch_size", None)  # type: ignore[assignment]
        self.drop_last = getattr(batch_sampler, "drop_last", False)

    @property
    def total_length(self) -> int:
        """Number of batches, the skipped ones included."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        return max(0, len(self.batch_sampler) - self.skip_batches)

    def with_step_sizes(self) -> Iterator[tuple[Any, StepSizes | None]]:
        return itertools.islice(iter_with_step_sizes(self.batch_sampler), self.skip_batches, None)


def iter_with_step_sizes(sampler: Iterable[Any]) -> Iterator[tuple[Any, StepSizes | None]]:
    """Iterates over a sampler, and adds the `StepSizes` of each step; None if the sampler is not a shard."""
    return sampler.with_step_sizes() if isinstance(sampler, _StepSampler) else ((indices, None) for indices in sampler)


def index_sampler(loader: DataLoader[Any]) -> Any:
    """Returns the batch sampler of a loader, or its sampler if it does not batch; None for an iterable dataset."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    return loader.batch_sampler if loader.batch_sampler is not None else loader.sampler


def get_sampler(dataloader: DataLoader[Any]) -> Any:
    """Returns the sampler that determines the order of a loader's samples, inside all batch samplers.

    Returns:
        The sampler; a custom batch sampler if it contains none; None for an iterable dataset.
    """
    chain = sampler_chain(index_sampler(dataloader))
    return chain[-1] if chain else None


def samples_per_epoch(loader: DataLoader[Any]) -> int | None:
    """Returns how many samples a loader's sampler draws in an epoch; None if that is unknown."""
    chain: list[Any] = sampler_chain(index_sampler(loader))
    if len(chain) < 2 or isinstance(chain[-2], SamplerShard):
        return None
    sampler: Any = getattr(chain[-2], "sampler", None)
    return len(sampler) if sampler is chain[-1] and hasattr(sampler, "__len__") else None
