"""`DataLoaderAdapter`, the base of prepared loaders: a torch `DataLoader` that tracks the state of its loop.

Each loader identifies its last batch when it yields it, and registers with `GradientState` while it is iterated over.
`loop_state.DataLoaderStateMixin` documents the state that `gather_for_metrics` reads.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ..runtime import devices
from ..runtime.tensors.pytree import send_to_device
from .batches.batch_sharding import StepSizes
from .batches.batch_slicing import BatchSlicer
from .iterable import CountedBatch, IterableDatasetShard, StreamShard, StripMarkers, marks_padding
from .loop_state import DataLoaderStateMixin
from .plan import DataPlan
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

_END = object()
_STATEFUL = "accelerate.data_loader.stateful"  # imported on use: it needs torchdata


class DataLoaderAdapter(DataLoaderStateMixin, DataLoader):
    """A torch `DataLoader` (or torchdata `StatefulDataLoader`) that tracks the state of its loop.

    Args:
        dataset: The dataset.
        use_stateful_dataloader: Derive from `torchdata.stateful_dataloader.StatefulDataLoader` as well.
        batch_sampler: As for `torch.utils.data.DataLoader`.
        **kwargs: As for `torch.utils.data.DataLoader`.

    Raises:
        ImportError: With `use_stateful_dataloader`, if torchdata is not installed.
    """

    _plan: DataPlan | None = None
    """The plan the loader was built from; None if it was constructed directly."""
    _origin: DataLoader[Any] | None = None
    """The full loader, if this one is a copy that skips its first batches."""
    _stateful: bool = False
    _reseeds: bool = False
    """Whether `synchronized_generator` belongs to the loader, which then seeds it at the start of each epoch."""
    synchronized_generator: torch.Generator | None = None
    _recorded_position: Any = None
    """The position to save, if it differs from that of the underlying loader."""
    _sample_seeds: SampleSeeds | None = None
    """Seeds for reading samples, if each sample has random states of its own."""

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
            raise TypeError(
                "pass use_stateful_dataloader as a keyword argument: the class of the loader depends on it."
            )
        self.use_stateful_dataloader = self._stateful
        self.skip_batches = skip_batches
        self.iteration = iteration
        self._drop_last = _drop_last
        self._lookahead_sampler: LookaheadSampler | None = None
        super().__init__(dataset, batch_sampler=batch_sampler, **kwargs)
        # The last epoch that the loader saw on each receiver: if it has changed since, the user has set it.
        self._epochs_seen: dict[int, Any] = {id(receiver): _epoch_of(receiver) for receiver in self._epoch_receivers()}

    # Components -------------------------------------------------------------------------------------------------------

    @property
    def base_dataloader(self) -> DataLoader[Any]:
        """The torch loader, which is this object itself."""
        return self

    @property
    def is_iterable(self) -> bool:
        """Whether the dataset is an iterable one."""
        return isinstance(self.dataset, IterableDataset)

    @property
    def total_batch_size(self) -> int | None:
        """Samples in a batch of all ranks together; None if batches have no fixed size."""
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
        """Rows in a full batch of this rank; None if batches have no fixed size."""
        if self._plan is not None:
            return self._plan.batch_size
        total = self.total_batch_size
        return None if total is None else total // self._num_shards()

    def _num_shards(self) -> int:
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
        """Returns the sampler that determines the order; None for an iterable dataset."""
        return get_sampler(self)

    def set_sampler(self, sampler: Any) -> None:
        """Replaces the sampler that determines the order, inside all batch samplers, from the next iteration on.

        Raises:
            ValueError: If the order does not come from a sampler that can be replaced: with an iterable dataset or a
                custom batch sampler.
        """
        *outer, innermost = sampler_chain(index_sampler(self)) or [None]
        if outer:
            outer[-1].sampler = sampler
        elif innermost is not None and innermost is self.sampler:
            self.__dict__["sampler"] = sampler  # torch rejects plain assignment
        else:
            source = type(self.dataset if innermost is None else innermost).__name__
            raise ValueError(f"this loader has no sampler that can be replaced: its order comes from a {source}.")
        if self.__dict__.get("sampler") is innermost:
            self.__dict__["sampler"] = sampler
        self._lookahead_sampler = None
        if isinstance(sampler, SeedableRandomSampler):
            self.iteration = sampler.epoch

    # Epochs -----------------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the loader and of every sampler, batch sampler and dataset that has a ``set_epoch``.

        Each iteration does the same when it starts, counting from 0; an epoch that the user has set on one of these
        objects since the last iteration is kept.

        Args:
            epoch: The epoch of the next iteration, from 0.
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
            epoch = _epoch_of(receiver)
            ours = isinstance(receiver, SeedableRandomSampler)  # advances by itself, and may be ahead
            if ours or epoch == self._epochs_seen.get(id(receiver), epoch):
                self._set_epoch_of(receiver, self.iteration)
            elif isinstance(receiver, StreamShard):
                receiver.set_epoch(epoch)  # the user set it on the whole dataset
        if self._sample_seeds is not None:
            self._sample_seeds.begin(self.iteration, synchronize=self._all_ranks_read())

    def _all_ranks_read(self) -> bool:
        return True

    def _finish_epoch(self) -> None:
        self.iteration += 1
        if isinstance(self._origin, DataLoaderAdapter):
            self._origin.iteration = self.iteration  # the full loader continues with the next epoch

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
        """Returns whether the ranks copy the state of rank 0's generator."""
        return False

    def _lookahead(self) -> int:
        """Returns how many batches of indices are drawn ahead."""
        return 1

    @property
    def _index_sampler(self) -> Any:
        # Overrides the property through which torch's loader gets its indices.
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
        """Returns how many batches of the underlying torch loader are skipped."""
        return self.skip_batches

    def _get_iterator(self) -> Any:
        # The iterator takes wrapped components, which are not to show on the loader.
        dataset, collate_fn, worker_init_fn = self.dataset, self.collate_fn, self.worker_init_fn
        try:
            if marks_padding(dataset):
                self.collate_fn = StripMarkers(collate_fn)
            if self._sample_seeds is not None:
                self.__dict__["dataset"] = with_sample_seeds(dataset, self._sample_seeds)  # torch rejects assignment
            if self.num_workers:
                self.worker_init_fn = workers.IgnoreSigterm(worker_init_fn)
            iterator = super()._get_iterator()
            if self.num_workers:
                workers.track_iterator(iterator)
            return iterator
        finally:
            self.__dict__["dataset"], self.collate_fn, self.worker_init_fn = dataset, collate_fn, worker_init_fn

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.begin()
        try:
            yield from self._epoch()
            self._finish_epoch()
        finally:
            self.end()

    def _epoch(self) -> Iterator[Any]:
        """Returns the batches of one epoch."""
        return self._batches()

    def torch_iterator(self) -> Any:
        """Returns an iterator over the underlying torch loader, without the state of the loop."""
        return super().__iter__()

    def _batches(self) -> Iterator[Any]:
        """Returns torch's batches; the state of the loop is updated before each is yielded."""
        return self._iterable_batches() if self.is_iterable else self._map_style_batches()

    def _map_style_batches(self) -> Iterator[Any]:
        batches = self.torch_iterator()
        assert self._lookahead_sampler is not None
        progress = self._lookahead_sampler.progress
        if progress.exact and progress.total is not None:
            # The loop of every run on one process: only the first and the last batch pass through Python code of ours.
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
        """Sets `short_rows`.

        Args:
            batch: The batch; its own rows count if they can be counted.
            drawn: The number of samples drawn for it, used otherwise.
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
        """Yields each batch of an iterable dataset, after the skipped ones, with whether it is the last."""
        for _ in range(self._batches_to_skip()):
            next(batches, None)
        current = next(batches, _END)
        while current is not _END:
            self._record_position()
            failure: Exception | None = None
            upcoming: Any = _END
            try:
                upcoming = next(batches, _END)
            except Exception as error:  # noqa: BLE001 - raised at the next step: the current batch is complete
                failure = error
            yield current, upcoming is _END and failure is None
            if failure is not None:
                raise failure
            current = upcoming
        self._record_position()

    def _record_position(self) -> None:
        """Hook called before an iterable dataset is read ahead: this is the position to save for the current batch."""

    # Copies -----------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Iterators own worker processes, and progress belongs to an iterator.
        return {**self.__dict__, "_iterator": None, "_lookahead_sampler": None, "_epochs_seen": {}}

    def adjust_state_dict_for_prefetch(self) -> None:
        """Does nothing; part of the documented interface. The position is recorded before anything is read ahead."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the position to resume from; only with ``use_stateful_dataloader=True``."""
        raise TypeError(_NOT_STATEFUL)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from a position at the next iteration; only with ``use_stateful_dataloader=True``."""
        raise TypeError(_NOT_STATEFUL)


def _epoch_of(receiver: Any) -> Any:
    return getattr(receiver, "epoch", None)


def require_batch(batch: Any) -> Any:
    """Returns the batch, or raises if it is None, which would only fail in the model, far from its origin."""
    if batch is None:
        raise ValueError(
            "the loader returned None instead of a batch: its collate_fn (or, without batching, the dataset) returned "
            "nothing. Leave such samples out in the dataset or the sampler, or return an empty batch."
        )
    return batch


_NOT_STATEFUL = (
    "this loader keeps no position: prepare it with DataLoaderConfiguration(use_stateful_dataloader=True), which needs "
    "torchdata (`pip install 'accelerate[stateful]'`)."
)


def stateful_class(cls: type) -> type:
    """Returns the variant of a loader class that derives from torchdata's `StatefulDataLoader` too.

    Raises:
        ImportError: If torchdata is not installed.
        TypeError: If the class has no such variant.
    """
    try:
        importlib.import_module("torchdata.stateful_dataloader")
    except ImportError as error:
        raise ImportError(
            "use_stateful_dataloader=True needs torchdata 0.8 or later, which is not installed: "
            "`pip install 'accelerate[stateful]'`, or leave it False."
        ) from error
    variants = importlib.import_module(_STATEFUL).CLASSES
    for plain, stateful in variants.items():
        if issubclass(cls, stateful):
            return cls
        if cls is plain:
            return stateful
    raise TypeError(
        f"use_stateful_dataloader=True needs a stateful variant of the class, and {cls.__name__} has none: derive from one "
        f"of {', '.join(stateful.__name__ for stateful in variants.values())} ({_STATEFUL})."
    )


@functools.cache
def _only_cpu() -> bool:
    return not any(kind.name != "cpu" and kind.is_available() for kind in devices.DEVICES.values())


def make_transfer_fn(device: torch.device | None, non_blocking: bool) -> Callable[[Any], Any] | None:
    """Returns a function that moves a batch to a device; None if there is no need (no device, or a CPU-only machine)."""
    if device is None or (device.type == "cpu" and _only_cpu()):
        return None
    return functools.partial(send_to_device, device=device, non_blocking=non_blocking)
