"""What every prepared loader does: it is torch's `DataLoader`, knows its last batch when it hands it out, and tells
`GradientState` while it is being iterated over.

The contract with whoever gathers results is in `DataLoaderStateMixin`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ..runtime import devices
from ..runtime.tensors.pytree import send_to_device
from ..state import GradientState
from .batches.batch_sharding import StepSizes
from .batches.batch_slicing import BatchSlicer
from .iterable import CountedBatch, IterableDatasetShard, StreamShard, StripMarkers, marks_padding
from .sampling import workers
from .sampling.order import EpochOrder, GeneratorOrder, IterationProgress, LookaheadSampler, SeededOrder
from .sampling.samplers import (
    BatchSamplerShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    get_sampler,
    index_sampler,
    sampler_chain,
    samplers_with_epoch,
    samples_per_epoch,
)
from .sampling.seeding import SampleSeeds, with_sample_seeds

if TYPE_CHECKING:
    from .plan import DataPlan

_END = object()
_STATEFUL = "accelerate.data_loader.stateful"  # needs torchdata: imported on use


class DataLoaderStateMixin:
    """Where a loader's loop stands. This is the contract between loaders and ``gather_for_metrics``.

    The values below hold from the moment a batch is handed out until the next one is asked for; `GradientState` shows
    those of the innermost loader that is being iterated over.

    Attributes:
        end_of_dataloader: Whether this rank's current batch is its last one. False while no batch has been handed out;
            stays True after the loop. With uneven batches the ranks reach their end at different steps.
        remainder: Documented, for one's own use: the number of samples that the last round of all ranks holds beyond
            full ones. Map-style datasets: the number of samples the sampler draws modulo `total_batch_size`, at every
            batch (so 0 means that nothing is padded); -1 with ``drop_last`` and where the number is unknown. Iterable
            datasets: -1 until the last batch, then the samples in it over all ranks (-1 where the last batch is full
                and
            the loader sharded; the dispatcher knows it then too). **Not** enough to trim by: see `step_sizes`.
        round: What the current step of all ranks holds, if that is not "as many rows on each rank, all of them data";
            else None. The one thing to gather by: ranks ``0 … step_sizes.active_ranks - 1`` have a
            batch at this step, the others
            have left their loops and must not be waited for; concatenated in rank order, the first ``step_sizes.rows`` rows
            are data. `gather_rows` and `gather_items` in `accelerate.data_loader.gathering` do just that.
        short_rows: The number of rows in this rank's current batch, if they are fewer than `full_rows`; else None. A
            value repeated to a full batch (``loss.repeat(batch_size)``) counts as often as the batch has rows.

    When `step_sizes` is set, by mode:

    - One rank, and ``drop_last`` (full rounds only): never.
    - Sharded, `even_batches`: at the last step, if samples were repeated to fill it. All ranks take as many steps.
    - Sharded, not even: at the last step of the ranks that have it, with differing sizes, 0 for those that stopped before.
    - Sharded, a batch sampler of varying sizes, which are dealt whole: at each step whose sizes differ; with
      `even_batches` the last step is completed with whole batches from the start.
    - Sharded, ``batch_size=None``, where each item is a batch: at an incomplete last step, counting batches (`whole`).
    - Sharded iterable datasets: as above, but once for each worker, whose streams end one by one.
    - Sharded iterable datasets whose shards each rank reads by itself: at each step with repeated rows, with
      `StepSizes.valid_rows`.
    - Dispatched: at the last step, if rows were repeated, and wherever sizes differ. All ranks take as many steps.
    """

    end_of_dataloader: bool = False
    remainder: int = -1
    step_sizes: StepSizes | None = None
    short_rows: int | None = None

    @property
    def full_rows(self) -> int | None:
        """Rows in a full batch of this rank; None where batches have no fixed size."""
        return None

    @property
    def gradient_state(self) -> GradientState:
        """The state that loaders tell where they stand."""
        return GradientState()

    def reset(self) -> None:
        """Forgets where the last loop stood."""
        self.end_of_dataloader = False
        self.remainder = -1
        self.step_sizes = None
        self.short_rows = None

    def begin(self) -> None:
        """A loop over this loader begins: it becomes the active one."""
        self.reset()
        self.remainder = self._expected_remainder()
        self.gradient_state._add_dataloader(self)

    def end(self) -> None:
        """A loop over this loader ends: the one around it becomes active again."""
        self.gradient_state._remove_dataloader(self)

    def _expected_remainder(self) -> int:
        return -1


class DataLoaderAdapter(DataLoaderStateMixin, DataLoader):
    """torch's `DataLoader` (or torchdata's `StatefulDataLoader`) with the state of its loop.

    Args:
        dataset: The dataset.
        use_stateful_dataloader: Be a `torchdata.stateful_dataloader.StatefulDataLoader` too.
        batch_sampler: As for `torch.utils.data.DataLoader`.
        **kwargs: As for `torch.utils.data.DataLoader`.

    Raises:
        ImportError: with `use_stateful_dataloader` where torchdata is not installed.
    """

    _plan: DataPlan | None = None
    """How the loader was planned; None for one made by its constructor."""
    _origin: DataLoader[Any] | None = None
    """The loader this one is a later start of."""
    _stateful: bool = False
    _reseeds: bool = False
    """Whether `synchronized_generator` is the loader's own, to be seeded at the start of each epoch."""
    synchronized_generator: torch.Generator | None = None
    _recorded_position: Any = None
    """The position to save, where it is not that of the underlying loader."""
    _sample_seeds: SampleSeeds | None = None
    """Where samples are read with random states of their own."""

    def __new__(cls, *args: Any, use_stateful_dataloader: bool = False, **kwargs: Any) -> DataLoaderAdapter:
        return super().__new__(stateful_class(cls) if use_stateful_dataloader else cls)

    def __init__(
        self,
        dataset: Any,
        use_stateful_dataloader: bool = False,
        batch_sampler: Any = None,
        skip_batches: int = 0,
        iteration: int = 0,
        _drop_last: bool = False,
        **kwargs: Any,
    ) -> None:
        if use_stateful_dataloader and not self._stateful:
            raise TypeError("pass use_stateful_dataloader by its name: it decides on the class of the loader.")
        self.use_stateful_dataloader = self._stateful
        self.skip_batches = skip_batches
        self.iteration = iteration
        self._drop_last = _drop_last
        self._lookahead_sampler: LookaheadSampler | None = None
        super().__init__(dataset, batch_sampler=batch_sampler, **kwargs)
        # The epoch that each of them showed last; one that shows another since has been set by the user.
        self._epochs_seen: dict[int, Any] = {id(receiver): _epoch_of(receiver) for receiver in self._epoch_receivers()}

    # What it is made of -----------------------------------------------------------------------------------------------

    @property
    def base_dataloader(self) -> DataLoader[Any]:
        """The torch loader, which this object is itself."""
        return self

    @property
    def is_iterable(self) -> bool:
        """Whether the dataset is an iterable one."""
        return isinstance(self.dataset, IterableDataset)

    @property
    def total_batch_size(self) -> int | None:
        """Samples in a batch of all ranks together; None where batches have no fixed size."""
        if self._plan is not None:
            return self._plan.total_batch_size
        if isinstance(self.dataset, IterableDatasetShard):
            return self.dataset.global_batch_size
        if self.is_iterable:
            return self.batch_size
        for link in sampler_chain(index_sampler(self)):
            size: int | None = getattr(link, "batch_size", None)
            if isinstance(link, BatchSamplerShard) and size is not None:
                return size if link.split_batches else size * link.num_processes
            if size is not None and not isinstance(link, SkipBatchSampler):
                return size
        return None

    @property
    def full_rows(self) -> int | None:
        """Rows in a full batch of this rank; None where batches have no fixed size."""
        if self._plan is not None:
            return self._plan.batch_size
        total = self.total_batch_size
        return None if total is None else total // self._num_shards()

    def _num_shards(self) -> int:
        """Among how many ranks the loader's data are shared."""
        links: list[Any] = [self.dataset, *sampler_chain(index_sampler(self))]
        shards = (link for link in links if isinstance(link, (IterableDatasetShard, BatchSamplerShard)))
        return next((shard.num_processes for shard in shards), 1)

    @property
    def total_dataset_length(self) -> int:
        """Samples in the dataset, over all ranks."""
        dataset: Any = self.dataset
        if isinstance(dataset, IterableDatasetShard):
            dataset = dataset.dataset
        return dataset.total_length if hasattr(dataset, "total_length") else len(dataset)

    def __len__(self) -> int:
        if isinstance(self.dataset, IterableDatasetShard):
            return max(0, self.dataset.batches() - self.skip_batches)
        length = super().__len__()
        return max(0, length - self._batches_to_skip()) if self.is_iterable else length

    def get_sampler(self) -> Any:
        """The sampler that chooses the order; None for an iterable dataset."""
        return get_sampler(self)

    def set_sampler(self, sampler: Any) -> None:
        """Replaces the sampler that chooses the order, below all batch samplers; it takes effect at the next iteration.

        Raises:
            ValueError: where the order does not come from a sampler that can be replaced: an iterable dataset, or a
                custom batch sampler.
        """
        *outer, innermost = sampler_chain(index_sampler(self)) or [None]
        if outer:
            outer[-1].sampler = sampler
        elif innermost is not None and innermost is self.sampler:
            self.__dict__["sampler"] = sampler  # torch refuses the plain assignment
        else:
            kind = type(self.dataset if innermost is None else innermost).__name__
            raise ValueError(f"this loader has no sampler that can be replaced: its order comes from a {kind}.")
        if self.__dict__.get("sampler") is innermost:
            self.__dict__["sampler"] = sampler
        self._lookahead_sampler = None
        if isinstance(sampler, SeedableRandomSampler):
            self.iteration = sampler.epoch

    # Epochs -----------------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Tells the epoch to the samplers, batch samplers and datasets that have a ``set_epoch``, and counts on from
        it.

        The start of each iteration does so too, from epoch 0 on; an epoch that the user set on one of them since stands.

        Args:
            epoch: The number of the epoch whose order the next iteration takes, from 0.
        """
        self.iteration = epoch
        for receiver in self._epoch_receivers():
            self._set_epoch_of(receiver, epoch)

    def _epoch_receivers(self) -> list[Any]:
        dataset = self.dataset.dataset if isinstance(self.dataset, IterableDatasetShard) else self.dataset
        receivers = samplers_with_epoch(index_sampler(self))
        return [*receivers, dataset] if hasattr(dataset, "set_epoch") else receivers

    def _set_epoch_of(self, receiver: Any, epoch: int) -> None:
        receiver.set_epoch(epoch)
        self._epochs_seen[id(receiver)] = _epoch_of(receiver)

    def _begin_epoch(self) -> None:
        for receiver in self._epoch_receivers():
            shown = _epoch_of(receiver)
            ours = isinstance(receiver, SeedableRandomSampler)  # counts for itself, and may have got ahead
            if ours or shown == self._epochs_seen.get(id(receiver), shown):
                self._set_epoch_of(receiver, self.iteration)
            elif isinstance(receiver, StreamShard):
                receiver.set_epoch(shown)  # the user set it on the whole dataset

        if self._sample_seeds is not None:
            self._sample_seeds.begin(self.iteration, synchronize=self._all_ranks_read())

    def _all_ranks_read(self) -> bool:
        return True

    def _finish_epoch(self) -> None:
        self.iteration += 1
        if isinstance(self._origin, DataLoaderAdapter):
            self._origin.iteration = self.iteration  # the full loader goes on with the epoch that comes next

    def _expected_remainder(self) -> int:
        if self._drop_last or self.is_iterable or not self.total_batch_size:
            return -1
        samples = samples_per_epoch(self)
        return -1 if samples is None else samples % self.total_batch_size

    # Iteration --------------------------------------------------------------------------------------------------------

    def _epoch_order(self) -> EpochOrder | None:
        sampler = self.get_sampler()
        if isinstance(sampler, SeedableRandomSampler):
            return SeededOrder(sampler, self._synchronizes_generator())
        generator = self.synchronized_generator
        if generator is None or not (self._reseeds or self._stateful or self._synchronizes_generator()):
            return None
        return GeneratorOrder(generator, self._reseeds, self._synchronizes_generator())

    def _synchronizes_generator(self) -> bool:
        """Whether the ranks take over the state of rank 0's generator."""
        return False

    def _lookahead(self) -> int:
        """How many batches of indices are drawn ahead."""
        return 1

    @property
    def _index_sampler(self) -> Any:
        # torch's loader asks this for what it draws from.
        sampler = super()._index_sampler
        if self.is_iterable:
            return sampler
        if self._lookahead_sampler is None:
            if self._batches_to_skip():
                sampler = SkipBatchSampler(sampler, self._batches_to_skip())
            self._lookahead_sampler = LookaheadSampler(
                sampler, self._epoch_order(), self._lookahead(), self._stateful, self.full_rows
            )
        return self._lookahead_sampler

    def _batches_to_skip(self) -> int:
        """How many batches of the underlying torch loader are left out."""
        return self.skip_batches

    def _get_iterator(self) -> Any:
        # What only the iterator is to see.
        dataset, collate_fn, worker_init_fn = self.dataset, self.collate_fn, self.worker_init_fn
        try:
            if marks_padding(dataset):
                self.collate_fn = StripMarkers(collate_fn)
            if self._sample_seeds is not None:
                self.__dict__["dataset"] = with_sample_seeds(
                    dataset, self._sample_seeds
                )  # torch refuses the plain assignment
            if self.num_workers:
                self.worker_init_fn = workers.IgnoreSigterm(worker_init_fn)
            iterator = super()._get_iterator()
            if self.num_workers:
                workers.track_iterator(iterator)
            return iterator
        finally:
            self.__dict__["dataset"], self.collate_fn, self.worker_init_fn = dataset, collate_fn, worker_init_fn

    def torch_iterator(self) -> Any:
        """A pass over the underlying loader, nothing added."""
        return super().__iter__()

    def _batches(self) -> Iterator[Any]:
        """torch's batches, the state being set before each is handed out."""
        return self._iterable_batches() if self.is_iterable else self._map_style_batches()

    def _map_style_batches(self) -> Iterator[Any]:
        batches = self.torch_iterator()
        assert self._lookahead_sampler is not None
        progress = self._lookahead_sampler.progress
        if progress.exact and progress.total is not None:
            # No Python code a batch but the first and the last: this is the loop of every run on one process.
            between = max(0, progress.total - 2)
            first = map(require_batch, islice(batches, min(1, max(0, progress.total - 1))))
            return chain(first, islice(batches, between), self._last_batch(batches))
        return self._monitored_batches(batches, progress)

    def _last_batch(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.end_of_dataloader = True
            self._update_short_rows(batch, self.remainder if self.remainder > 0 else None)
            yield require_batch(batch)

    def _monitored_batches(self, batches: Any, progress: IterationProgress) -> Iterator[Any]:
        position = batches._num_yielded  # above 0 for a loader that resumes
        by_position, short = progress.step_sizes, progress.short
        for batch in batches:
            position += 1
            if position == progress.total:
                self.end_of_dataloader = True
            if short or self.short_rows is not None:
                self._update_short_rows(batch, short.pop(position, None))
            if by_position or self.step_sizes is not None:
                self._update_step_sizes(by_position.pop(position, None))
            yield require_batch(batch)

    def _update_short_rows(self, batch: Any, drawn: int | None) -> None:
        """Notes whether this rank's batch is shorter than a full one.

        Args:
            batch: The batch, whose own rows count if it has any that can be counted.
            drawn: The number of samples drawn for it.
        """
        full, rows = self.full_rows, None
        if full is not None:
            rows = BatchSlicer().rows(batch)
            rows = drawn if rows is None else rows
        self.short_rows = rows if full is not None and rows is not None and rows < full else None

    def _update_step_sizes(self, step_sizes: StepSizes | None) -> None:
        self.step_sizes = step_sizes
        if step_sizes is not None and self.end_of_dataloader and not step_sizes.counts_batches:
            self.remainder = step_sizes.rows

    def _iterable_batches(self) -> Iterator[Any]:
        several = self.num_workers > 1  # their streams end one by one
        for batch, last in self._with_lookahead(self.torch_iterator()):
            self.end_of_dataloader = last
            if type(batch) is CountedBatch:
                self._update_step_sizes(batch.step_sizes)
                batch = batch.batch
            elif self.step_sizes is not None:
                self._update_step_sizes(None)
            if last or several:
                self._update_short_rows(batch, None)
            yield require_batch(batch)

    def _with_lookahead(self, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        """Each batch of a stream (the skipped ones left out) with whether it is the last."""
        for _ in range(self._batches_to_skip()):
            next(batches, None)
        current = next(batches, _END)
        while current is not _END:
            self._record_position()
            failure: Exception | None = None
            upcoming: Any = _END
            try:
                upcoming = next(batches, _END)
            except Exception as error:  # noqa: BLE001 - raised at the next step: the batch at hand is whole
                failure = error
            yield current, upcoming is _END and failure is None
            if failure is not None:
                raise failure
            current = upcoming
        self._record_position()

    def _record_position(self) -> None:
        """Called before a stream is read ahead: the position to save is the one without that."""

    # Copies -----------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Iterators, with their worker processes, stay here. A track belongs to an iterator.
        return {**self.__dict__, "_iterator": None, "_lookahead_sampler": None, "_epochs_seen": {}}

    def adjust_state_dict_for_prefetch(self) -> None:
        """Kept for callers of the documented interface: the position is noted before anything is read ahead."""

    def state_dict(self) -> dict[str, Any]:
        """The position to resume from; only with ``use_stateful_dataloader=True``."""
        raise TypeError(_NOT_STATEFUL)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from a position at the next iteration; only with ``use_stateful_dataloader=True``."""
        raise TypeError(_NOT_STATEFUL)


def _epoch_of(receiver: Any) -> Any:
    return getattr(receiver, "epoch", None)


def require_batch(batch: Any) -> Any:
    """The batch, which must be one: None would only be noticed in the model, far from where it came from."""
    if batch is None:
        raise ValueError(
            "the loader gave None instead of a batch: its collate_fn (or, without batching, the dataset) returned nothing. "
            "Leave such samples out in the dataset or the sampler, or return an empty batch."
        )
    return batch


_NOT_STATEFUL = (
    "this loader keeps no position: prepare it with DataLoaderConfiguration(use_stateful_dataloader=True), which needs "
    "torchdata (`pip install 'accelerate[stateful]'`)."
)


def stateful_class(cls: type) -> type:
    """The version of a loader class that is a torchdata `StatefulDataLoader` too.

    Raises:
        ImportError: where torchdata is not installed.
    """
    try:
        importlib.import_module("torchdata.stateful_dataloader")
    except ImportError as error:
        raise ImportError(
            "use_stateful_dataloader=True needs torchdata 0.8 or later, which is not installed: "
            "`pip install 'accelerate[stateful]'`, or leave it False."
        ) from error
    table = importlib.import_module(_STATEFUL).CLASSES
    for plain, stateful in table.items():
        if issubclass(cls, stateful):
            return cls
        if cls is plain:
            return stateful
    raise TypeError(
        f"use_stateful_dataloader=True makes another class of a loader, and there is none for {cls.__name__}: derive from "
        f"one of {', '.join(stateful.__name__ for stateful in table.values())} ({_STATEFUL})."
    )


@functools.cache
def _only_cpu() -> bool:
    return not any(kind.name != "cpu" and kind.is_available() for kind in devices.DEVICES.values())


def make_transfer_fn(device: torch.device | None, non_blocking: bool) -> Callable[[Any], Any] | None:
    """What brings a batch to a device; None where it need not (no device, or nothing but the CPU on this machine)."""
    if device is None or (device.type == "cpu" and _only_cpu()):
        return None
    return functools.partial(send_to_device, device=device, non_blocking=non_blocking)
