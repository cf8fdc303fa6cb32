"""Averages gradients over replicas by bucketed all-reduce, for parameters that DistributedDataParallel does not serve.

These are DTensors of tensor parallelism, parameters that FSDP ignores, and parameters that were frozen when DDP wrapped the
model and are trained later.
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

from .mesh import local_tensor, reduced_grad

_BUCKET_BYTES = 25 * 2**20

_reducers: weakref.WeakKeyDictionary[nn.Module, BucketedGradReducer] = weakref.WeakKeyDictionary()


def register_grad_all_reduce(
    model: nn.Module,
    params: Iterable[Tensor],
    group: ProcessGroup | None,
    *,
    all_used: bool,
    overlap: bool = False,
    enabled: Callable[[], bool] = lambda: True,
) -> None:
    """Registers hooks that all-reduce gradients of a model in each backward. Frozen parameters cost nothing.

    Args:
        model: The model, which `grad_sync_enabled` refers to.
        params: Its parameters to synchronize, in the same order on all ranks.
        group: Ranks with different data; None means all.
        all_used: Every backward reaches at least one of `params`, on all ranks. Otherwise a hook on the model's outputs
            makes each backward through the model take part.
        overlap: All-reduce buckets during the backward instead of at its end. Only valid where ranks of `group` run no
            other collectives in a backward: ranks that use different parts of the model would order them differently.
        enabled: Called in each backward; gradients stay local where it returns False.
    """
    reducer = _reducers[model] = BucketedGradReducer(params, group, enabled, overlap)
    if reducer.params and not all_used:
        reducer.register_output_hook(model)


@contextmanager
def grad_sync_enabled(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Returns a context that enables or disables the all-reduces of `register_grad_all_reduce` for a model."""
    reducer = _reducer_of(model)
    if reducer is None:
        yield
        return
    before, reducer.active = reducer.active, enabled
    try:
        yield
    finally:
        reducer.active = before


def has_grad_all_reduce(model: nn.Module) -> bool:
    """Returns whether backwards through a model all-reduce gradients here, given which parameters are trained now."""
    reducer = _reducer_of(model)
    return reducer is not None and any(param.requires_grad for param in reducer.params)


def _reducer_of(model: nn.Module) -> BucketedGradReducer | None:
    inner: nn.Module = getattr(model, "_orig_mod", model)  # of a compiled model
    return _reducers.get(inner)


