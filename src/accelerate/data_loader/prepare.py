"""`prepare_data_loader`, under its documented signature: a plan, built. And what can be changed on its result."""

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
from .mesh import data_ranks_of_mesh
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
    """Makes a loader that gives this process its part of the data.

    Args:
        dataloader: A plain loader. A prepared one is given back as it is.
        device: Where batches go, with `put_on_device`; None: this process's device.
        num_processes: How many parts there are; None: the run's, or those of `torch_device_mesh`.
        process_index: Which part is this process's; None likewise.
        split_batches: The loader's batch is that of all processes together, each taking its part; else each process
            takes whole batches, and the batch of all is `num_processes` times as large.
        put_on_device: Move batches to `device`.
        rng_types: Which random states to take over from rank 0 at the start of each epoch: ``"generator"`` (that of the
            sampler, batch sampler or iterable dataset), ``"torch"``, ``"cuda"``, ``"xpu"``, ``"xla"`` …; None: none.
        dispatch_batches: Rank 0 reads and sends the others their parts. None: for iterable datasets, with
            `put_on_device`.
        even_batches: Where the data do not divide evenly, repeat samples from the start, so that every process gets as
            many batches of one size. False: the last ones get less.
        slice_fn_for_dispatch: How a dispatcher cuts a batch: called as
            ``fn(batch, slice, process_index=…, num_processes=…)``.
        use_seedable_sampler: Shuffle by seed and epoch alone (`SeedableRandomSampler`).
        data_seed: The seed of that; None: torch's default seed.
        non_blocking: Move without waiting.
        use_stateful_dataloader: Build on torchdata's `StatefulDataLoader`, which can save its position.
        torch_device_mesh: A device mesh. Processes that differ only in dimensions other than ``dp_replicate`` and
            ``dp_shard`` get the same data.

    Returns:
        A `DataLoaderShard` or `DataLoaderDispatcher`.

    Raises:
        TypeError: when `dataloader` is no torch `DataLoader`.
        ValueError: when loader and arguments do not go together: a batch size that is no multiple of `num_processes`
            (or none at all) with `split_batches`, `dispatch_batches` without `put_on_device`, a prepared loader and
            other arguments than it was prepared with.

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
    """Within the block, the prepared loaders' `even_batches` is another; iterations that begin in it go by it.

    Args:
        loaders: Prepared loaders.
        even_batches: The value; None leaves it.
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
                "even_batches cannot be overridden for a loader whose data rank 0 gives out, and for one of an iterable "
                "dataset that several workers read, or shards of which each rank reads; it stays as it was."
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
        return data_ranks_of_mesh(mesh)
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
        told = ", ".join(f"{name}={value!r} (it has {has!r})" for name, (value, has) in other.items())
        raise ValueError(
            f"this loader is prepared already, and now asked for {told}. Prepare the original loader instead."
        )
