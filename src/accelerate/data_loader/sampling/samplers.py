"""Samplers and batch samplers: one rank's part of another's batches, a later start, an order that a seed determines.

`BatchSamplerShard`, `SamplerShard` and `SkipBatchSampler` also have ``with_step_sizes()``: what ``iter`` gives,
each with the `StepSizes` of that step, from which the loader knows what is padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler

from ..batches.batch_sharding import StepSizes, shard_batches, shard_items


class SeedableRandomSampler(RandomSampler):
    """A `RandomSampler` whose order depends on a seed and the epoch alone, so that every rank, and every run, sees the
    same.

    The epoch counts up by itself whenever the sampler has been used up; `set_epoch` chooses one.

    Args:
        *args: As for `torch.utils.data.RandomSampler`.
        data_seed: The seed; None takes torch's current default seed (``torch.initial_seed()``).
        **kwargs: As for `torch.utils.data.RandomSampler`.

    Attributes:
        initial_seed: The seed. Epoch n shuffles with ``initial_seed + n``.
        epoch: The epoch that the next iteration shuffles for.

    Example:
        ```python
        sampler = SeedableRandomSampler(dataset, data_seed=42)
        sampler.set_epoch(3)  # the order of the fourth epoch, whatever came before
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
        """Chooses the epoch that the next iteration shuffles for."""
        self.epoch = epoch


def sampler_chain(sampler: Any) -> list[Any]:
    """A sampler and those inside it, outermost first."""
    chain: list[Any] = []
    while sampler is not None and not any(sampler is seen for seen in chain):
        chain.append(sampler)
        inner = getattr(sampler, "batch_sampler", None)
        inner = getattr(sampler, "sampler", None) if inner is None else inner
        sampler = inner if hasattr(inner, "__iter__") else None
    return chain


def samplers_with_epoch(sampler: Any) -> list[Any]:
    """The samplers in a chain that want to be told the epoch; ours only pass it on, so they are not among them."""
    ours = (BatchSamplerShard, SamplerShard, SkipBatchSampler)
    return [link for link in sampler_chain(sampler) if hasattr(link, "set_epoch") and not isinstance(link, ours)]


def _forward_epoch(sampler: Any, epoch: int) -> None:
    for receiver in samplers_with_epoch(sampler):
        receiver.set_epoch(epoch)


class BatchSamplerShard(BatchSampler):
    """One rank's part of the batches of another batch sampler.

    With `split_batches` every batch is cut into `num_processes` parts, of which this rank takes its own; else rank 0
    takes batch 0, rank 1 batch 1, and so on in turn.

    Args:
        batch_sampler: The batch sampler over the whole data. Without an attribute ``batch_size`` its batches may have
            any size, and are then dealt whole.
        num_processes: Number of ranks.
        process_index: This rank.
        split_batches: Cut batches instead of dealing them.
        even_batches: Repeat samples from the start so that all ranks get as many batches, of one size. False: at the
            end a rank may get a shorter batch, or one batch less.

    Raises:
        ValueError: with `split_batches`, when the batch size is unknown or no multiple of `num_processes`.

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
        """Number of batches of the batch sampler over the whole data."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        batches = len(self.batch_sampler)
        if self.num_processes == 1:
            return batches
        if self.split_batches:
            return batches - self._without_rows_in_the_last()
        full, extra = divmod(batches, self.num_processes)
        if self.drop_last or not extra:
            return full
        return full + (self.even_batches or self.process_index < extra)

    def _without_rows_in_the_last(self) -> bool:
        """Whether an uneven split gives this rank nothing of the last batch; False where its size is not known."""
        sampler: Any = getattr(self.batch_sampler, "sampler", None)
        if self.even_batches or self.drop_last or self.batch_size is None or not hasattr(sampler, "__len__"):
            return False
        rest = len(sampler) % self.batch_size
        return 0 < rest <= self.process_index * (self.batch_size // self.num_processes)

    def with_step_sizes(self) -> Iterator[tuple[list[Any], StepSizes | None]]:
        """This rank's index batches, each with the `StepSizes` it belongs to (None: a plain one)."""
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

    def __iter__(self) -> Iterator[list[Any]]:
        return (indices for indices, _ in self.with_step_sizes())

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on to the batch sampler."""
        _forward_epoch(self.batch_sampler, epoch)


def check_split(batch_size: int | None, num_processes: int) -> None:
    """Refuses a batch that cannot be split over the ranks.

    Raises:
        ValueError: when `batch_size` is None or no multiple of `num_processes`.
    """
    if batch_size is None:
        raise ValueError(
            "split_batches=True cuts each batch into one part a process, which needs a loader with a batch_size; this one "
            "has none (batch_size=None, or a batch sampler without that attribute). Give it one, or use "
            "split_batches=False."
        )
    if batch_size % num_processes:
        raise ValueError(
            f"split_batches=True needs a batch size that is a multiple of the number of processes, but batch_size="
            f"{batch_size} and there are {num_processes} processes. Change the batch size, or use split_batches=False, "
            "where it is the batch size of each process."
        )


class SamplerShard(Sampler[Any]):
    """One rank's items of a sampler each of whose items is a whole batch (a loader with ``batch_size=None``).

    Args:
        sampler: The sampler over the whole data.
        num_processes: Number of ranks.
        process_index: This rank.
        even_batches: Repeat items from the start so that all ranks get as many.
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
        """This rank's items, each with the `StepSizes` it belongs to (None: a plain one)."""
        for parts, step_sizes in shard_items(self.sampler, self.num_processes, even=self.even_batches):
            if parts[self.process_index]:
                yield parts[self.process_index][0], step_sizes

    def __iter__(self) -> Iterator[Any]:
        return (item for item, _ in self.with_step_sizes())

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on to the sampler."""
        _forward_epoch(self.sampler, epoch)


class SkipBatchSampler(BatchSampler):
    """A batch sampler (or sampler) without its first batches. The skipped ones are drawn but never fetched.

    Args:
        batch_sampler: The batch sampler.
        skip_batches: How many batches to leave out.
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
        """The remaining index batches, each with the `StepSizes` it belongs to (None: a plain one)."""
        return itertools.islice(iter_with_step_sizes(self.batch_sampler), self.skip_batches, None)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.batch_sampler), self.skip_batches, None)

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on to the batch sampler."""
        _forward_epoch(self.batch_sampler, epoch)


def iter_with_step_sizes(sampler: Iterable[Any]) -> Iterator[tuple[Any, StepSizes | None]]:
    """What a sampler gives, each with its `StepSizes`; plain ones for a sampler that is not a shard."""
    return (
        sampler.with_step_sizes() if hasattr(sampler, "with_step_sizes") else ((indices, None) for indices in sampler)
    )


def index_sampler(loader: DataLoader[Any]) -> Any:
    """What a loader draws its indices from: its batch sampler, or its sampler where it does not batch; None for an
    iterable dataset's."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    return loader.batch_sampler if loader.batch_sampler is not None else loader.sampler


def get_sampler(dataloader: DataLoader[Any]) -> Any:
    """The sampler that chooses the order of a loader's samples, below all batch samplers.

    Returns:
        The sampler; a custom batch sampler that has none itself; None for an iterable dataset.
    """
    chain = sampler_chain(index_sampler(dataloader))
    return chain[-1] if chain else None


def samples_per_epoch(loader: DataLoader[Any]) -> int | None:
    """How many samples a loader's sampler draws in an epoch; None where that is not known."""
    chain: list[Any] = sampler_chain(index_sampler(loader))
    if len(chain) < 2 or isinstance(chain[-2], SamplerShard):
        return None
    sampler: Any = getattr(chain[-2], "sampler", None)
    return len(sampler) if sampler is chain[-1] and hasattr(sampler, "__len__") else None
