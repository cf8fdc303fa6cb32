"""One rank's part of an iterable dataset, and how a worker tells the loader what of a batch is padding.

`IterableDatasetShard`: every rank reads the whole stream and keeps its own samples, so all ranks know where it ends; only
the last round can be padded. `StreamShard`: every rank reads shards of its own and pads its own last batch. The first
sample of a padded batch carries its `Round` through torch's fetching and collating (`Marked`, `Unmark`, `Counted`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset
from torch.utils.data._utils.pin_memory import pin_memory

from ..runtime.world import DataRanks
from .batches.batch_sharding import Round, describe, fill
from .sampling.samplers import check_split


@dataclass
class Marked:
    """The first sample of a rank's part of a round that is not a plain one."""

    sample: Any
    round: Round


@dataclass
class Counted:
    """A collated batch and the `Round` it belongs to."""

    batch: Any
    round: Round

    def pin_memory(self) -> Counted:
        """torch calls this for a class it does not know."""
        return Counted(pin_memory(self.batch), self.round)


class Unmark:
    """A collate function around the user's: takes the mark off the samples and puts it on the batch."""

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: Any) -> Any:
        first = samples[0] if type(samples) is list and samples else samples
        if type(first) is not Marked:
            return self.collate_fn(samples)
        unmarked = [first.sample, *samples[1:]] if first is not samples else first.sample
        return Counted(self.collate_fn(unmarked), first.round)


class IterableDatasetShard(IterableDataset):
    """One rank's part of an iterable dataset.

    The stream is read in stretches of one batch a rank (with `split_batches`: of one batch for all ranks), of which
    rank 0
    keeps the first part, rank 1 the second, and so on. All ranks must see the stream in one order: a dataset that
        shuffles
    should draw from a ``torch.Generator`` in its attribute ``generator``, which prepared loaders synchronise.

    Args:
        dataset: The dataset over the whole data.
        batch_size: Samples in a rank's batch (with `split_batches`: in the batch of all ranks).
        drop_last: Leave out an incomplete last stretch.
        num_processes: Number of ranks.
        process_index: This rank.
        split_batches: `batch_size` is that of all ranks together.
        even_batches: Complete the last stretch with samples from the start. False: the last ranks get fewer, or none.

    Raises:
        ValueError: with `split_batches`, when `batch_size` is no multiple of `num_processes`.
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
        self.marks_rounds = False

    @property
    def stretch(self) -> int:
        """Samples that all ranks together take at one step."""
        return self.batch_size if self.split_batches else self.batch_size * self.num_processes

    @property
    def share(self) -> int:
        """Samples that one rank takes of a full stretch."""
        return self.stretch // self.num_processes

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on to the dataset."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.stretch)
        return full * self.share + (0 if self.drop_last else self._part_of(rest))

    def batches(self) -> int:
        """Number of batches this rank gets.

        Raises:
            TypeError: when the dataset has no length.
        """
        return -(-len(self) // self.share)

    def _part_of(self, rest: int) -> int:
        """This rank's samples of an incomplete stretch."""
        if self.even_batches:
            return self.share if rest else 0
        return min(self.share, max(0, rest - self.process_index * self.share))

    def __iter__(self) -> Iterator[Any]:
        start = self.process_index * self.share
        for stretch, round in self._stretches():
            mine = stretch[start : start + self.share]
            if round is not None and self.marks_rounds and mine:
                mine[0] = Marked(mine[0], round)
            yield from mine

    def _stretches(self) -> Iterator[tuple[list[Any], Round | None]]:
        start: list[Any] = []
        stretch: list[Any] = []
        for sample in self.dataset:
            stretch.append(sample)
            if len(stretch) == self.stretch:
                start = start or stretch
                yield list(stretch), None
                stretch = []
        if stretch and not self.drop_last:
            rows = len(stretch)
            if self.even_batches:
                stretch = fill(stretch, start or stretch, self.stretch)
            yield list(stretch), self._round(len(stretch), rows)

    def _round(self, held: int, rows: int) -> Round | None:
        sizes = [min(self.share, max(0, held - rank * self.share)) for rank in range(self.num_processes)]
        if self.items_are_batches:
            return Round(tuple(sizes), rows, whole=True)
        return describe(sizes, rows)

    def __getattr__(self, name: str) -> Any:
        # torchdata saves and restores a dataset that has these two. A step ends with its stretch read and nothing
        # beyond, so the dataset's own position is this one's.
        if name in ("state_dict", "load_state_dict") and "dataset" in self.__dict__:
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


class StreamShard(IterableDataset):
    """The shards of an iterable dataset that one rank reads, in batches of one size.

    Args:
        dataset: The dataset over the whole data, which has a method ``shard(num_shards=…, index=…)``.
        batch_size: Samples in this rank's batch. The last one (of each worker) is completed with samples from the start.
        ranks: Which part of how many is this rank's.
    """

    def __init__(self, dataset: Any, batch_size: int, ranks: DataRanks) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.part = dataset.shard(num_shards=ranks.count, index=ranks.index)

    @property
    def epoch(self) -> Any:
        """The epoch that the whole dataset shows; None where it shows none."""
        return getattr(self.dataset, "epoch", None)

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on to the dataset and to this rank's shards of it."""
        for dataset in (self.dataset, self.part):
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.part)
        start: list[Any] = []
        while batch := list(islice(samples, self.batch_size)):
            start = start or batch
            rows = len(batch)
            if rows < self.batch_size:
                batch = fill(batch, start, self.batch_size)
                batch[0] = Marked(batch[0], Round((self.batch_size,), rows))
            yield from batch

    def __getattr__(self, name: str) -> Any:
        # torchdata saves and restores a dataset that has these two. A batch ends with its samples read and nothing
        # beyond, so the position in the shards is this one's.
        if name in ("state_dict", "load_state_dict") and "part" in self.__dict__:
            return getattr(self.part, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def is_marked(dataset: Any) -> bool:
    """Whether batches of this dataset may come as `Counted`."""
    return isinstance(dataset, StreamShard) or (isinstance(dataset, IterableDatasetShard) and dataset.marks_rounds)
