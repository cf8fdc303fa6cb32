"""Data loaders that yield each rank's shard of the data on its device, and identify their last batch.

`plan_data` decides how a loader is sharded, `build_loader` builds the loader; `prepare_data_loader` does both.
`DataLoaderStateMixin` documents the state of a loop, from which `gather_for_metrics` drops repeated samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runtime.system.lazy import lazy_exports

if TYPE_CHECKING:
    from .base import DataLoaderAdapter
    from .batches.batch_broadcast import CannotDispatchError, ReadingRankError
    from .batches.batch_sharding import StepSizes
    from .build import build_loader, logger
    from .dispatch import DataLoaderDispatcher
    from .gathering import gather_for_metrics, gather_items, gather_rows
    from .iterable import IterableDatasetShard
    from .loop_state import DataLoaderStateMixin
    from .mesh import data_shard_of_mesh
    from .plan import DataPlan, DatasetKind, ReadMode, Shuffle, plan_data
    from .prepare import override_even_batches, prepare_data_loader
    from .sampling.samplers import BatchSamplerShard, SeedableRandomSampler, SkipBatchSampler, get_sampler
    from .shard import DataLoaderShard, SkipDataLoader
    from .skip import skip_first_batches
    from .xla import MpDeviceLoaderWrapper as MpDeviceLoaderWrapper  # needs torch_xla

__all__ = [
    "BatchSamplerShard",
    "CannotDispatchError",
    "DataLoaderAdapter",
    "DataLoaderDispatcher",
    "DataLoaderShard",
    "DataLoaderStateMixin",
    "DataPlan",
    "DatasetKind",
    "IterableDatasetShard",
    "ReadMode",
    "ReadingRankError",
    "SeedableRandomSampler",
    "Shuffle",
    "SkipBatchSampler",
    "SkipDataLoader",
    "StepSizes",
    "build_loader",
    "data_shard_of_mesh",
    "gather_for_metrics",
    "gather_items",
    "gather_rows",
    "get_sampler",
    "logger",
    "override_even_batches",
    "plan_data",
    "prepare_data_loader",
    "skip_first_batches",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "BatchSamplerShard": "sampling.samplers",
        "build_loader": "build",
        "CannotDispatchError": "batches.batch_broadcast",
        "data_shard_of_mesh": "mesh",
        "DataLoaderAdapter": "base",
        "DataLoaderDispatcher": "dispatch",
        "DataLoaderShard": "shard",
        "DataLoaderStateMixin": "loop_state",
        "DataPlan": "plan",
        "DatasetKind": "plan",
        "gather_for_metrics": "gathering",
        "gather_items": "gathering",
        "gather_rows": "gathering",
        "get_sampler": "sampling.samplers",
        "IterableDatasetShard": "iterable",
        "logger": "build",
        "MpDeviceLoaderWrapper": "xla",
        "override_even_batches": "prepare",
        "plan_data": "plan",
        "prepare_data_loader": "prepare",
        "ReadingRankError": "batches.batch_broadcast",
        "ReadMode": "plan",
        "SeedableRandomSampler": "sampling.samplers",
        "Shuffle": "plan",
        "skip_first_batches": "skip",
        "SkipBatchSampler": "sampling.samplers",
        "SkipDataLoader": "shard",
        "StepSizes": "batches.batch_sharding",
    },
)
