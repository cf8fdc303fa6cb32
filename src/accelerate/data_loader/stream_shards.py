"""Iterable datasets made of shards, of which each rank reads its own; the ranks exchange the sizes of their batches.

No rank can see where the shards of other ranks end. So every rank pads its batches to full ones, reads two batches ahead,
and starts an asynchronous all-gather of the number of rows in a batch as soon as it has read it, one step before the
result is needed. A rank whose shards have ended repeats its first batch until all ranks have ended.
"""

from __future__ import annotations

import datetime
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..runtime import world
from ..runtime.collective_backend import Collectives, TorchCollectives
from ..runtime.cpu_groups import cpu_group
from ..runtime.world import DataShard
from .batches.batch_sharding import StepSizes
from .batches.batch_slicing import clone_batch
from .iterable import CountedBatch

_END = object()
_READ_TIMEOUT = datetime.timedelta(hours=2)
"""Timeout of a rank while others read a batch; a rank that has died is noticed at once."""
_FAILED = -1
"""Number of rows that a rank sends if reading failed."""
_ORDER_DEPENDENT = (
    "TakeExamplesIterable",
    "SkipExamplesIterable",
    "StepExamplesIterable",
    "CyclingMultiSourcesExamplesIterable",
    "RandomlyCyclingMultiSourcesExamplesIterable",
    "HorizontallyConcatenatedMultiSourcesExamplesIterable",
)
"""Operations of ``datasets`` that select samples by their position in the whole stream: on shards they select others."""


def has_shards(dataset: Any, count: int) -> bool:
    """Returns whether an iterable dataset can be divided into `count` sets of shards that hold the same samples.

    It must have a method ``shard(num_shards=…, index=…)``, a number of shards (``num_shards`` or ``n_shards``) and no
    length: the length of a loader must not depend on the distribution of samples over shards.
    """
    shards = getattr(dataset, "num_shards", getattr(dataset, "n_shards", None))
    shard = getattr(dataset, "shard", None)
    if not isinstance(shards, int) or shards < count or not callable(shard):
        return False
    if not {"num_shards", "index"} <= inspect.signature(shard).parameters.keys():
        return False
    return not hasattr(dataset, "__len__") and not any(name in _ORDER_DEPENDENT for name in _operations(dataset))


def _operations(dataset: Any) -> Iterator[str]:
    """Yields names of the operations in a dataset of ``datasets``, which has no public list of them."""
    waiting = [getattr(dataset, "_ex_iterable", None)]
    while waiting:
        link = waiting.pop()
        if link is not None:
            yield type(link).__name__
            waiting += [getattr(link, "ex_iterable", None), *(getattr(link, "ex_iterables", None) or ())]


def supports_lockstep(ranks: DataShard) -> bool:
    """Returns whether the data is sharded over all ranks of the run, and these can communicate on the CPU."""
    if not world.is_joined() or not dist.is_available() or not dist.is_gloo_available():
        return False
    everyone = world.current().collectives
    return isinstance(everyone, TorchCollectives) and ranks == DataShard(everyone.rank, everyone.size)


class StreamStep(NamedTuple):
    """One step of this rank.

    Attributes:
        batch: The batch.
        position: The loader's position after it.
        step_sizes: The `StepSizes` of the step.
        last: Whether it is the last step of all ranks.
    """

    batch: Any
    position: Any
    step_sizes: StepSizes | None
    last: bool


class _PendingAllGather:
    """An asynchronous all-gather of each rank's step, the rows of its batch, and whether it lacks a batch to repeat."""

    def __init__(self, collectives: Collectives, step: int, rows: int, lacks: bool) -> None:
        self._own = torch.tensor([step, rows, lacks])
        self._all = [torch.empty_like(self._own) for _ in range(collectives.size)]
        self._work = dist.all_gather(self._all, self._own, group=collectives.group, async_op=True)

    def wait(self) -> tuple[list[int], list[bool]]:
        """Returns each rank's rows, and whether it lacks a batch to repeat."""
        self._work.wait()
        steps, rows, lacking = zip(*(entry.tolist() for entry in self._all), strict=True)
        if len(set(steps)) > 1:
            raise RuntimeError(
                f"the ranks are at different steps of a loader of which each reads its own shards: {list(steps)}. All ranks "
                "must take the same number of steps of an iteration, and iterate over their loaders in the same order."
            )
        return list(rows), list(map(bool, lacking))


