"""`prepare_data_loader`, which plans and builds a loader under its documented signature, and `override_even_batches`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from ..runtime.world import DataShard
from ..settings.enums import RNGType
from ..settings.handlers import DataLoaderConfiguration
from ..state import PartialState
from .base import DataLoaderAdapter
from .build import build_loader, logger
from .dispatch import DataLoaderDispatcher
from .iterable import IterableDatasetShard
from .mesh import data_shard_of_mesh
from .plan import ReadMode, plan_data
from .sampling.samplers import BatchSamplerShard, SamplerShard, index_sampler, sampler_chain
from .shard import DataLoaderShard
from .stream_shards import supports_lockstep

_T = TypeVar("_T")


def prepare_data_loader(
    dataloader: DataLoader[_T],
    device: torch.device | str | int | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    split_batches: bool = False,
    put_on_device: bool = False,
    rng_types: list[str | RNGType] | None = None,
    dispatch_batches: bool | None = None,
    even_batches: bool = True,
    slice_fn_for_dispatch: Callable[..., Any] | None = None,
    use_seedable_sampler: bool = False,
    data_seed: int | None = None,
    non_blocking: bool = False,
    use_stateful_dataloader: bool = False,
    torch_device_mesh: Any = None,
) -> DataLoader[_T]:
    """Builds a loader that yields this process's shard of the data.

    Args:
        dataloader: A plain loader. A prepared one is returned unchanged.
        device: Where batches go, with `put_on_device`; None: this process's device.
        num_processes: Number of shards; None: the number of processes, or that of `torch_device_mesh`.
        process_index: Index of this process's shard; None likewise.
        split_batches: The loader's batch is the batch of all processes together, of which each takes a shard. Else each
            process takes whole batches, and the global batch is `num_processes` times as large.
        put_on_device: Move batches to `device`.
        rng_types: Random states to copy from rank 0 at the start of each epoch: ``"generator"`` (that of the sampler,
            batch sampler or iterable dataset), ``"torch"``, ``"cuda"``, ``"xpu"``, ``"xla"`` …; None: none.
        dispatch_batches: Rank 0 reads, and sends each rank its shard. None: for iterable datasets, with
            `put_on_device`.
        even_batches: If the data does not divide evenly, repeat samples from the start, so that all processes get the
            same number of batches of equal size. False: the last processes get fewer samples.
        slice_fn_for_dispatch: Slices a batch in a dispatcher: called as
            ``fn(batch, slice, process_index=…, num_processes=…)``.
        use_seedable_sampler: Shuffle by seed and epoch only (`SeedableRandomSampler`).
        data_seed: Seed of that sampler; None: torch's default seed.
        non_blocking: Copy to the device asynchronously.
        use_stateful_dataloader: Build on torchdata's `StatefulDataLoader`, which can save its position.
        torch_device_mesh: A device mesh. Processes that differ only in dimensions other than ``dp_replicate`` and
            ``dp_shard`` get the same data.

    Returns:
        A `DataLoaderShard` or `DataLoaderDispatcher`.

    Raises:
        TypeError: If `dataloader` is not a torch `DataLoader`.
        ValueError: If loader and arguments are incompatible: a batch size that is not a multiple of `num_processes` (or
            no batch size) with `split_batches`, `dispatch_batches` without `put_on_device`, or a loader that was
            prepared with other arguments.

    Example:
        ```python
        loader = prepare_data_loader(DataLoader(dataset, batch_size=16, shuffle=True), put_on_device=True)
        ```
    """
    if isinstance(dataloader, (DataLoaderShard, DataLoaderDispatcher)):
        _check_prepared(dataloader, num_processes, process_index, split_batches, dispatch_batches)
        return dataloader
    config = DataLoaderConfiguration(
        split_batches=split_batches,
        dispatch_batches=dispatch_batches,
        even_batches=even_batches,
        use_seedable_sampler=use_seedable_sampler,
        data_seed=data_seed,
        non_blocking=non_blocking,
        use_stateful_dataloader=use_stateful_dataloader,
    )
    ranks = _ranks(num_processes, process_index, torch_device_mesh)
    plan = plan_data(
        dataloader,
        config,
        ranks,
        put_on_device=put_on_device,
        rng_types=rng_types,
        slice_fn=slice_fn_for_dispatch,
        lockstep=supports_lockstep(ranks),
    )
    return build_loader(plan, device, torch_device_mesh)


@contextmanager
def override_even_batches(loaders: Iterable[Any], even_batches: bool | None) -> Iterator[None]:
    """Context manager that overrides `even_batches` of prepared loaders, for iterations that start inside it.

    Args:
        loaders: Prepared loaders.
        even_batches: The value; None changes nothing.
    """
    changed: list[tuple[Any, bool]] = []
    for loader in loaders if even_batches is not None else ():
        parts: list[Any] = [
            link for link in sampler_chain(index_sampler(loader)) if isinstance(link, (BatchSamplerShard, SamplerShard))
        ]
        if isinstance(loader.dataset, IterableDatasetShard) and loader.num_workers < 2:
            parts.append(loader.dataset)
        if not parts and loader._plan is not None and loader._plan.read_mode is not ReadMode.WHOLE:
            logger.warning_once(
                "even_batches cannot be overridden for a loader that rank 0 dispatches, nor for an iterable dataset that "
                "several workers read or that is read by shards of each rank; it stays unchanged."
            )
        changed += [(part, part.even_batches) for part in parts]
    try:
        for part, _ in changed:
            part.even_batches = even_batches
        yield
    finally:
        for part, before in changed:
            part.even_batches = before


def _ranks(num_processes: int | None, process_index: int | None, mesh: Any) -> DataShard:
    if mesh is not None and num_processes is None and process_index is None:
        return data_shard_of_mesh(mesh)
    state = PartialState()
    return DataShard(
        state.process_index if process_index is None else process_index,
        state.num_processes if num_processes is None else num_processes,
    )


def _check_prepared(
    loader: DataLoaderAdapter,
    num_processes: int | None,
    process_index: int | None,
    split_batches: bool,
    dispatch_batches: bool | None,
) -> None:
    plan = loader._plan
    if plan is None:
        return
    asked = {
        "num_processes": (num_processes, plan.ranks.count),
        "process_index": (process_index, plan.ranks.index),
        "split_batches": (split_batches or None, plan.split_batches),
        "dispatch_batches": (dispatch_batches, plan.read_mode is ReadMode.DISPATCH),
    }
    other = {name: pair for name, pair in asked.items() if pair[0] is not None and pair[0] != pair[1]}
    if other:
        differing = ", ".join(f"{name}={value!r} (it has {has!r})" for name, (value, has) in other.items())
        raise ValueError(
            f"this loader was prepared with other arguments than {differing}. Prepare the original loader."
        )
