"""Loaders on XLA devices: torch_xla's background feeder around a prepared loader. Imported on use only."""

from __future__ import annotations

from typing import Any

import torch
import torch_xla.distributed.parallel_loader as parallel_loader

from .base import DataLoaderAdapter


class MpDeviceLoaderWrapper(parallel_loader.MpDeviceLoader):
    """`MpDeviceLoader` that answers like the prepared loader inside it.

    Args:
        dataloader: The prepared loader, which leaves batches on the host.
        device: The XLA device that batches are fed to.
    """

    def __init__(self, dataloader: DataLoaderAdapter, device: torch.device) -> None:
        super().__init__(dataloader, device)
        self.dataloader = dataloader

    def __getattr__(self, name: str) -> Any:
        if name == "dataloader":  # not set yet
            raise AttributeError(name)
        return getattr(self.dataloader, name)
