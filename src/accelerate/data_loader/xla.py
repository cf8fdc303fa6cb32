"""Loaders on XLA devices: torch_xla's background feeder around a sharded loader. Imported on use: it needs torch_xla."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch_xla.distributed.parallel_loader as parallel_loader

from .shard import DataLoaderShard


class _FeederSource:
    """The loader that the feeder's thread reads ahead of the loop; it queues the state that belongs to each batch."""

    def __init__(self, loader: DataLoaderShard) -> None:
        self.loader = loader
        self.states: deque[tuple[Any, ...]] = deque()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        reader = copy.copy(self.loader)
        reader.reset()
        for batch in reader._batches():
            self.states.append((reader.end_of_dataloader, reader.remainder, reader.step_sizes, reader.short_rows))
            yield batch


class MpDeviceLoaderWrapper(parallel_loader.MpDeviceLoader):
    """`MpDeviceLoader` with the attributes of the prepared loader inside it, which it registers with `GradientState`.

    Args:
        dataloader: The sharded loader, which leaves batches on the host.
        device: The XLA device that batches are fed to.
    """

    def __init__(self, dataloader: DataLoaderShard, device: torch.device) -> None:
        super().__init__(_FeederSource(dataloader), device)
        self.dataloader = dataloader

    def __iter__(self) -> Iterator[Any]:
        loader, states = self.dataloader, self._loader.states
        states.clear()
        loader.begin()
        remainder = loader.remainder
        try:
            loader._begin_epoch()
            loader._synchronize_rng()
            for batch in super().__iter__():
                loader.end_of_dataloader, last_rows, loader.step_sizes, loader.short_rows = states.popleft()
                loader.remainder = max(remainder, last_rows)
                yield batch
            loader._finish_epoch()
        finally:
            loader.end()

    def __getattr__(self, name: str) -> Any:
        if name == "dataloader":  # not set yet
            raise AttributeError(name)
        return getattr(self.dataloader, name)