class _PrefetchedBatch(NamedTuple):
    batch: Any
    position: Any
    pending: _PendingAllGather


class LockstepReader:
    """Reads this rank's batches in lockstep with the other ranks.

    Args:
        batches: This rank's batches, each of `size` rows; a `CountedBatch` has fewer rows that are data.
        size: Rows in a full batch.
        position: Returns the loader's position, which is recorded after each batch.
    """

    def __init__(self, batches: Iterator[Any], size: int, position: Callable[[], Any]) -> None:
        self._batches = batches
        self._size = size
        self._position = position
        self._recorded_position: Any = None
        self._first: Any = _END
        self._ended = False
        self._failure: Exception | None = None
        self._num_posted = 0

    def steps(self, skip: int) -> Iterator[StreamStep]:
        """Yields the steps from number `skip` on. A failure to read is raised on every rank.

        Raises:
            RuntimeError: If another rank failed to read, or is at another step.
        """
        collectives = cpu_group("rows of stream shards", _READ_TIMEOUT)
        for _ in range(skip):
            self._next()
        self._recorded_position = self._position()
        ahead = deque(self._read(collectives) for _ in range(2))
        rows, lacking = ahead[0].pending.wait()
        if any(lacking) and max(rows) > 0:
            self._broadcast_filler(
                collectives, next(rank for rank, count in enumerate(rows) if count > 0), ahead[0].batch
            )
        while any(rows):
            self._raise_failures(rows)
            current = ahead.popleft()
            ahead.append(self._read(collectives))
            upcoming, _ = ahead[0].pending.wait()
            batch = clone_batch(self._first) if current.batch is _END else current.batch
            yield StreamStep(batch, current.position, self._step_sizes(rows), not any(upcoming))
            rows = upcoming

    def _next(self) -> tuple[Any, int]:
        """Returns the next batch and the number of its rows that are data; `_END` and 0 after the last one."""
        batch = _END if self._ended else next(self._batches, _END)
        self._ended = batch is _END
        if self._ended:
            return _END, 0
        rows = self._size
        if type(batch) is CountedBatch:
            batch, rows = batch.batch, batch.step_sizes.rows
        if self._first is _END:
            self._first = clone_batch(batch)  # the user may change the batch
        return batch, rows

    def _read(self, collectives: Collectives) -> _PrefetchedBatch:
        batch, rows = _END, _FAILED
        try:
            if self._failure is None:
                batch, rows = self._next()
        except Exception as error:  # noqa: BLE001 - raised at the step of this batch: earlier ones are complete
            self._failure = error
        if batch is not _END:
            self._recorded_position = self._position()
        self._num_posted += 1
        return _PrefetchedBatch(
            batch, self._recorded_position, _PendingAllGather(collectives, self._num_posted, rows, self._first is _END)
        )

    def _broadcast_filler(self, collectives: Collectives, source: int, own: Any) -> None:
        """Broadcasts a batch of rank `source` to ranks that have none: shards are empty, or were read before resuming."""
        sent = [own if collectives.rank == source else None]
        collectives.broadcast_object_list(sent, source)
        if self._first is _END:
            self._first = sent[0]

    def _raise_failures(self, rows: list[int]) -> None:
        if _FAILED not in rows:
            return
        if self._failure is not None:
            raise self._failure
        failed = ", ".join(str(rank) for rank, count in enumerate(rows) if count == _FAILED)
        raise RuntimeError(f"rank {failed} failed to read its shards of the dataset: see the error of that rank.")

    def _step_sizes(self, rows: list[int]) -> StepSizes | None:
        if all(count == self._size for count in rows):
            return None
        return StepSizes((self._size,) * len(rows), sum(rows), valid_rows=tuple(rows))
