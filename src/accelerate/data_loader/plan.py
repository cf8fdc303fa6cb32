"""Who reads what: `plan_data` looks at a loader and the settings and touches nothing; `DataPlan.build` makes the
loader.

A plan is a value: print it, compare it, test it without starting a process.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..logging import get_logger
from ..runtime.devices import with_index
from ..runtime.world import DataRanks
from ..settings.enums import RNGType
from ..settings.handlers import DataLoaderConfiguration
from ..state import PartialState
from .base import DataLoaderAdapter
from .dispatch import DataLoaderDispatcher
from .iterable import IterableDatasetShard, StreamShard
from .sampling.samplers import (
    BatchSamplerShard,
    SamplerShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    chain_from,
    check_split,
    drawn_from,
    get_sampler,
)
from .sampling.seeding import SampleSeeds
from .shard import DataLoaderShard, SkipDataLoader
from .stream_shards import has_shards

logger = get_logger(__name__)

KEPT_ARGUMENTS: tuple[str, ...] = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
    "snapshot_every_n_steps",
)
"""Arguments of torch's loader that a prepared one takes over."""


class Reading(Enum):
    """How this rank comes by its data."""

    WHOLE = "whole"
    """It reads everything: there is one part."""
    SHARD = "shard"
    """It reads its own part."""
    OWN_SHARDS = "own shards"
    """It reads shards of an iterable dataset that no other rank reads."""
    DISPATCH = "dispatch"
    """Rank 0 reads and sends."""


class Source(Enum):
    """What the loader takes its data from."""

    BATCHES = "batches"
    """A map-style dataset, by batches of indices."""
    ITEMS = "items"
    """A map-style dataset, each item of which is a batch (``batch_size=None``)."""
    STREAM = "stream"
    """An iterable dataset."""


class Shuffle(Enum):
    """Where the order comes from."""

    KEPT = "kept"
    """The loader's sampler as it is."""
    SEEDABLE = "seedable"
    """A `SeedableRandomSampler` in the place of the `RandomSampler`."""
    GENERATOR = "generator"
    """The loader's sampler, drawing from a generator of its own that can be synchronised and saved."""


