"""Collectives over trees of tensors and over objects: gather, broadcast, reduce, pad.

They apply the World's `Collectives` to each tensor of a tree (`pytree`). On a single process they return their input. In
debug mode the processes compare their inputs first, so that a mismatch raises on all of them instead of hanging.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .collective_backend import Collectives
from .shape_check import (
    DistributedOperationException,
    chained_operation,
    check_all_equal,
    ndim_only,
    raise_mismatch,
    summarize,
    verify_operation,
)
from .tensors.pytree import TensorInformation, map_tensors
from .world import current

__all__ = [
    "TENSOR_INT_TO_DTYPE",
    "TENSOR_TYPE_TO_INT",
    "CannotPadNestedTensorWarning",
    "DistributedOperationException",
    "GatheredParameters",
    "avg_losses_across_data_parallel_group",
    "broadcast",
    "broadcast_object_list",
    "chained_operation",
    "copy_tensor_to_devices",
    "gather",
    "gather_object",
    "gather_tensor_shape",
    "pad_across_processes",
    "pad_input_tensors",
    "reduce",
    "verify_operation",
]

_Tree = TypeVar("_Tree")

TENSOR_TYPE_TO_INT = {
    torch.float32: 1,
    torch.float64: 2,
    torch.float16: 3,
    torch.bfloat16: 4,
    torch.uint8: 5,
    torch.int8: 6,
    torch.int16: 7,
    torch.int32: 8,
    torch.int64: 9,
    torch.bool: 10,
}
TENSOR_INT_TO_DTYPE = {code: dtype for dtype, code in TENSOR_TYPE_TO_INT.items()}

# dtypes that backends cannot sum, and the ones used instead; the result is converted back, except for bool.
_SUM_DTYPES = {
    torch.bool: torch.int64,
    torch.int16: torch.int32,
    torch.uint16: torch.int64,
    torch.uint32: torch.int64,
}


class CannotPadNestedTensorWarning(UserWarning):
    """A nested tensor (`torch.nested`), which has no single size to pad to, was returned unchanged."""


# Tensors ------------------------------------------------------------------------------------------------------------


@verify_operation
def gather(tensor: _Tree) -> _Tree:
    """All-gathers the tensors of all processes.

    Args:
        tensor: A tensor, or lists, tuples and mappings of tensors, with the same structure, shapes and dtypes on every
            process (see `pad_across_processes`).

    Returns:
        The same structure with each tensor concatenated along dimension 0 in rank order: ``(n, ...)`` becomes
        ``(size * n, ...)``, a scalar a vector of ``size``. Results are contiguous, without gradient, on the device of the
        input. On a single process: `tensor` itself.

    Raises:
        TypeError: if a leaf of `tensor` is not a tensor.
        DistributedOperationException: in debug mode, on every process, if the inputs differ in shape.

    Example:
        ```python
        losses = gather(loss)  # one number per process
        ```
    """
    comm = current().collectives
    return tensor if comm.size == 1 else map_tensors("gather", _gather_one, tensor, comm)


def _gather_one(tensor: torch.Tensor, comm: Collectives) -> torch.Tensor:
    if tensor.device == comm.device:
        return comm.all_gather(tensor)
    return comm.all_gather(tensor.to(comm.device)).to(tensor.device)


@verify_operation
def broadcast(tensor: _Tree, from_process: int = 0) -> _Tree:
    """Broadcasts the tensors of one process to all.

    Args:
        tensor: A tensor, or lists, tuples and mappings of tensors, with the same structure, shapes and dtypes on every
            process.
        from_process: The source rank.

    Returns:
        The structure with the source's values. As in torch.distributed, tensors that are contiguous and on the process's
        device are overwritten; others are replaced, so use the returned ones. On a single process: `tensor` itself.

    Raises:
        TypeError: if a leaf of `tensor` is not a tensor.
        ValueError: if there is no such rank.
        DistributedOperationException: in debug mode, on every process, if the inputs differ in shape.
    """
    comm = current().collectives
    if comm.size == 1:
        return tensor
    _check_rank(from_process, comm)
    return map_tensors("broadcast", _broadcast_one, tensor, comm, from_process)


def _broadcast_one(tensor: torch.Tensor, comm: Collectives, from_process: int) -> torch.Tensor:
    wire = tensor.detach()
    if tensor.device == comm.device and tensor.is_contiguous():
        comm.broadcast(wire, from_process)
        return tensor
    return comm.broadcast(wire.to(comm.device).contiguous(), from_process).to(tensor.device)


def _check_rank(rank: int, comm: Collectives) -> None:
    if not 0 <= rank < comm.size:
        raise ValueError(f"from_process={rank} is not a rank of this run: expected 0 to {comm.size - 1}.")


@verify_operation
def reduce(tensor: _Tree, reduction: str = "mean", scale: float = 1.0) -> _Tree:
    """All-reduces the tensors of all processes elementwise.

    Args:
        tensor: A tensor, or lists, tuples and mappings of tensors, with the same structure, shapes and dtypes on every
            process.
        reduction: ``"sum"``, ``"mean"``, ``"max"``, ``"min"``, or ``"none"``, which returns `tensor` itself without
            communication.
        scale: Factor on the result.

    Returns:
        The same structure with new contiguous tensors on the device of the input, without gradient if there are several
        processes. The dtype is that of the input, with two exceptions: the mean of integers and scaled integers are
        floats; ``"sum"`` and ``"mean"`` of booleans count them in int64.

    Raises:
        TypeError: if a leaf of `tensor` is not a tensor.
        ValueError: for another reduction.
        DistributedOperationException: in debug mode, on every process, if the inputs differ in shape.
    """
    if reduction == "none":
        return tensor
    if reduction not in ("sum", "mean", "max", "min"):
        raise ValueError(f"reduction={reduction!r}: expected 'sum', 'mean', 'max', 'min' or 'none'.")
    return map_tensors("reduce", _reduce_one, tensor, current().collectives, reduction, scale)


def _reduce_one(tensor: torch.Tensor, comm: Collectives, reduction: str, scale: float) -> torch.Tensor:
    if comm.size == 1:
        return tensor.clone() if scale == 1 else tensor * scale
    total = tensor.detach().to(comm.device, _SUM_DTYPES.get(tensor.dtype, tensor.dtype), copy=True).contiguous()
    adds = reduction in ("sum", "mean")
    comm.all_reduce(total, "sum" if adds else reduction)
    if total.dtype != tensor.dtype and not (adds and tensor.dtype == torch.bool):
        total = total.to(tensor.dtype)
    if reduction == "mean":
        total = total / comm.size
    if scale != 1:
        total = total * scale
    return total if tensor.device == comm.device else total.to(tensor.device)


def avg_losses_across_data_parallel_group(losses: Iterable[torch.Tensor]) -> torch.Tensor:
    """Averages each loss over the data-parallel ranks.

    Args:
        losses: Scalar tensors, equally many on every rank.

    Returns:
        A vector of the means, in the order of `losses`.
    """
    # Ranks of one model replica have equal losses, so the mean over all ranks is the mean over replicas.
    return reduce(torch.stack([loss.detach().reshape(()) for loss in losses]), "mean")


# Sizes --------------------------------------------------------------------------------------------------------------


def pad_across_processes(tensor: _Tree, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> _Tree:
    """Pads tensors along one dimension to the largest size over the processes, so that they can be gathered.

    Args:
        tensor: A tensor, or lists, tuples and mappings of tensors, with the same structure and numbers of dimensions on
            every process.
        dim: The dimension to pad. Tensors without it are returned unchanged.
        pad_index: The padding value.
        pad_first: Pad before the values instead of after them.

    Returns:
        The same structure. Tensors that have the size already, and nested tensors (`CannotPadNestedTensorWarning`), are the
        same objects. On a single process: `tensor` itself.

    Raises:
        TypeError: if a leaf of `tensor` is not a tensor.
        DistributedOperationException: on every process, if the numbers of dimensions differ; in debug mode also if the
            structures do.

    Example:
        ```python
        everyone = gather(pad_across_processes(predictions, dim=1, pad_index=-100))
        ```
    """
    here = current()
    comm = here.collectives
    if comm.size == 1:
        return tensor
    if here.debug:
        check_all_equal(comm, "pad_across_processes", summarize(tensor), ndim_only)
    tensors: list[torch.Tensor] = []
    map_tensors("pad_across_processes", tensors.append, tensor)
    if any(leaf.is_nested for leaf in tensors):
        warnings.warn(
            "nested tensors are not padded: convert them first (`torch.nested.to_padded_tensor`).",
            CannotPadNestedTensorWarning,
            stacklevel=2,
        )
    sizes = _max_sizes(tensors, dim, comm)
    if sizes is None:
        raise_mismatch(comm.all_gather_object(("pad_across_processes", summarize(tensor))))
    targets = iter(sizes)
    return map_tensors("pad_across_processes", _pad_one, tensor, targets, dim, pad_index, pad_first)


def _max_sizes(tensors: list[torch.Tensor], dim: int, comm: Collectives) -> list[int] | None:
    """Returns each tensor's largest size over the processes, or None if numbers of dimensions differ.

    A size of -1 marks a tensor that is not to be padded.
    """
    sizes = [-1 if leaf.is_nested or not _has_dim(leaf, dim) else leaf.shape[dim] for leaf in tensors]
    dimensions = [leaf.dim() for leaf in tensors]
    # The maximum of the negated dimensions is their minimum, so one all-reduce detects mismatches as well.
    numbers = torch.tensor(sizes + dimensions + [-n for n in dimensions], dtype=torch.int64, device=comm.device)
    found: list[int] = comm.all_reduce(numbers, "max").tolist()
    count = len(tensors)
    most, least = found[count : 2 * count], found[2 * count :]
    return found[:count] if most == [-n for n in least] else None


def _has_dim(tensor: torch.Tensor, dim: int) -> bool:
    return -tensor.dim() <= dim < tensor.dim()


def _pad_one(tensor: torch.Tensor, targets: Iterator[int], dim: int, pad_index: float, pad_first: bool) -> torch.Tensor:
    target = next(targets)
    if target == -1 or tensor.shape[dim] == target:
        return tensor
    return _pad_to(tensor, dim, target, pad_index, pad_first)


def _pad_to(tensor: torch.Tensor, dim: int, size: int, value: float, first: bool = False) -> torch.Tensor:
    shape = list(tensor.shape)
    length, shape[dim] = shape[dim], size
    padded = tensor.new_full(shape, value)
    padded.narrow(dim, size - length if first else 0, length).copy_(tensor)
    return padded


def pad_input_tensors(tensor: _Tree, batch_size: int, num_processes: int, dim: int = 0) -> _Tree:
    """Pads a batch with zeros to a multiple of `num_processes`.

    Args:
        tensor: A tensor, or lists, tuples and mappings of tensors.
        batch_size: The size of the batch.
        num_processes: Number of equal parts into which the batch will be split.
        dim: The batch dimension. Tensors whose size along it is not `batch_size` are returned unchanged.

    Returns:
        The same structure; sizes along `dim` are the next multiple of `num_processes`.

    Raises:
        TypeError: if a leaf of `tensor` is not a tensor.
        ValueError: if `num_processes` is not positive.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes={num_processes}: expected at least 1.")
    size = -(-batch_size // num_processes) * num_processes
    return map_tensors("pad_input_tensors", _pad_input, tensor, batch_size, size, dim)


def _pad_input(tensor: torch.Tensor, batch_size: int, size: int, dim: int) -> torch.Tensor:
    if size == batch_size or not _has_dim(tensor, dim) or tensor.shape[dim] != batch_size:
        return tensor
    return _pad_to(tensor, dim, size, 0)


# One process's tensor -----------------------------------------------------------------------------------------------


def copy_tensor_to_devices(tensor: torch.Tensor | None = None) -> torch.Tensor:
    """Broadcasts a tensor from the one process that has it.

    Unlike `broadcast`, the others need neither its shape nor its rank.

    Args:
        tensor: The tensor on one process, None on all others.

    Returns:
        The tensor, on each process's own device.

    Raises:
        ValueError: on every process, unless exactly one passes a tensor.
    """
    comm = current().collectives
    source, information = _only_tensor(comm, tensor)
    if tensor is None:
        wire = torch.empty(information.shape, dtype=information.dtype, device=comm.device)
    else:
        wire = tensor.detach().to(comm.device).contiguous()
    return comm.broadcast(wire, source)


def gather_tensor_shape(tensor: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """Broadcasts the shape and the dtype of a tensor from the one process that has it.

    Args:
        tensor: The tensor on one process, None on all others.

    Returns:
        The shape as an int64 tensor, and the dtype's number in `TENSOR_TYPE_TO_INT`.

    Raises:
        ValueError: on every process, unless exactly one passes a tensor, of a dtype that has a number.
    """
    comm = current().collectives
    _, information = _only_tensor(comm, tensor)
    if information.dtype not in TENSOR_TYPE_TO_INT:
        raise ValueError(f"dtype {information.dtype} has no number: expected one of {list(TENSOR_TYPE_TO_INT)}.")
    shape = torch.tensor(information.shape, dtype=torch.int64, device=comm.device)
    return shape, TENSOR_TYPE_TO_INT[information.dtype]


def _only_tensor(comm: Collectives, tensor: torch.Tensor | None) -> tuple[int, TensorInformation]:
    mine = None if tensor is None else TensorInformation(tensor.shape, tensor.dtype)
    found = comm.all_gather_object(mine)
    holders = [rank for rank, information in enumerate(found) if information is not None]
    if len(holders) != 1:
        raise ValueError(
            f"exactly one process must pass a tensor and the others None; processes {holders or 'none'} passed one."
        )
    information = found[holders[0]]
    assert information is not None
    return holders[0], information


# Objects ------------------------------------------------------------------------------------------------------------


def gather_object(object: Any) -> list[Any]:
    """All-gathers lists of picklable objects.

    Args:
        object: A list (or another iterable); lengths may differ between processes.

    Returns:
        The items of all ranks in one list, in rank order. On a single process: `object` itself.

    Raises:
        TypeError: if `object` is not iterable.

    Example:
        ```python
        everyone = gather_object([process_index, "done"])  # [0, "done", 1, "done"] on two processes
        ```
    """
    comm = current().collectives
    if comm.size == 1:
        unchanged: list[Any] = object
        return unchanged
    if not isinstance(object, Iterable):
        raise TypeError(
            f"gather_object concatenates the lists of all processes; it was given a {type(object).__name__} ({object!r}). "
            "Pass a list: gather_object([value])."
        )
    return [item for items in comm.all_gather_object(object) for item in items]


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """Broadcasts the objects of one process to all, in place.

    Args:
        object_list: A list of picklable objects, of the same length on every process; its items are replaced.
        from_process: The source rank.

    Returns:
        `object_list`.

    Raises:
        TypeError: if `object_list` is not a list.
        ValueError: if there is no such rank.
        DistributedOperationException: in debug mode, on every process, if the lengths differ.
    """
    here = current()
    comm = here.collectives
    if comm.size == 1:
        return object_list
    if here.debug:
        length = f"list of {len(object_list)}" if isinstance(object_list, list) else type(object_list).__name__
        check_all_equal(comm, "broadcast_object_list", ("other", length))
    if not isinstance(object_list, list):
        raise TypeError(
            f"broadcast_object_list replaces the items of a list in place; it was given a {type(object_list).__name__}."
        )
    _check_rank(from_process, comm)
    return comm.broadcast_object_list(object_list, from_process)


# Sharded parameters -------------------------------------------------------------------------------------------------


@contextmanager
def GatheredParameters(
    params: Any, modifier_rank: int | None = None, fwd_module: Any = None, enabled: bool = True
) -> Iterator[None]:
    """Gathers parameters sharded by DeepSpeed's ZeRO stage 3 inside its block; does nothing to others.

    Args:
        params: A parameter, or an iterable of parameters.
        modifier_rank: The rank whose changes are broadcast at the end of the block; None discards changes.
        fwd_module: The module that uses the parameters, if they are gathered for its forward.
        enabled: False does nothing.
    """
    held = [params] if isinstance(params, torch.Tensor) else list(params)
    if not enabled or not any(hasattr(parameter, "ds_id") for parameter in held):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(held, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield
