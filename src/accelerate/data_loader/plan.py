"""`plan_data` decides how a `DataLoader` is sharded: a pure function from a loader and settings to a `DataPlan`.

A plan is a value: it can be printed, compared and tested without starting a process. `build.build_loader` builds the
loader that it describes.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..runtime.world import DataShard
from ..settings.enums import RNGType
from ..settings.handlers import DataLoaderConfiguration
from .sampling.samplers import SeedableRandomSampler, check_split, get_sampler, index_sampler
from .stream_shards import has_shards

FORWARDED_ARGUMENTS: tuple[str, ...] = (
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
"""Arguments of torch's `DataLoader` that are passed on to the prepared one."""
RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
"""torch's samplers that draw from a generator."""


class ReadMode(Enum):
    """How a rank gets its data."""

    WHOLE = "whole"
    """It reads the whole dataset: there is a single shard."""
    SHARD = "shard"
    """It reads its own shard of the batches."""
    OWN_SHARDS = "own shards"
    """It reads shards of an iterable dataset that no other rank reads."""
    DISPATCH = "dispatch"
    """Rank 0 reads, and sends each rank its shard."""


class DatasetKind(Enum):
    """Kind of dataset, and whether the loader batches it."""

    MAP_BATCHED = "map-style, batched"
    """A map-style dataset, read by batches of indices."""
    MAP_UNBATCHED = "map-style, unbatched"
    """A map-style dataset each item of which is a batch (``batch_size=None``)."""
    ITERABLE = "iterable"
    """An iterable dataset."""


class Shuffle(Enum):
    """Where the order of samples comes from."""

    UNCHANGED = "unchanged"
    """The loader's own sampler."""
    SEEDABLE = "seedable"
    """A `SeedableRandomSampler` in place of the `RandomSampler`."""
    GENERATOR = "generator"
    """The loader's own sampler with a generator that can be synchronized and saved."""


@dataclass(frozen=True)
class DataPlan:
    """Describes how one loader is prepared.

    Attributes:
        read_mode: How this rank gets its data.
        dataset_kind: Kind of dataset.
        ranks: This rank's shard, and the number of shards.
        batch_size: Samples in a full batch of this rank; None if batches have no fixed size.
        total_batch_size: Samples in a full batch of all ranks together; None likewise.
        drop_last: Whether an incomplete last batch is dropped.
        split_batches, even_batches: As in `DataLoaderConfiguration`.
        shuffle: Where the order of samples comes from.
        data_seed: Seed of a `SeedableRandomSampler` and of `seed_samples`; None: torch's default seed.
        rng_types: Random states to copy from rank 0 at the start of each epoch.
        put_on_device: Whether batches are moved to the device.
        non_blocking, stateful: As in `DataLoaderConfiguration`.
        seed_samples: Whether random numbers drawn while reading a sample depend on seed, epoch and index only.
        slice_fn: Slices batches in a dispatcher; None slices rows.
        arguments: Arguments of torch's `DataLoader` to pass on.
        warnings: Messages for the user, logged when the loader is built.
        loader: The loader the plan was made for.
    """

    read_mode: ReadMode
    dataset_kind: DatasetKind
    ranks: DataShard
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
    warnings: tuple[str, ...]
    loader: DataLoader[Any] = field(repr=False, compare=False)


_EVEN_BATCHES_FORCED = (
    "even_batches=False is not possible for an iterable dataset that several workers read on each rank, because their "
    "streams end one by one: samples are repeated to complete the workers' last batches. gather_for_metrics drops the "
    "repeated ones."
)
_OUT_OF_ORDER = (
    "with in_order=False and several workers, the order of batches differs between processes, so gather_for_metrics "
    "cannot identify repeated samples. Use in_order=True for evaluation."
)
_SHARDED_TWICE = (
    "this loader has a DistributedSampler, which already gives each process a shard of the data, and preparing it shards "
    "that shard once more, so that most samples are read by no process. Remove the DistributedSampler (shuffle=True is "
    "enough), or do not prepare the loader."
)