@dataclass(frozen=True)
class DataPlan:
    """How one loader is to be prepared. A value: it can be printed and compared; nothing happens before `build`.

    Attributes:
        reading: How this rank comes by its data.
        source: What the loader takes its data from.
        ranks: Which part of how many is this rank's.
        batch_size: Samples in this rank's full batch; None where batches have no fixed size.
        total_batch_size: The same over all ranks.
        drop_last: An incomplete last batch is left out.
        split_batches, even_batches: As in `DataLoaderConfiguration`.
        shuffle: Where the order comes from.
        data_seed: The seed of a `SeedableRandomSampler` and of `seed_samples`; None: torch's default seed.
        rng_types: Random states to take over from rank 0 at the start of each epoch.
        put_on_device: Move batches to the device.
        non_blocking, stateful: As in `DataLoaderConfiguration`.
        seed_samples: Random numbers drawn while a sample is read are a function of seed, epoch and index.
        slice_fn: How a dispatcher cuts batches; None: by rows.
        arguments: Arguments of torch's loader that are taken over.
        notes: What the user should know of it; `build` logs them.
        loader: The loader that was planned for.
    """

    reading: Reading
    source: Source
    ranks: DataRanks
    batch_size: int | None
    total_batch_size: int | None
    drop_last: bool
    split_batches: bool
    even_batches: bool
    shuffle: Shuffle
    data_seed: int | None
    rng_types: tuple[RNGType, ...]
    put_on_device: bool
    non_blocking: bool
    stateful: bool
    seed_samples: bool
    slice_fn: Callable[..., Any] | None
    arguments: tuple[tuple[str, Any], ...]
    notes: tuple[str, ...]
    loader: DataLoader[Any] = field(repr=False, compare=False)

    def build(self, device: torch.device | str | int | None = None, torch_device_mesh: Any = None) -> DataLoader[Any]:
        """Makes the loader.

        Args:
            device: Where batches go, if they are to be moved; None: this process's device.
            torch_device_mesh: Kept on the loader.

        Returns:
            A `DataLoaderShard` or `DataLoaderDispatcher` (on XLA inside a wrapper that feeds the device). The loader
            that was planned for stays usable; a custom batch sampler's sampler may have been given a generator.
        """
        state = PartialState()
        target = state.device if device is None else with_index(device)
        for note in self.notes:
            logger.warning_once(note)
        on_xla = self.put_on_device and target.type == "xla"
        data, generator = self._stream() if self.source is Source.STREAM else self._samples()
        common: dict[str, Any] = {
            **dict(self.arguments),
            **data,
            "use_stateful_dataloader": self.stateful,
            "_drop_last": self.drop_last,
            "_non_blocking": self.non_blocking,
            "torch_device_mesh": torch_device_mesh,
        }
        prepared: DataLoaderAdapter
        if self.reading is Reading.DISPATCH:
            prepared = DataLoaderDispatcher(split_batches=self.split_batches, slice_fn=self.slice_fn, **common)
            prepared._device = target
            prepared.synchronized_generator = generator
        else:
            moves_to = target if self.put_on_device and not on_xla else None
            prepared = DataLoaderShard(
                device=moves_to, rng_types=self.rng_types, synchronized_generator=generator, **common
            )
        prepared._reseeds = self.shuffle is Shuffle.GENERATOR
        prepared._sample_seeds = SampleSeeds(self.data_seed) if self.seed_samples else None
        prepared._plan = self
        if self.source is not Source.STREAM:
            self._answer_like_original(prepared)
        if on_xla and isinstance(prepared, DataLoaderShard):
            from .xla import MpDeviceLoaderWrapper

            return MpDeviceLoaderWrapper(prepared, target)
        return prepared

    def _answer_like_original(self, prepared: DataLoaderAdapter) -> None:
        # torch forgets these when it is given a batch sampler, and refuses the plain assignment.
        prepared.__dict__["batch_size"] = self.loader.batch_size
        prepared.__dict__["drop_last"] = self.loader.drop_last
        if self.loader.batch_sampler is not None:
            prepared.__dict__["sampler"] = get_sampler(prepared)

    def _stream(self) -> tuple[dict[str, Any], torch.Generator | None]:
        dataset: Any = self.loader.dataset
        generator = getattr(dataset, "generator", None)
        if self.reading is Reading.SHARD:
            size = self.loader.batch_size
            shard = IterableDatasetShard(
                dataset,
                batch_size=1 if size is None else size,
                drop_last=self.drop_last,
                num_processes=self.ranks.count,
                process_index=self.ranks.index,
                split_batches=self.split_batches,
                even_batches=self.even_batches,
            )
            shard.items_are_batches = size is None
            shard.marks_rounds = True
            dataset = shard
        elif self.reading is Reading.OWN_SHARDS:
            assert self.batch_size is not None
            dataset = StreamShard(dataset, self.batch_size, self.ranks)
        size = self.loader.batch_size if self.reading is Reading.DISPATCH else self.batch_size
        arguments = {"dataset": dataset, "batch_size": size, "drop_last": self.loader.drop_last}
        return arguments, generator if isinstance(generator, torch.Generator) else None

    def _samples(self) -> tuple[dict[str, Any], torch.Generator | None]:
        top = self._ordered(drawn_from(self.loader))
        generators = (getattr(link, "generator", None) for link in reversed(chain_from(top)))
        generator = next((found for found in generators if isinstance(found, torch.Generator)), None)
        if self.reading is Reading.SHARD:
            part = (self.ranks.count, self.ranks.index)
            if self.source is Source.ITEMS:
                top = SamplerShard(top, *part, even_batches=self.even_batches)
            else:
                top = BatchSamplerShard(top, *part, split_batches=self.split_batches, even_batches=self.even_batches)
        arguments: dict[str, Any] = {"dataset": self.loader.dataset}
        if self.loader.batch_sampler is not None:
            arguments["batch_sampler"] = top
        else:
            arguments.update(sampler=top, batch_size=None)
        return arguments, generator

    def _ordered(self, top: Any) -> Any:
        """The samplers of the loader, with the innermost replaced where the plan says so."""
        *outer, sampler = chain_from(top)
        if self.shuffle is Shuffle.KEPT:
            return top
        if self.shuffle is Shuffle.SEEDABLE:
            order: Any = SeedableRandomSampler(
                sampler.data_source,
                replacement=sampler.replacement,
                num_samples=sampler._num_samples,
                data_seed=self.data_seed,
            )
        elif type(sampler) in _DRAWING:
            order = copy.copy(sampler)
            order.generator = torch.Generator()
        else:
            sampler.generator = torch.Generator()
            return top
        if all(type(link) in (BatchSampler, SkipBatchSampler) for link in outer):
            return _with_innermost(top, sampler, order)
        outer[-1].sampler = order  # a batch sampler of the user's, who may hold on to it
        return top


