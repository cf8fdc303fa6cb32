"""`skip_first_batches`: resumes an epoch at a later batch."""

from __future__ import annotations

import copy
import operator
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from .base import DataLoaderAdapter
from .dispatch import DataLoaderDispatcher
from .plan import forwarded_arguments
from .sampling.samplers import SkipBatchSampler, index_sampler
from .shard import SkipDataLoader

_T = TypeVar("_T")


def skip_first_batches(dataloader: DataLoader[_T], num_batches: int = 0) -> DataLoader[_T]:
    """Returns a copy of a loader that skips its first batches.

    The original loader is unchanged: iterate over the result for the rest of an interrupted epoch, then over the
    original, which continues with the next epoch. Skipped batches of a map-style dataset are not fetched; those of an
    iterable dataset have to be read.

    Args:
        dataloader: A plain or prepared loader.
        num_batches: Number of batches of this process to skip (of a prepared loader: steps).

    Returns:
        For a plain loader over an iterable dataset a `SkipDataLoader`; else a loader of the same class.

    Raises:
        TypeError: If `num_batches` is not an integer, or `dataloader` not a torch `DataLoader`.
        ValueError: If `num_batches` is negative.

    Example:
        ```python
        for batch in skip_first_batches(loader, 100):  # the rest of this epoch
            ...
        ```
    """
    count = _check_num_batches(dataloader, num_batches)
    if count == 0:
        return dataloader
    if isinstance(dataloader, DataLoaderAdapter):
        later = copy.copy(dataloader)
        later._origin = dataloader
        later._epochs_seen = dataloader._epochs_seen  # both use the same samplers and dataset
        if later.is_iterable or isinstance(later, DataLoaderDispatcher):
            later.skip_batches += count
            return later
    elif index_sampler(dataloader) is None:
        stateful = hasattr(dataloader, "snapshot_every_n_steps")
        return SkipDataLoader(
            dataloader.dataset,
            skip_batches=count,
            use_stateful_dataloader=stateful,
            batch_size=dataloader.batch_size,
            drop_last=dataloader.drop_last,
            **dict(forwarded_arguments(dataloader, stateful)),
        )
    else:
        later = copy.copy(dataloader)  # type: ignore[assignment]
        later._iterator = None
    # torch rejects assignment to a loader's sampler; this is a new copy, which has no iterator yet.
    attribute = "sampler" if later.batch_sampler is None else "batch_sampler"
    later.__dict__[attribute] = SkipBatchSampler(index_sampler(later), count)
    return later


def _check_num_batches(dataloader: Any, num_batches: Any) -> int:
    if not isinstance(dataloader, DataLoader):
        raise TypeError(f"expected a torch.utils.data.DataLoader, got {type(dataloader).__name__}.")
    try:
        count = operator.index(num_batches)
    except TypeError:
        raise TypeError(
            f"num_batches is the number of batches to skip, an integer; got {num_batches!r} ({type(num_batches).__name__})."
        ) from None
    if count < 0:
        raise ValueError(f"num_batches is the number of batches to skip and cannot be negative; got {count}.")
    return count
