"""`skip_first_batches`: the same loader from a later batch on."""

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
    """A loader like the one given that starts behind its first batches.

    The given loader stays whole: go through the result for the rest of an interrupted epoch, then back to the original,
    which goes on with the epoch after that. A map-style dataset's skipped batches are not fetched; a stream has to be
    read.

    Args:
        dataloader: A plain or prepared loader.
        num_batches: How many batches to leave out, counted as this process sees them (prepared loaders: steps).

    Returns:
        For a plain loader over an iterable dataset a `SkipDataLoader`; else a loader of the same class.

    Raises:
        TypeError: when `num_batches` is no integer, or `dataloader` no torch `DataLoader`.
        ValueError: when `num_batches` is negative.

    Example:
        ```python
        for batch in skip_first_batches(loader, 100):  # the rest of this epoch
            ...
        ```
    """
    count = _checked(dataloader, num_batches)
    if count == 0:
        return dataloader
    if isinstance(dataloader, DataLoaderAdapter):
        later = copy.copy(dataloader)
        later._origin = dataloader
        later._epochs_seen = dataloader._epochs_seen  # the same samplers and dataset, whichever of the two is used
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
    # torch refuses to exchange a loader's sampler; this is a copy that nobody has iterated over.
    place = "sampler" if later.batch_sampler is None else "batch_sampler"
    later.__dict__[place] = SkipBatchSampler(index_sampler(later), count)
    return later


def _checked(dataloader: Any, num_batches: Any) -> int:
    if not isinstance(dataloader, DataLoader):
        raise TypeError(f"expected a torch.utils.data.DataLoader, got {type(dataloader).__name__}.")
    try:
        count = operator.index(num_batches)
    except TypeError:
        raise TypeError(
            f"num_batches is how many batches to leave out, an integer; got {num_batches!r} "
            f"({type(num_batches).__name__})."
        ) from None
    if count < 0:
        raise ValueError(f"num_batches is how many batches to leave out and cannot be negative; got {count}.")
    return count
