"""Operations in which every process takes part: gather, broadcast, reduce, pad, and the same for objects.

They walk a tree (`pytree`) and hand each tensor to the World's `Collectives`; none asks how the run is distributed. On
a single process they give back what came in. In debug mode the processes first compare their inputs, so that a mismatch
is an error on all of them instead of a hang.
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

# Sums that communication libraries cannot do in the dtype itself; all but those of bool are converted back.
_SUM_DTYPES = {
    torch.bool: torch.int64,
    torch.int16: torch.int32,
    torch.uint16: torch.int64,
    torch.uint32: torch.int64,
}


class CannotPadNestedTensorWarning(UserWarning):
    """A nested tensor (`torch.nested`) was left as it is, since it has no one size to pad to."""


# Tensors ------------------------------------------------------------------------------------------------------------


@verify_operation
def gather(tensor: _Tree) -> _Tree:
    """Brings the tensors of all processes together, on all of them.

    Args:
        tensor: A tensor, or lists, tuples and mappings of tensors. Shapes, dtypes and structure must be the same on
            every process; `pad_across_processes` gets them there.

    Returns:
        The same structure, each tensor concatenated along dimension 0 in the order of the ranks: ``(n, ...)`` becomes
        ``(size * n, ...)``, a scalar becomes a vector of ``size``. Contiguous, without gradient, on the device that the
        input was on. On a single process: `tensor` itself.

    Raises:
        TypeError: when something in `tensor` is not a tensor.
        DistributedOperationException: in debug mode, on every process, when the inputs differ in shape.

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
    """Gives every process the tensors of one of them.

    Args:
        tensor: A tensor, or lists, tuples and mappings of tensors, of the same structure, shapes and dtypes on every
            process.
        from_process: The rank whose values all get.

    Returns:
        The structure with that rank's values. As in torch.distributed, the receiving tensors are overwritten where
        their memory allows it (contiguous, on the process's device) and replaced by new ones elsewhere: use what is
        returned. On a single process: `tensor` itself.

    Raises:
        TypeError: when something in `tensor` is not a tensor.
        ValueError: when there is no such rank.
        DistributedOperationException: in debug mode, on every process, when the inputs differ in shape.
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
        raise ValueError(f"from_process={rank} is no process of this run: its ranks are 0 to {comm.size - 1}.")


@verify_operation
def reduce(tensor: _Tree, reduction: str = "mean", scale: float = 1.0) -> _Tree:
    """Combines the tensors of all processes element by element, on all of them.

    Args:
        tensor: A tensor, or lists, tuples and mappings of tensors, of the same structure, shapes and dtypes on every
            process.
        reduction: ``"sum"``, ``"mean"``, ``"max"``, ``"min"``, or ``"none"``, which communicates nothing and returns
            `tensor` itself.
        scale: Factor on the result.

    Returns:
        The same structure with new tensors, contiguous, without gradient where there are several processes, on the
        device that the input was on. The dtype stays, except: the mean of integers, and a scaled integer, is a float;
        ``"sum"`` and ``"mean"`` count booleans, in int64.

    Raises:
        TypeError: when something in `tensor` is not a tensor.
        ValueError: for another reduction.
        DistributedOperationException: in debug mode, on every process, when the inputs differ in shape.
    """
    if reduction == "none":
        return tensor
    if reduction not in ("sum", "mean", "max", "min"):
        raise ValueError(f"reduction={reduction!r} is unknown: choose 'sum', 'mean', 'max', 'min' or 'none'.")
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
    """The mean of each loss over the ranks that read different data.

    Args:
        losses: Numbers as tensors; as many on every rank.

    Returns:
        A vector of the means, in the order of `losses`.
    """
    # Ranks that share tensors have the same losses, so the mean over all ranks is the one over those with other data.
    return reduce(torch.stack([loss.detach().reshape(()) for loss in losses]), "mean")


# Sizes --------------------------------------------------------------------------------------------------------------


def pad_across_processes(tensor: _Tree, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> _Tree:
    """Pads tensors along one dimension to the largest size that any process has, so that they can be gathered.

    Args:
        tensor: A tensor, or lists, tuples and mappings of tensors; structure and numbers of dimensions are the same on
            every process, sizes need not be.
        dim: The dimension to pad. Tensors that do not have it stay as they are.
        pad_index: The value to pad with.
        pad_first: Put the padding before the values instead of after them.

    Returns:
        The same structure. Tensors that have the size already are the same objects, nested tensors too
        (`CannotPadNestedTensorWarning`). On a single process: `tensor` itself.

    Raises:
        TypeError: when something in `tensor` is not a tensor.
        DistributedOperationException: on every process, when the numbers of dimensions differ; in debug mode also when
            the structures do.

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
    """Each tensor's largest size over the processes, or None if numbers of dimensions differ: one collective for all.

    A size of -1 stands for a tensor that is not to be padded.
    """
    sizes = [-1 if leaf.is_nested or not _has_dim(leaf, dim) else leaf.shape[dim] for leaf in tensors]
    dimensions = [leaf.dim() for leaf in tensors]
    # The negated dimensions make the same maximum tell the least number too: a mismatch costs nothing to see.
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
    """Pads a batch with zeros until it can be cut into `num_processes` equal parts.

    Args:
        tensor: A tensor, or lists, tuples and mappings of tensors.
        batch_size: The size of the batch.
        num_processes: Into how many parts it is to be cut.
        dim: The dimension of the batch. Tensors whose size along it is not `batch_size` stay as they are.

    Returns:
        The same structure; sizes along `dim` are the next multiple of `num_processes`.

    Raises:
        TypeError: when something in `tensor` is not a tensor.
        ValueError: when `num_processes` is not positive.
    """
    if num_processes < 1:
        raise ValueError(f"a batch is cut into at least one part; num_processes={num_processes}.")
    size = -(-batch_size // num_processes) * num_processes
    return map_tensors("pad_input_tensors", _pad_input, tensor, batch_size, size, dim)


def _pad_input(tensor: torch.Tensor, batch_size: int, size: int, dim: int) -> torch.Tensor:
    if size == batch_size or not _has_dim(tensor, dim) or tensor.shape[dim] != batch_size:
        return tensor
    return _pad_to(tensor, dim, size, 0)


# One process's tensor -----------------------------------------------------------------------------------------------


def copy_tensor_to_devices(tensor: torch.Tensor | None = None) -> torch.Tensor:
    """Gives every process a copy of the tensor that only one of them has.

    Unlike `broadcast`, the others need to know neither its shape nor which process has it.

    Args:
        tensor: The tensor on one process, None on all others.

    Returns:
        The tensor, on each process's own device.

    Raises:
        ValueError: on every process, unless exactly one has passed a tensor.
    """
    comm = current().collectives
    source, information = _only_tensor(comm, tensor)
    if tensor is None:
        wire = torch.empty(information.shape, dtype=information.dtype, device=comm.device)
    else:
        wire = tensor.detach().to(comm.device).contiguous()
    return comm.broadcast(wire, source)


def gather_tensor_shape(tensor: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """The shape, and the dtype's number in `TENSOR_TYPE_TO_INT`, of the tensor that only one process has.

    Args:
        tensor: The tensor on one process, None on all others.

    Returns:
        On every process: the shape as an int64 tensor, and the number.

    Raises:
        ValueError: on every process, unless exactly one has passed a tensor, of a dtype that has a number.
    """
    comm = current().collectives
    _, information = _only_tensor(comm, tensor)
    if information.dtype not in TENSOR_TYPE_TO_INT:
        raise ValueError(f"{information.dtype} has no number; those that have are {list(TENSOR_TYPE_TO_INT)}.")
    shape = torch.tensor(information.shape, dtype=torch.int64, device=comm.device)
    return shape, TENSOR_TYPE_TO_INT[information.dtype]


def _only_tensor(comm: Collectives, tensor: torch.Tensor | None) -> tuple[int, TensorInformation]:
    mine = None if tensor is None else TensorInformation(tensor.shape, tensor.dtype)
    found = comm.all_gather_object(mine)
    holders = [rank for rank, information in enumerate(found) if information is not None]
    if len(holders) != 1:
        raise ValueError(
            f"exactly one process passes a tensor here and the others None; processes {holders or 'none'} passed one."
        )
    information = found[holders[0]]
    assert information is not None
    return holders[0], information


# Objects ------------------------------------------------------------------------------------------------------------


def gather_object(object: Any) -> list[Any]:
    """Brings lists of any picklable objects together, on all processes.

    Args:
        object: A list (or another iterable); lengths may differ between processes.

    Returns:
        One list: the items of rank 0, of rank 1 and so on. On a single process: `object` itself.

    Raises:
        TypeError: when `object` is not iterable.

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
            f"gather_object joins the lists of all processes; it was given a {type(object).__name__} ({object!r}). "
            "Put it into a list: gather_object([value])."
        )
    return [item for items in comm.all_gather_object(object) for item in items]


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """Gives every process the objects of one of them, in place.

    Args:
        object_list: A list of picklable objects, of the same length on every process; its items are replaced.
        from_process: The rank whose objects all get.

    Returns:
        `object_list`.

    Raises:
        TypeError: when `object_list` is not a list.
        ValueError: when there is no such rank.
        DistributedOperationException: in debug mode, on every process, when the lengths differ.
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
    """Makes parameters whole inside its block, where DeepSpeed's ZeRO stage 3 has divided them over the processes.

    Does nothing to parameters that are not divided that way.

    Args:
        params: A parameter, or an iterable of parameters.
        modifier_rank: The rank whose changes to them are kept; None keeps nobody's.
        fwd_module: The module that uses the parameters, if they are gathered for its forward.
        enabled: False does nothing.
    """
    held = [params] if isinstance(params, torch.Tensor) else list(params)
    if not enabled or not any(hasattr(parameter, "ds_id") for parameter in held):
        yield
        return
    import deepspeed  # whoever divided them has it

    with deepspeed.zero.GatheredParameters(held, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield
