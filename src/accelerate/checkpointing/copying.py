"""Copies of many tensors, on a few threads of our own: torch's pool spins while it waits, which a busy machine pays for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from .parallel import in_parallel

_STRETCH = 16 * 2**20
_THREADS = 4


def is_plain(tensor: Any) -> bool:
    """Whether a tensor's values are one stretch of this process's memory, as it stands."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_quantized
    )


def fits(target: Any, source: Any) -> bool:
    """Whether `copy_all` can copy the one into the other."""
    return is_plain(target) and is_plain(source) and target.shape == source.shape and target.dtype == source.dtype


def copy_all(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copies the second tensor of each pair into the first; each pair `fits`."""
    stretches = []
    for target, source in pairs:
        into, out_of = as_bytes(target), as_bytes(source)
        for start in range(0, len(into), _STRETCH):
            stretches.append((into[start : start + _STRETCH], out_of[start : start + _STRETCH]))

    def copy(stretch: tuple[Any, Any]) -> None:
        np.copyto(*stretch)

    in_parallel(copy, stretches, _THREADS)


def as_bytes(tensor: torch.Tensor) -> Any:
    """The memory of a plain tensor as an array of bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


class Room:
    """Memory for copies that is used again by the next ones: fresh memory takes longer to get than to fill."""

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}
        self._used: list[torch.Tensor] = []

    def clear(self) -> None:
        """Takes all of it back; what the last copies had no use for is given up."""
        self._free = {}
        for memory in self._used:
            self._free.setdefault(len(memory), []).append(memory)
        self._used = []

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory for a copy of a plain tensor."""
        size = tensor.numel() * tensor.element_size()
        memory = self._free[size].pop() if self._free.get(size) else torch.empty(size, dtype=torch.uint8)
        self._used.append(memory)
        return memory.view(tensor.dtype).reshape(tensor.shape)
