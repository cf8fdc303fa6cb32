"""`build_loader` builds the loader that a `DataPlan` describes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from ..logging import get_logger
from ..runtime.devices import with_index
from ..state import PartialState
from .base import DataLoaderAdapter
from .dispatch import DataLoaderDispatcher
from .iterable import IterableDatasetShard, StreamShard
from .plan import RANDOM_SAMPLERS, DataPlan, DatasetKind, ReadMode, Shuffle
from .sampling.samplers import (
    BatchSamplerShard,
    SamplerShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    get_sampler,
    index_sampler,
    sampler_chain,
)
from .sampling.seeding import SampleSeeds
from .shard import DataLoaderShard

logger = get_logger(__name__)


def build_loader(
    plan: DataPlan, device: torch.device | str | int | None = None, torch_device_mesh: Any = None
) -> DataLoader[Any]:
    """Builds the loader that a plan describes.

    Args:
        plan: The plan.
        device: Where batches go, if they are moved; None: this process's device.
        torch_device_mesh: Stored on the loader.

    Returns:
        A `DataLoaderShard` or `DataLoaderDispatcher` (on XLA inside a wrapper that feeds the device). The original
        loader stays usable; the sampler inside a custom batch sampler may have been given a generator.
    """
    target = PartialState().device if device is None else with_index(device)
    for warning in plan.warnings:
        logger.warning_once(warning)
    on_xla = plan.put_on_device and target.type == "xla"
    iterable = plan.dataset_kind is DatasetKind.ITERABLE
    data, generator = _iterable_arguments(plan) if iterable else _map_style_arguments(plan)
    common: dict[str, Any] = {
        **dict(plan.arguments),
        **data,
        "use_stateful_dataloader": plan.stateful,
        "_drop_last": plan.drop_last,
        "_non_blocking": plan.non_blocking,
        "torch_device_mesh": torch_device_mesh,
    }
    prepared: DataLoaderAdapter
    if plan.read_mode is ReadMode.DISPATCH:
        prepared = DataLoaderDispatcher(split_batches=plan.split_batches, slice_fn=plan.slice_fn, **common)
        prepared._device = target
        prepared.synchronized_generator = generator
    else:
        prepared = DataLoaderShard(
            device=target if plan.put_on_device and not on_xla else None,
            rng_types=plan.rng_types,
            synchronized_generator=generator,
            **common,
        )
    prepared._reseeds = plan.shuffle is Shuffle.GENERATOR
    prepared._sample_seeds = SampleSeeds(plan.data_seed) if plan.seed_samples else None
    prepared._plan = plan
    if not iterable:
        _copy_loader_attributes(plan.loader, prepared)
    if on_xla and isinstance(prepared, DataLoaderShard):
        from .xla import MpDeviceLoaderWrapper

        return MpDeviceLoaderWrapper(prepared, target)
    return prepared


def _copy_loader_attributes(loader: DataLoader[Any], prepared: DataLoaderAdapter) -> None:
    # torch drops these when a loader has a batch sampler, and rejects plain assignment.
    prepared.__dict__["batch_size"] = loader.batch_size
    prepared.__dict__["drop_last"] = loader.drop_last
    if loader.batch_sampler is not None:
        prepared.__dict__["sampler"] = get_sampler(prepared)


def _iterable_arguments(plan: DataPlan) -> tuple[dict[str, Any], torch.Generator | None]:
    dataset: Any = plan.loader.dataset
    generator = getattr(dataset, "generator", None)
    size = plan.loader.batch_size
    if plan.read_mode is ReadMode.SHARD:
        shard = IterableDatasetShard(
            dataset,
            batch_size=1 if size is None else size,
            drop_last=plan.drop_last,
            num_processes=plan.ranks.count,
            process_index=plan.ranks.index,
            split_batches=plan.split_batches,
            even_batches=plan.even_batches,
        )
        shard.items_are_batches = size is None
        shard.marks_padding = True
        dataset = shard
    elif plan.read_mode is ReadMode.OWN_SHARDS:
        assert plan.batch_size is not None
        dataset = StreamShard(dataset, plan.batch_size, plan.ranks)
    arguments = {
        "dataset": dataset,
        "batch_size": size if plan.read_mode is ReadMode.DISPATCH else plan.batch_size,
        "drop_last": plan.loader.drop_last,
    }
    return arguments, generator if isinstance(generator, torch.Generator) else None


def _map_style_arguments(plan: DataPlan) -> tuple[dict[str, Any], torch.Generator | None]:
    top = _ordered_sampler(plan)
    generators = (getattr(link, "generator", None) for link in reversed(sampler_chain(top)))
    generator = next((found for found in generators if isinstance(found, torch.Generator)), None)
    if plan.read_mode is ReadMode.SHARD:
        shard = (plan.ranks.count, plan.ranks.index)
        if plan.dataset_kind is DatasetKind.MAP_UNBATCHED:
            top = SamplerShard(top, *shard, even_batches=plan.even_batches)
        else:
            top = BatchSamplerShard(top, *shard, split_batches=plan.split_batches, even_batches=plan.even_batches)
    arguments: dict[str, Any] = {"dataset": plan.loader.dataset}
    if plan.loader.batch_sampler is not None:
        arguments["batch_sampler"] = top
    else:
        arguments.update(sampler=top, batch_size=None)
    return arguments, generator


def _ordered_sampler(plan: DataPlan) -> Any:
    """Returns the loader's outermost sampler, with the innermost one replaced as the plan requires."""
    top = index_sampler(plan.loader)
    *outer, sampler = sampler_chain(top)
    if plan.shuffle is Shuffle.UNCHANGED:
        return top
    if plan.shuffle is Shuffle.SEEDABLE:
        replacement: Any = SeedableRandomSampler(
            sampler.data_source,
            replacement=sampler.replacement,
            num_samples=sampler._num_samples,
            data_seed=plan.data_seed,
        )
    elif type(sampler) in RANDOM_SAMPLERS:
        replacement = copy.copy(sampler)
        replacement.generator = torch.Generator()
    else:
        sampler.generator = torch.Generator()
        return top
    if all(type(link) in (BatchSampler, SkipBatchSampler) for link in outer):
        return _replace_innermost(top, sampler, replacement)
    outer[-1].sampler = replacement  # a custom batch sampler: the user may hold a reference to it
    return top


def _replace_innermost(top: Any, old: Any, new: Any) -> Any:
    """Returns a copy of a chain of samplers with `new` in place of `old`; the originals belong to the user's loader."""
    if top is old:
        return new
    outer = copy.copy(top)
    name = "batch_sampler" if getattr(top, "batch_sampler", None) is not None else "sampler"
    setattr(outer, name, _replace_innermost(getattr(top, name), old, new))
    return outer
