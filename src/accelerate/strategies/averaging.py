"""Averages gradients over ranks when a backward has ended, whatever the parameters are: whole, or parts that other ranks
complete.

DistributedDataParallel does this for whole parameters, and while the backward runs. It cannot for those that tensor
parallelism has cut, and does not for those that were frozen when it was made, and are trained since.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

from .mesh import local_part, summed

_BUCKET_BYTES = 25 * 2**20

_of_models: weakref.WeakKeyDictionary[nn.Module, GradientAverage] = weakref.WeakKeyDictionary()


def average_gradients(
    model: nn.Module,
    params: Iterable[Tensor],
    group: ProcessGroup | None,
    *,
    all_used: bool,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Has gradients of a model averaged. Parameters that are frozen cost nothing until they are trained.

    Args:
        model: The model; see `averaging`.
        params: Parameters of it, in the same order on all ranks.
        group: The ranks that have seen different data; None: all.
        all_used: Every backward comes by one of the parameters, on all ranks; else all that go through the model average.
        wanted: Asked in each backward besides `averaging`.
    """
    average = _of_models[model] = GradientAverage(params, group, wanted)
    if average.params and not all_used:
        average.watch(model)


@contextmanager
def averaging(model: nn.Module, wanted: bool) -> Iterator[None]:
    """A context in which those gradients of a model are averaged, or are not."""
    average = _average_of(model)
    if average is None:
        yield
        return
    before, average.active = average.active, wanted
    try:
        yield
    finally:
        average.active = before


def is_averaged(model: nn.Module) -> bool:
    """Whether backwards through a model average gradients here, as it is now."""
    average = _average_of(model)
    return average is not None and any(param.requires_grad for param in average.params)


def _average_of(model: nn.Module) -> GradientAverage | None:
    inner: nn.Module = getattr(model, "_orig_mod", model)  # what a compiled one was made of
    return _of_models.get(inner)


class GradientAverage:
    """Hooks on parameters that average their gradients over a group at the end of each backward.

    Attributes:
        active: False: gradients stay as each rank has them, and are averaged by the next backward that finds this True.
        params: The parameters that can be trained.

    Args:
        params: The parameters, in the same order on all ranks.
        group: The ranks that have seen different data; None: all.
        wanted: Asked in each backward besides `active`.
    """

    def __init__(self, params: Iterable[Tensor], group: ProcessGroup | None, wanted: Callable[[], bool]) -> None:
        self.active = True
        self.params = [param for param in params if _can_be_trained(param)]
        self._group = group
        self._wanted = wanted
        self._backward = -1  # the number of the one that has been told to average when it ends
        arrived = weakref.WeakMethod(self._arrived)  # a hook that held on to the parameters would keep them for ever
        for param in self.params:
            trained = param.requires_grad
            param.requires_grad_(True)  # one that is frozen takes no hook, and its hook counts once it is trained
            param.register_post_accumulate_grad_hook(functools.partial(_call, arrived))
            param.requires_grad_(trained)

    def __reduce__(self) -> Any:
        # A copy of the model (pickled, or in memory) brings its hooks along; nobody has prepared it.
        return GradientAverage, ((), None, bool)

    def watch(self, model: nn.Module) -> None:
        """Has every backward through the model average, also one that on this rank comes by none of the parameters."""
        model.register_forward_hook(self._came_out)

    def _came_out(self, _: nn.Module, __: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._arrived)

    def _arrived(self, _: Tensor) -> None:
        backward = torch._C._current_graph_task_id()  # a flag would stay when a backward fails
        if self._backward != backward and self.active and self._wanted():
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in self.params:
            if not param.requires_grad:
                continue
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
        for param in params:
            summed(param)
        locals_ = [local_part(param if param.grad is None else param.grad) for param in params]
        pieces = [
            torch.zeros_like(local).flatten() if param.grad is None else local.flatten()
            for param, local in zip(params, locals_, strict=True)
        ]
        used = locals_[0].new_tensor([param.grad is not None for param in params])
        flat = torch.cat([*pieces, used])
        dist.all_reduce(flat, group=self._group)
        flat.div_(dist.get_world_size(self._group))
        *averages, used = flat.split([*(piece.numel() for piece in pieces), len(params)])
        for param, local, average, anywhere in zip(params, locals_, averages, used.tolist(), strict=True):
            if param.grad is not None:
                local.copy_(average.view_as(local))
            elif anywhere:
                fresh = torch.zeros_like(param)
                local_part(fresh).copy_(average.view_as(local))
                param.grad = fresh


def _call(method: weakref.WeakMethod[Any], param: Tensor) -> None:
    found = method()
    if found is not None:
        found(param)


def _can_be_trained(param: Tensor) -> bool:
    return (param.is_floating_point() or param.is_complex()) and not param.is_inference()