def plan_data(
    loader: DataLoader[Any],
    config: DataLoaderConfiguration,
    ranks: DataShard,
    *,
    put_on_device: bool = True,
    rng_types: Iterable[str | RNGType] | None = ("generator",),
    slice_fn: Callable[..., Any] | None = None,
    lockstep: bool = False,
) -> DataPlan:
    """Decides which rank reads which samples of a loader, and how. Draws, fetches and changes nothing.

    Args:
        loader: A loader that has not been prepared.
        config: The settings.
        ranks: This rank's shard, and the number of shards.
        put_on_device: Move batches to the device.
        rng_types: Random states to copy from rank 0 at the start of each epoch.
        slice_fn: Slices batches in a dispatcher; None slices rows.
        lockstep: Whether the ranks can communicate at each step (`stream_shards.supports_lockstep`).

    Raises:
        TypeError: If `loader` is not a torch `DataLoader`.
        ValueError: If the loader and the settings are incompatible.
    """
    _check(loader, ranks)
    kind = _dataset_kind(loader)
    dispatches = config.dispatch_batches
    if dispatches is None:
        dispatches = put_on_device and kind is DatasetKind.ITERABLE and ranks.count > 1
    if dispatches and not put_on_device:
        raise ValueError(
            "dispatch_batches=True sends batches from rank 0's device to the others', so put_on_device=True is needed "
            "(Accelerator: device_placement=True). Allow it, or use dispatch_batches=False."
        )
    read_mode = ReadMode.DISPATCH if dispatches else ReadMode.SHARD if ranks.count > 1 else ReadMode.WHOLE
    if read_mode is ReadMode.SHARD and lockstep and _reads_own_shards(loader, config, ranks):
        read_mode = ReadMode.OWN_SHARDS
    iterable = kind is DatasetKind.ITERABLE
    size: int | None = loader.batch_size if iterable else getattr(index_sampler(loader), "batch_size", None)
    if config.split_batches and ranks.count > 1:
        check_split(size, ranks.count)
    warnings = _warnings(loader, read_mode, kind, config)
    splits = config.split_batches
    stateful = config.use_stateful_dataloader or hasattr(loader, "snapshot_every_n_steps")
    return DataPlan(
        read_mode=read_mode,
        dataset_kind=kind,
        ranks=ranks,
        batch_size=size if size is None or not splits else size // ranks.count,
        total_batch_size=size if size is None or splits else size * ranks.count,
        drop_last=_drops_last(loader),
        split_batches=splits,
        even_batches=config.even_batches or _EVEN_BATCHES_FORCED in warnings,
        shuffle=_shuffle(loader, config.use_seedable_sampler, own=stateful or read_mode is ReadMode.SHARD),
        data_seed=config.data_seed,
        rng_types=tuple(map(RNGType, rng_types or ())),
        put_on_device=put_on_device,
        non_blocking=config.non_blocking,
        stateful=stateful,
        seed_samples=stateful and not iterable and _seeds_samples(loader, config),
        slice_fn=slice_fn,
        arguments=forwarded_arguments(loader, stateful),
        warnings=tuple(warnings),
        loader=loader,
    )


def _check(loader: Any, ranks: DataShard) -> None:
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"expected a torch.utils.data.DataLoader to prepare, got {type(loader).__name__}: {loader!r:.80}"
        )
    if not 0 <= ranks.index < ranks.count:
        raise ValueError(
            f"process_index={ranks.index} is out of range for num_processes={ranks.count}: expected 0 to {ranks.count - 1}."
        )
    if getattr(loader, "skip_batches", 0):
        raise ValueError(
            "this loader skips its first batches, counted for a single process. Prepare the full loader, and call "
            "skip_first_batches on the result."
        )


def _dataset_kind(loader: DataLoader[Any]) -> DatasetKind:
    if isinstance(loader.dataset, IterableDataset):
        return DatasetKind.ITERABLE
    batched = loader.batch_sampler is not None or isinstance(loader.sampler, BatchSampler)
    return DatasetKind.MAP_BATCHED if batched else DatasetKind.MAP_UNBATCHED


def _reads_own_shards(loader: DataLoader[Any], config: DataLoaderConfiguration, ranks: DataShard) -> bool:
    # Without even_batches, and with drop_last, the first set of shards to end would end the epoch for all ranks.
    if not isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return False
    return config.even_batches and not loader.drop_last and has_shards(loader.dataset, ranks.count)


def _drops_last(loader: DataLoader[Any]) -> bool:
    return bool(loader.drop_last or getattr(index_sampler(loader), "drop_last", False))


def _shuffle(loader: DataLoader[Any], seedable: bool, own: bool) -> Shuffle:
    sampler = get_sampler(loader)
    if isinstance(sampler, SeedableRandomSampler) or not isinstance(sampler, RANDOM_SAMPLERS):
        return Shuffle.UNCHANGED
    if seedable and isinstance(sampler, RandomSampler):
        return Shuffle.SEEDABLE
    return Shuffle.GENERATOR if own and sampler.generator is None else Shuffle.UNCHANGED


def _seeds_samples(loader: DataLoader[Any], config: DataLoaderConfiguration) -> bool:
    if config.seed_samples is not None:
        return config.seed_samples
    # In the training process it would cost more, and random states are restored there anyway.
    return config.use_seedable_sampler and loader.num_workers > 0


def forwarded_arguments(loader: DataLoader[Any], stateful: bool) -> tuple[tuple[str, Any], ...]:
    """Returns names and values of the `FORWARDED_ARGUMENTS` that the installed torch (or torchdata) accepts."""
    module = importlib.import_module("torchdata.stateful_dataloader") if stateful else None
    cls = DataLoader if module is None else module.StatefulDataLoader
    accepted = inspect.signature(cls.__init__).parameters  # in_order: torch 2.6, torchdata 0.11
    names = (name for name in FORWARDED_ARGUMENTS if name in accepted and hasattr(loader, name))
    return tuple((name, getattr(loader, name)) for name in names)


def _warnings(
    loader: DataLoader[Any], read_mode: ReadMode, kind: DatasetKind, config: DataLoaderConfiguration
) -> list[str]:
    warnings: list[str] = []
    if read_mode is not ReadMode.SHARD:
        return warnings
    if kind is DatasetKind.ITERABLE and not config.even_batches and loader.num_workers > 1:
        warnings.append(_EVEN_BATCHES_FORCED)
    if loader.num_workers > 1 and not getattr(loader, "in_order", True):
        warnings.append(_OUT_OF_ORDER)
    sampler = get_sampler(loader)
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        warnings.append(_SHARDED_TWICE)
    return warnings
