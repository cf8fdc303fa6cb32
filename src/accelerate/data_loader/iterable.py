"""Shards of iterable datasets, and how a worker process reports padding to the loader.

`IterableDatasetShard`: every rank reads the whole stream and keeps its own samples, so all ranks see where it ends; only
the last step can be padded. `StreamShard`: every rank reads shards of its own and pads its own last batch. The first
sample of a padded batch carries its `StepSizes` through torch's fetching and collating (`PaddingMarker`,
`StripMarkers`, `CountedBatch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset
from torch.utils.data._utils.pin_memory import pin_memory

from ..runtime.world import DataShard
from .batches.batch_sharding import StepSizes, irregular_sizes, pad_cyclic
from .sampling.samplers import check_split


@dataclass
class PaddingMarker:
    """Wraps the first sample of a batch whose step has `StepSizes`."""

    sample: Any
    step_sizes: StepSizes


@dataclass
class CountedBatch:
    """A collated batch with the `StepSizes` of its step."""

    batch: Any
    step_sizes: StepSizes

    def pin_memory(self) -> CountedBatch:
        """Pins the batch; torch calls this method of custom batch types."""
        return CountedBatch(pin_memory(self.batch), self.step_sizes)


class StripMarkers:
    """A collate function that unwraps a `PaddingMarker`, calls the user's function, and returns a `CountedBatch`."""

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: Any) -> Any:
        first = samples[0] if type(samples) is list and samples else samples
        if type(first) is not PaddingMarker:
            return self.collate_fn(samples)
        unmarked = [first.sample, *samples[1:]] if first is not samples else first.sample
        return CountedBatch(self.collate_fn(unmarked), first.step_sizes)


class IterableDatasetShard(IterableDataset):
    """One rank's shard of an iterable dataset.

    The stream is read in global batches of one batch per rank (with `split_batches`: of one batch for all ranks), of
    which rank 0 keeps the first shard, rank 1 the second, and so on. All ranks must read the stream in the same order: a
    dataset that shuffles should draw from a ``torch.Generator`` in its attribute ``generator``, which prepared loaders
    synchronize.

    Args:
        dataset: The whole dataset.
        batch_size: Samples in a batch of one rank (with `split_batches`: of all ranks together).
        drop_last: Drop an incomplete last global batch.
        num_processes: Number of ranks.
        process_index: This rank.
        split_batches: `batch_size` is that of all ranks together.
        even_batches: Pad the last global batch with samples from the start. False: the last ranks get fewer, or none.

    Raises:
        ValueError: With `split_batches`, if `batch_size` is not a multiple of `num_processes`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        *,
        even_batches: bool = True,
    ) -> None:
        if split_batches:
            check_split(batch_size, num_processes)
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.even_batches = even_batches
        self.epoch = 0
        self.items_are_batches = False
        self.marks_padding = False

    @property
    def global_batch_size(self) -> int:
        """Samples per step of all ranks together."""
        return self.batch_size if self.split_batches else self.batch_size * self.num_processes

    @property
    def rows_per_rank(self) -> int:
        """Samples per full step of one rank."""
        return self.global_batch_size // self.num_processes

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the dataset."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.global_batch_size)
        return full * self.rows_per_rank + (0 if self.drop_last else self._rows_of_last(rest))

    def batches(self) -> int:
        """Returns the number of batches of this rank.

        Raises:
            TypeError: If the dataset has no length.
        """
        return -(-len(self) // self.rows_per_rank)

    def _rows_of_last(self, rest: int) -> int:
        """Returns this rank's samples of an incomplete global batch."""
        if self.even_batches:
            return self.rows_per_rank if rest else 0
        return min(self.rows_per_rank, max(0, rest - self.process_index * self.rows_per_rank))

    def __iter__(self) -> Iterator[Any]:
        start = self.process_index * self.rows_per_rank
        for global_batch, step_sizes in self._global_batches():
            mine = global_batch[start : start + self.rows_per_rank]
            if step_sizes is not None and self.marks_padding and mine:
                mine[0] = PaddingMarker(mine[0], step_sizes)
            yield from mine

    def _global_batches(self) -> Iterator[tuple[list[Any], StepSizes | None]]:
        start: list[Any] = []
        global_batch: list[Any] = []
        for sample in self.dataset:
            global_batch.append(sample)
            if len(global_batch) == self.global_batch_size:
                start = start or global_batch
                yield list(global_batch), None
                global_batch = []
        if global_batch and not self.drop_last:
            rows = len(global_batch)
            if self.even_batches:
                global_batch = pad_cyclic(global_batch, start or global_batch, self.global_batch_size)
            yield list(global_batch), self._step_sizes(len(global_batch), rows)

    def _step_sizes(self, held: int, rows: int) -> StepSizes | None:
        sizes = [
            min(self.rows_per_rank, max(0, held - rank * self.rows_per_rank)) for rank in range(self.num_processes)
        ]
        if self.items_are_batches:
            return StepSizes(tuple(sizes), rows, counts_batches=True)
        return irregular_sizes(sizes, rows)

    def __getattr__(self, name: str) -> Any:
        # torchdata saves and restores a dataset that has these two. At the end of a step exactly its global batch has
        # been read, so the position of the dataset is the position to save.
        if name in ("state_dict", "load_state_dict") and "dataset" in self.__dict__:
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


class StreamShard(IterableDataset):
    """The shards of an iterable dataset that one rank reads, in batches of one size.

    Args:
        dataset: The whole dataset, which has a method ``shard(num_shards=…, index=…)``.
        batch_size: Samples in a batch of this rank. The last batch (of each worker) is padded with samples from the
            start.
        ranks: This rank's shard, and the number of shards.
    """

    def __init__(self, dataset: Any, batch_size: int, ranks: DataShard) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.shard = dataset.shard(num_shards=ranks.count, index=ranks.index)

    @property
    def epoch(self) -> Any:
        """The epoch of the whole dataset; None if it has no such attribute."""
        return getattr(self.dataset, "epoch", None)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the dataset and of this rank's shards."""
        for dataset in (self.dataset, self.shard):
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.shard)
        start: list[Any] = []
        while batch := list(islice(samples, self.batch_size)):
            start = start or batch
            rows = len(batch)
            if rows < self.batch_size:
                batch = pad_cyclic(batch, start, self.batch_size)
                batch[0] = PaddingMarker(batch[0], StepSizes((self.batch_size,), rows))
            yield from batch

    def __getattr__(self, name: str) -> Any:
        # torchdata saves and restores a dataset that has these two. At the end of a batch exactly its samples have been
        # read, so the position in the shards is the position to save.
        if name in ("state_dict", "load_state_dict") and "shard" in self.__dict__:
            return getattr(self.shard, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def marks_padding(dataset: Any) -> bool:
    """Returns whether batches of this dataset may come as `CountedBatch`."""
    return isinstance(dataset, StreamShard) or (isinstance(dataset, IterableDatasetShard) and dataset.marks_padding)