_DRAWING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def _with_innermost(top: Any, old: Any, new: Any) -> Any:
    """Copies of the samplers around `old`, around `new`; the originals belong to the user's loader."""
    if top is old:
        return new
    outer = copy.copy(top)
    name = "batch_sampler" if getattr(top, "batch_sampler", None) is not None else "sampler"
    setattr(outer, name, _with_innermost(getattr(top, name), old, new))
    return outer


_EVENED = (
    "even_batches=False is not possible for an iterable dataset that several workers read on each rank, because their "
    "streams end one by one: samples are repeated to complete the workers' last batches. gather_for_metrics leaves the "
    "repeated ones out."
)
_OUT_OF_ORDER = (
    "with in_order=False and several workers, batches come in another order on each process: gather_for_metrics cannot "
    "tell then which samples were repeated. Use in_order=True for evaluation."
)
_DIVIDED_TWICE = (
    "this loader has a DistributedSampler, which gives each process its part of the data, and preparing it divides that "
    "part once more, so that most samples are seen by no process. Leave the DistributedSampler out (shuffle=True is "
    "enough), or do not prepare the loader."
)


# Planning -----------------------------------------------------------------------------------------------------------


def plan_data(
    loader: DataLoader[Any],
    config: DataLoaderConfiguration,
    ranks: DataRanks,
    *,
    put_on_device: bool = True,
    rng_types: Iterable[str | RNGType] | None = ("generator",),
    slice_fn: Callable[..., Any] | None = None,
    can_agree: bool = False,
) -> DataPlan:
    """Decides who reads what. Looks only: nothing is drawn, fetched or changed.

    Args:
        loader: A plain loader.
        config: The settings.
        ranks: Which part of how many is this rank's.
        put_on_device: Move batches to the device.
        rng_types: Random states to take over from rank 0 at the start of each epoch.
        slice_fn: How a dispatcher cuts batches; None: by rows.
        can_agree: The ranks can communicate at each step (`stream_shards.can_agree`).

    Raises:
        TypeError: when `loader` is no torch `DataLoader`.
        ValueError: when loader and settings do not go together; the message says what to change.
    """
    _check(loader, ranks)
    source = _source_of(loader)
    dispatches = config.dispatch_batches
    if dispatches is None:
        dispatches = put_on_device and source is Source.STREAM and ranks.count > 1
    if dispatches and not put_on_device:
        raise ValueError(
            "dispatch_batches=True sends batches from rank 0's device to the others', so put_on_device=True is needed "
            "(Accelerator: device_placement=True). Allow it, or use dispatch_batches=False."
        )
    reading = Reading.DISPATCH if dispatches else Reading.SHARD if ranks.count > 1 else Reading.WHOLE
    if reading is Reading.SHARD and can_agree and _reads_own_shards(loader, config, ranks):
        reading = Reading.OWN_SHARDS
    size: int | None = loader.batch_size if source is Source.STREAM else getattr(drawn_from(loader), "batch_size", None)
    if config.split_batches and ranks.count > 1:
        check_split(size, ranks.count)
    notes = _notes(loader, reading, source, config)
    splits = config.split_batches
    stateful = config.use_stateful_dataloader or hasattr(loader, "snapshot_every_n_steps")
    return DataPlan(
        reading=reading,
        source=source,
        ranks=ranks,
        batch_size=size if size is None or not splits else size // ranks.count,
        total_batch_size=size if size is None or splits else size * ranks.count,
        drop_last=_drops_last(loader),
        split_batches=splits,
        even_batches=config.even_batches or _EVENED in notes,
        shuffle=_shuffle_of(loader, config.use_seedable_sampler, own=stateful or reading is Reading.SHARD),
        data_seed=config.data_seed,
        rng_types=tuple(map(RNGType, rng_types or ())),
        put_on_device=put_on_device,
        non_blocking=config.non_blocking,
        stateful=stateful,
        seed_samples=stateful and source is not Source.STREAM and _seeds_samples(loader, config),
        slice_fn=slice_fn,
        arguments=kept_arguments(loader, stateful),
        notes=tuple(notes),
        loader=loader,
    )


def _check(loader: Any, ranks: DataRanks) -> None:
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"expected a torch.utils.data.DataLoader to prepare, got {type(loader).__name__}: {loader!r:.80}"
        )
    if not 0 <= ranks.index < ranks.count:
        raise ValueError(
            f"process_index={ranks.index} is no rank of num_processes={ranks.count}: ranks go from 0 to {ranks.count - 1}."
        )
    if isinstance(loader, SkipDataLoader):
        raise ValueError(
            "this loader already leaves out its first batches, which have been counted for one process. Prepare the full "
            "loader, and call skip_first_batches on the result."
        )


def _source_of(loader: DataLoader[Any]) -> Source:
    if isinstance(loader.dataset, IterableDataset):
        return Source.STREAM
    batches = loader.batch_sampler is not None or isinstance(loader.sampler, BatchSampler)
    return Source.BATCHES if batches else Source.ITEMS


def _reads_own_shards(loader: DataLoader[Any], config: DataLoaderConfiguration, ranks: DataRanks) -> bool:
    # Without even_batches, and with drop_last, one set of shards that ends early would end the run for all the others.
    if _source_of(loader) is not Source.STREAM or loader.batch_size is None:
        return False
    return config.even_batches and not loader.drop_last and has_shards(loader.dataset, ranks.count)


def _drops_last(loader: DataLoader[Any]) -> bool:
    return bool(loader.drop_last or getattr(drawn_from(loader), "drop_last", False))


def _shuffle_of(loader: DataLoader[Any], seedable: bool, own: bool) -> Shuffle:
    sampler = get_sampler(loader)
    if isinstance(sampler, RandomSampler) and seedable and not isinstance(sampler, SeedableRandomSampler):
        return Shuffle.SEEDABLE
    undetermined = isinstance(sampler, _DRAWING) and not isinstance(sampler, SeedableRandomSampler)
    return Shuffle.GENERATOR if undetermined and sampler.generator is None and own else Shuffle.KEPT


def _seeds_samples(loader: DataLoader[Any], config: DataLoaderConfiguration) -> bool:
    if config.seed_samples is not None:
        return config.seed_samples
    # In the training process it costs more, and random states are resumed there anyway.
    return config.use_seedable_sampler and loader.num_workers > 0


def kept_arguments(loader: DataLoader[Any], stateful: bool) -> tuple[tuple[str, Any], ...]:
    """Those of a loader's `KEPT_ARGUMENTS` that torch's loader takes here (torchdata's, for a stateful one)."""
    module = importlib.import_module("torchdata.stateful_dataloader") if stateful else None
    kind = DataLoader if module is None else module.StatefulDataLoader
    known = inspect.signature(kind.__init__).parameters  # in_order came with torch 2.6 and torchdata 0.11
    return tuple((name, getattr(loader, name)) for name in KEPT_ARGUMENTS if name in known and hasattr(loader, name))


def _notes(loader: DataLoader[Any], reading: Reading, source: Source, config: DataLoaderConfiguration) -> list[str]:
    notes: list[str] = []
    if reading is not Reading.SHARD:
        return notes
    # Several workers' streams end one by one.
    if source is Source.STREAM and not config.even_batches and loader.num_workers > 1:
        notes.append(_EVENED)
    if loader.num_workers > 1 and not getattr(loader, "in_order", True):
        notes.append(_OUT_OF_ORDER)
    sampler = get_sampler(loader)
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        notes.append(_DIVIDED_TWICE)
    return notes
