"""Averages gradients over ranks when a backward has ended, whatever the parameters are: whole, or parts that other ranks
complete.

DistributedDataParallel does this for whole parameters, and while the backward runs. It cannot for those that tensor
parallelism has cut.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .mesh import local_part

_BUCKET_BYTES = 25 * 2**20


class GradientAverage:
    """Hooks on parameters that average their gradients over a group at the end of each backward.

    Attributes:
        active: False: gradients stay as each rank has them, and are averaged by the next backward that finds this True.

    Args:
        params: The parameters, in the same order on all ranks.
        group: The ranks that have seen different data.
    """

    def __init__(self, params: Iterable[Tensor], group: ProcessGroup) -> None:
        self.active = True
        self._params = [param for param in params if param.requires_grad]
        self._group = group
        self._queued = False
        for param in self._params:
            param.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, _: Tensor) -> None:
        if self.active and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._queued = False
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in self._params:
            local = local_part(param)
            by_kind.setdefault((local.device, local.dtype), []).append(param)
        for params in by_kind.values():
            bucket: list[Tensor] = []
            size = 0
            for param in params:
                bucket.append(param)
                size += local_part(param).nbytes
                if size >= _BUCKET_BYTES:
                    self._average_bucket(bucket)
                    bucket, size = [], 0
            if bucket:
                self._average_bucket(bucket)

    def _average_bucket(self, params: list[Tensor]) -> None:
        # A parameter may be out of use on some ranks. They add nothing, but take part.
        locals_ = [local_part(param if param.grad is None else param.grad) for param in params]
        pieces = [
            torch.zeros_like(local).flatten() if param.grad is None else local.flatten()
            for param, local in zip(params, locals_, strict=True)
        ]
        used = locals_[0].new_tensor([param.grad is not None for param in params])
        flat = torch.cat([*pieces, used])
        dist.all_reduce(flat, group=self._group)
        flat.div_(self._group.size())
        *averages, used = flat.split([*(piece.numel() for piece in pieces), len(params)])
        for param, local, average, anywhere in zip(params, locals_, averages, used.tolist(), strict=True):
            if param.grad is not None:
                local.copy_(average.view_as(local))
            elif anywhere:
                fresh = torch.zeros_like(param)
                local_part(fresh).copy_(average.view_as(local))
                param.grad = fresh
