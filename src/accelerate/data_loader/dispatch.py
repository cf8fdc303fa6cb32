"""`DataLoaderDispatcher`: rank 0 reads the data and sends each rank its shard, in one message per step."""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..runtime import world
from ..runtime.collective_backend import Collectives, TorchCollectives
from ..runtime.cpu_groups import cpu_group
from ..runtime.world import DataShard
from ..state import PartialState
from .base import DataLoaderAdapter, make_transfer_fn
from .mesh import data_shard_of_mesh

if TYPE_CHECKING:
    from .batches.batch_broadcast import BatchBroadcaster, DispatchedStep


_READ_TIMEOUT = datetime.timedelta(hours=2)
"""Timeout of ranks with devices while rank 0 reads a batch; a rank that has died is noticed at once."""


class DataLoaderDispatcher(DataLoaderAdapter):
    """A torch `DataLoader` that rank 0 reads for all ranks.

    At each step rank 0 reads one batch per rank and broadcasts them (with `split_batches`: one batch, sliced into a
    shard per rank). The rest of the data is concatenated and sliced into equal shards; rows from the start replace
    missing ones. All ranks must take the same number of steps. An error while reading is raised on every rank.

    Batches may hold tensors, numpy arrays, strings, numbers, bytes and None, in lists, tuples, named tuples and
    mappings; shapes may change from step to step. Items of a list of scalars count as rows if there is one per row.

    Args:
        dataset: The whole dataset; only rank 0 reads its samples.
        split_batches: The loader's batch is the batch of all ranks together.
        skip_batches: Number of steps to skip at the start.
        use_stateful_dataloader: Derive from torchdata's `StatefulDataLoader` as well, whose position can be saved.
        _drop_last: Drop an incomplete last step.
        _non_blocking: Copy to the device asynchronously.
        slice_fn: Slices a batch: called as ``slice_fn(batch, slice, process_index=…, num_processes=…)`` for every rank,
            on rank 0. None slices rows.
        torch_device_mesh: The device mesh, if there is one: ranks that hold shards of one model get the same data.
        iteration: Epoch of the first iteration.
        **kwargs: As for `torch.utils.data.DataLoader`.

    Attributes:
        end_of_dataloader, remainder, step_sizes: State of the loop; see `DataLoaderStateMixin`.
        iteration: Number of epochs that have been completed.
    """

    def __init__(
        self,
        dataset: Any,
        split_batches: bool = False,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        slice_fn: Callable[..., Any] | None = None,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        self.split_batches = split_batches
        self.slice_fn = slice_fn
        self.torch_device_mesh = torch_device_mesh
        self._non_blocking = _non_blocking
        self._device: torch.device | None = None
        self._broadcaster: BatchBroadcaster | None = None
        super().__init__(
            dataset,
            use_stateful_dataloader=use_stateful_dataloader,
            skip_batches=skip_batches,
            iteration=iteration,
            _drop_last=_drop_last,
            **kwargs,
        )

    @property
    def state(self) -> PartialState:
        """The `PartialState` of this process."""
        return PartialState()

    @property
    def ranks(self) -> DataShard:
        """This rank's shard of the data, and the number of shards."""
        if self._plan is not None:
            return self._plan.ranks
        if self.torch_device_mesh is not None:
            return data_shard_of_mesh(self.torch_device_mesh)
        return DataShard(self.state.process_index, self.state.num_processes)

    @property
    def total_batch_size(self) -> int | None:
        """Samples in a batch of all ranks together; None if batches have no fixed size."""
        size = super().total_batch_size
        return size if self.split_batches or size is None or self._plan is not None else size * self.ranks.count

    def __len__(self) -> int:
        batches, step = super().__len__(), self._batches_per_step()
        return batches // step if self._drop_last else -(-batches // step)

    def _epoch(self) -> Iterator[Any]:
        self._begin_epoch()
        move = make_transfer_fn(self.state.device if self._device is None else self._device, self._non_blocking)
        for step in self._steps(world.current().collectives):
            self.step_sizes = step.step_sizes
            self.end_of_dataloader = step.last
            if step.last and step.rows is not None:
                self.remainder = step.rows
            self._update_short_rows(step.batch, None)
            yield step.batch if move is None else move(step.batch)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_broadcaster": None}

    def _expected_remainder(self) -> int:
        return -1

    def _num_shards(self) -> int:
        return self.ranks.count

    def _batches_per_step(self) -> int:
        return 1 if self.split_batches else self.ranks.count

    def _all_ranks_read(self) -> bool:
        return False

    def _batches_to_skip(self) -> int:
        return self.skip_batches * self._batches_per_step()

    def _lookahead(self) -> int:
        # With drop_last a step is the last one if the remaining batches do not fill another.
        return self._batches_per_step() if self._drop_last else 1

    # Every rank -------------------------------------------------------------------------------------------------------

    def _steps(self, collectives: Collectives) -> Iterator[DispatchedStep]:
        if collectives.size == 1:
            yield from self._read_and_send(None)
            return
        if self._broadcaster is None or self._broadcaster.collectives is not collectives:
            from .batches.batch_broadcast import BatchBroadcaster  # imported here: most runs dispatch nothing

            self._broadcaster = BatchBroadcaster(collectives, host_collectives=select_host_collectives(collectives))
        if collectives.rank == 0:
            yield from self._read_and_send(self._broadcaster)
        else:
            yield from self._receive(self._broadcaster)

    def _receive(self, broadcaster: BatchBroadcaster) -> Iterator[DispatchedStep]:
        index = self.ranks.index
        while (step := broadcaster.receive(index)) is not None:
            yield step
            if step.last:
                return

    # Rank 0 -----------------------------------------------------------------------------------------------------------

    def _read_and_send(self, broadcaster: BatchBroadcaster | None) -> Iterator[DispatchedStep]:
        from .batches.batch_broadcast import DispatchedStep
        from .batches.batch_slicing import BatchSlicer

        ranks, slicer = self.ranks, BatchSlicer(self.slice_fn)
        groups = self._groups()
        start: list[Any] | None = None
        while True:
            try:
                group, last = next(groups, ([], True))
                if not group:
                    break
                _check_batches(group)
                if ranks.count == 1:
                    parts, rows, step_sizes = group, slicer.rows(group[0]) if last else None, None
                else:
                    parts, rows, step_sizes = slicer.shard(group, ranks.count, start or [], self.split_batches)
                if start is None and ranks.count > 1:
                    start = slicer.clone_rows(group, ranks.count)
                message = None if broadcaster is None else broadcaster.pack(parts, rows, step_sizes, last)
            except Exception as error:
                if broadcaster is not None:
                    broadcaster.send_error(error)
                raise
            if broadcaster is not None and message is not None:
                broadcaster.send(message)
            yield DispatchedStep(parts[ranks.index], rows, step_sizes, last)
            if last:
                next(groups, None)
                return
        if broadcaster is not None:
            broadcaster.send_end()

    def _groups(self) -> Iterator[tuple[list[Any], bool]]:
        """Returns the batches of each step, with whether it is the last."""
        return self._iterable_groups() if self.is_iterable else self._map_style_groups()

    def _map_style_groups(self) -> Iterator[tuple[list[Any], bool]]:
        batches = self.torch_iterator()
        assert self._lookahead_sampler is not None
        progress = self._lookahead_sampler.progress
        position = batches._num_yielded
        step = self._batches_per_step()
        while group := list(islice(batches, step)):
            position += len(group)
            if self._drop_last and len(group) < step:
                return
            left = None if progress.total is None else progress.total - position  # None: more than the lookahead
            last = left is not None and left < (step if self._drop_last else 1)
            yield group, last
            if last and left:
                return

    def _iterable_groups(self) -> Iterator[tuple[list[Any], bool]]:
        batches = self.torch_iterator()
        step, ahead = self._batches_per_step(), self._lookahead()
        waiting: deque[Any] = deque()
        ended, failure = False, None

        def read(count: int) -> None:
            nonlocal ended, failure
            while len(waiting) < count and not ended and failure is None:
                try:
                    waiting.append(next(batches))
                except StopIteration:
                    ended = True
                except Exception as error:  # noqa: BLE001 - raised at the step that needs this batch
                    failure = error

        for _ in range(self._batches_to_skip()):
            next(batches, None)
        read(step)
        while waiting or failure is not None:
            if failure is not None and len(waiting) < step:
                raise failure
            if self._drop_last and len(waiting) < step:
                return
            self._record_position()  # only the batches of this step have been read
            read(step + ahead)
            group = [waiting.popleft() for _ in range(min(step, len(waiting)))]
            yield group, ended and len(waiting) < (step if self._drop_last else 1)
            read(step)
        self._record_position()


def select_host_collectives(collectives: Collectives) -> Collectives | None:
    """Returns collectives in host memory for message headers, if tensors are broadcast between devices; else None.

    Reading a header from device memory would synchronize with all work queued on the device.
    """
    if collectives.device.type == "cpu" or not isinstance(collectives, TorchCollectives):
        return None
    if "cpu" in dist.get_backend_config(collectives.group):
        return TorchCollectives(torch.device("cpu"), collectives.group)
    host_collectives = cpu_group("dispatched batches", _READ_TIMEOUT)
    return host_collectives if host_collectives.device.type == "cpu" else None


def _check_batches(batches: list[Any]) -> None:
    if any(batch is None for batch in batches):
        raise TypeError(
            "the loader returned None as a batch, which cannot be sharded over the ranks: its dataset or collate_fn "
            "returned None. Return a batch, or let every rank read its own shard: "
            "DataLoaderConfiguration(dispatch_batches=False)."
        )