class BucketedGradReducer:
    """Hooks on parameters that all-reduce their gradients over a group in each backward.

    As in DistributedDataParallel, gradients are reduced in buckets, in the same order on all ranks. With `overlap`, a bucket
    is reduced as soon as its gradients are ready and all buckets before it were launched. Remaining buckets are launched at
    the end of the backward, which then waits for all; until then each `grad` holds local values.

    Attributes:
        active: If False, gradients stay local until the next backward in which it is True.
        params: Parameters that can be trained.

    Args:
        params: Parameters, in the same order on all ranks.
        group: Ranks with different data; None means all.
        enabled: Called in each backward, besides `active`.
        overlap: See `register_grad_all_reduce`.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        group: ProcessGroup | None,
        enabled: Callable[[], bool],
        overlap: bool = False,
    ) -> None:
        self.active = True
        self.params = [param for param in params if _is_trainable(param)]
        self._group = group
        self._enabled = enabled
        self._overlap = overlap
        self._reduction: _BackwardReduction | None = None  # of the current backward, or one that failed
        self._bucket_signature: list[tuple[bool, torch.dtype]] = []
        self._buckets: list[list[Tensor]] = []
        grad_ready = weakref.WeakMethod(self._grad_ready)  # a strong reference would be a cycle through the parameters
        for param in self.params:
            trained = param.requires_grad
            param.requires_grad_(True)  # torch registers no hook on a frozen parameter
            param.register_post_accumulate_grad_hook(functools.partial(_call_weak_method, grad_ready))
            param.requires_grad_(trained)

    def __reduce__(self) -> Any:
        # A copy of the model copies its hooks, but is not a prepared model: the copied hooks do nothing.
        return BucketedGradReducer, ((), None, bool)

    def register_output_hook(self, model: nn.Module) -> None:
        """Makes every backward through the model all-reduce, even if it reaches none of the parameters on this rank."""
        model.register_forward_hook(self._hook_outputs)

    def _hook_outputs(self, _: nn.Module, __: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._start_reduction)

    def _grad_ready(self, param: Tensor) -> None:
        self._start_reduction(param)
        if self._overlap and self._reduction is not None:
            self._reduction.grad_ready(param)

    def _start_reduction(self, _: Tensor) -> None:
        backward = torch._C._current_graph_task_id()  # a flag would stay set after a failed backward
        before = self._reduction
        if (before is not None and before.backward == backward) or not (self.active and self._enabled()):
            return
        if before is not None and self._overlap:
            # The previous backward failed, or this one is nested in it (reentrant checkpointing), where a gradient may
            # change after its bucket was launched. Launch the remaining buckets, as other ranks do, and discard the
            # results: gradients are still local.
            self._overlap = False
            before.wait()
        reduction = self._reduction = _BackwardReduction(backward, self._current_buckets(), self._group)
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._finish, reduction))

    def _finish(self, reduction: _BackwardReduction) -> None:
        if self._reduction is reduction:  # else a nested backward has reduced all gradients
            self._reduction = None
            reduction.finish()

    def _current_buckets(self) -> list[list[Tensor]]:
        form = [(param.requires_grad, param.dtype) for param in self.params]
        if form != self._bucket_signature:
            self._bucket_signature, self._buckets = (
                form,
                _buckets([param for param in self.params if param.requires_grad]),
            )
        return self._buckets


class _BackwardReduction:
    """The all-reduces of one backward.

    Args:
        backward: Number of autograd's graph task.
        buckets: Parameters whose gradients are reduced together, in launch order.
        group: Participating ranks; None means all.
    """

    def __init__(self, backward: int, buckets: list[list[Tensor]], group: ProcessGroup | None) -> None:
        self.backward = backward
        self._buckets = buckets
        self._group = group
        self._pending = [len(bucket) for bucket in buckets]
        self._bucket_of = {id(param): number for number, bucket in enumerate(buckets) for param in bucket}
        self._launched: list[tuple[Tensor, dist.Work | None]] = []

    def grad_ready(self, param: Tensor) -> None:
        """Launches, in order, the buckets that this gradient completes."""
        number = self._bucket_of.get(id(param))
        if number is not None:
            self._pending[number] -= 1
            while len(self._launched) < len(self._buckets) and not self._pending[len(self._launched)]:
                self._reduce_next_bucket()

    @torch.no_grad()
    def _reduce_next_bucket(self) -> None:
        # A rank that does not use a parameter contributes zeros.
        params = self._buckets[len(self._launched)]
        gradients = [reduced_grad(param) for param in params]
        pieces = [
            torch.zeros_like(local_tensor(param)).flatten() if gradient is None else local_tensor(gradient).flatten()
            for param, gradient in zip(params, gradients, strict=True)
        ]
        used = pieces[0].new_ones(len(params))
        for place, gradient in enumerate(gradients):
            if gradient is None:
                used[place].zero_()  # no tensor from Python values, which would synchronize the device
        flat = torch.cat([*pieces, used])
        self._launched.append((flat, dist.all_reduce(flat, group=self._group, async_op=True)))

    def wait(self) -> None:
        """Launches the remaining buckets and waits for all; on an accelerator the stream waits, not the process."""
        while len(self._launched) < len(self._buckets):
            self._reduce_next_bucket()
        for _, work in self._launched:
            if work is not None:
                work.wait()

    @torch.no_grad()
    def finish(self) -> None:
        """Waits for all buckets and writes the averages to the gradients."""
        self.wait()
        self._create_missing_grads()
        for params, (flat, _) in zip(self._buckets, self._launched, strict=True):
            flat.div_(dist.get_world_size(self._group))
            places = [local_tensor(param if param.grad is None else param.grad) for param in params]
            averages = flat.split([*(place.numel() for place in places), len(params)])
            pairs = zip(params, places, averages, strict=False)
            given = [(place, average.view_as(place)) for param, place, average in pairs if param.grad is not None]
            if given:
                torch._foreach_copy_([place for place, _ in given], [average for _, average in given])

    def _create_missing_grads(self) -> None:
        """Creates gradients of parameters that only other ranks used. Only then it synchronizes with the device."""
        lacking = [
            (param, flat[place - len(params)])
            for params, (flat, _) in zip(self._buckets, self._launched, strict=True)
            for place, param in enumerate(params)
            if param.grad is None
        ]
        if lacking:
            device = lacking[0][1].device
            counts = torch.stack([count.to(device, torch.float32) for _, count in lacking]).tolist()
            for (param, _), count in zip(lacking, counts, strict=True):
                if count:
                    param.grad = torch.zeros_like(param)


def _buckets(params: list[Tensor]) -> list[list[Tensor]]:
    """Groups parameters by device and dtype into buckets of `_BUCKET_BYTES`, in reverse order, as backward reaches them."""
    buckets: list[list[Tensor]] = []
    open_: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], int]] = {}
    with torch.no_grad():
        for param in reversed(params):
            local = local_tensor(param)
            kind = local.device, local.dtype
            bucket, size = open_.pop(kind, ([], 0))
            bucket.append(param)
            size += local.nbytes
            if size >= _BUCKET_BYTES:
                buckets.append(bucket)
            else:
                open_[kind] = bucket, size
    return [*buckets, *(bucket for bucket, _ in open_.values())]


def _call_weak_method(method: weakref.WeakMethod[Any], param: Tensor) -> None:
    found = method()
    if found is not None:
        found(param)


def _is_trainable(param: Tensor) -> bool:
    return (param.is_floating_point() or param.is_complex()) and not param.is_inference()
