"""Copies tensors to host memory, on threads of its own: idle threads of torch's pool spin, which slows a busy machine."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from .file_writer import thread_map

logger = logging.getLogger(__name__)

_COPY_SIZE = 16 * 2**20
_THREADS = 4


def is_dense_cpu(tensor: Any) -> bool:
    """Returns True if a tensor's elements are one contiguous range of this process's memory, stored as they are."""
    return _is_plain(tensor) and tensor.device.type == "cpu" and tensor.is_contiguous()


def _is_plain(tensor: Any) -> bool:
    """Returns True for strided tensors whose memory holds their elements as they are."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
    )


def can_copy(target: Any, source: Any) -> bool:
    """Returns True if `copy_tensors` can copy `source` into `target`."""
    return (
        is_dense_cpu(target) and is_dense_cpu(source) and target.shape == source.shape and target.dtype == source.dtype
    )


def copy_tensors(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copies (target, source) pairs that satisfy `can_copy`, split into blocks over threads."""
    blocks = []
    for target, source in pairs:
        into, out_of = byte_view(target), byte_view(source)
        for start in range(0, len(into), _COPY_SIZE):
            blocks.append((into[start : start + _COPY_SIZE], out_of[start : start + _COPY_SIZE]))
    thread_map(lambda block: np.copyto(*block), blocks, _THREADS)


def byte_view(tensor: torch.Tensor) -> Any:
    """Returns the memory of a dense CPU tensor as a numpy array of bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _is_dense_on_device(tensor: Any) -> bool:
    """Returns True if a device tensor's elements are one dense block of device memory."""
    return _is_plain(tensor) and (
        tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    )


class StagingBuffer:
    """Host copies of tensors, in memory that the next save reuses: page faults of new memory take longer than the copy.

    Copies from devices with streams use pinned memory, and run asynchronously until `wait`.

        buffer.clear()
        copies = [buffer.copy(tensor) for tensor in tensors]
        buffer.wait()  # tensors may change now, and copies are valid
    """

    pinned_device_types = ("cuda", "xpu")
    """Device types that copy asynchronously to pinned memory, and whose torch module has streams like CUDA's."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[torch.Tensor]] = {}
        self._used: list[tuple[torch.Tensor, bool]] = []
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._devices: set[torch.device] = set()

    def clear(self) -> None:
        """Makes the memory of all copies reusable; frees memory that the previous save did not use."""
        self._free = {}
        for memory, pinned in self._used:
            self._free.setdefault((len(memory), pinned), []).append(memory)
        self._used, self._pairs = [], []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Starts to copy a tensor to the CPU and returns the copy, which is valid after `wait`."""
        if is_dense_cpu(tensor):
            target = self._allocate_like(tensor, pinned=False)
            self._pairs.append((target, tensor))
        elif tensor.device.type != "cpu" and _is_dense_on_device(tensor):
            streams = tensor.device.type in self.pinned_device_types
            target = self._allocate_like(tensor, pinned=streams)
            self._start_copy(target, tensor.detach(), streams)
            if streams:
                self._devices.add(tensor.device)
        else:
            target = tensor.detach().to("cpu", copy=True)
        return target

    def copy_cpu_tensors(self) -> None:
        """Completes the copies of CPU tensors, so that their memory may be freed; device copies continue."""
        pairs, self._pairs = self._pairs, []
        copy_tensors(pairs)

    def wait(self) -> None:
        """Blocks until all copies are complete, with one synchronization per device."""
        self.copy_cpu_tensors()
        devices, self._devices = self._devices, set()
        for device in devices:
            self._synchronize(device)

    def _allocate_like(self, tensor: torch.Tensor, pinned: bool) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        free = self._free.get((size, pinned))
        memory = free.pop() if free else self._allocate(size, pinned)
        self._used.append((memory, pinned))
        return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def _allocate(self, size: int, pinned: bool) -> torch.Tensor:
        if pinned:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:  # systems limit pinned memory
                logger.debug("staging a checkpoint in memory that is not pinned: %s", error)
        return torch.empty(size, dtype=torch.uint8)

    def _start_copy(self, target: torch.Tensor, source: torch.Tensor, streams: bool) -> None:
        # Runs on the current stream, and so after the kernels that wrote the source.
        target.copy_(source, non_blocking=streams)

    def _synchronize(self, device: torch.device) -> None:
        torch.get_device_module(device).current_stream(device).synchronize()
