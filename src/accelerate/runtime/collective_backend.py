"""Collectives over tensors and objects: a single process, torch.distributed, or torch_xla.

`World` holds one `Collectives`, and callers never branch on its class. The base class is the single process, whose
collectives return their input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_T = TypeVar("_T")

# Renamed in torch 2.13.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# dtypes that every backend supports; tensors of others (bool, int16, float8 …) are sent as uint8.
_NATIVE_DTYPES = frozenset(
    {
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    }
)


class Collectives:
    """Collectives of a single process, and base class of the others.

    Attributes:
        rank: This process's rank in the group.
        size: Number of ranks in the group.
        device: The device on which tensors are communicated.
        group: The process group; None for the default one, and for a single process.
    """

    group: ProcessGroup | None = None

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device = device
        self.rank = rank
        self.size = size

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-gathers tensors of equal shape, concatenated along dimension 0; scalars become a vector of `size`."""
        return tensor.reshape(1) if tensor.ndim == 0 else tensor

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduces `tensor` over the ranks in place by ``sum``, ``max`` or ``min``, and returns it."""
        return tensor

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Overwrites `tensor` with that of rank `src`, of the same shape and dtype, and returns it."""
        return tensor

    def all_gather_object(self, obj: _T) -> list[_T]:
        """Returns every rank's object, in rank order. Objects are pickled, which is safe between ranks of one run."""
        return [obj]

    def broadcast_object_list(self, objects: list[Any], src: int = 0) -> list[Any]:
        """Overwrites the items of `objects` with those of rank `src`, and returns the list."""
        return objects

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Sends bytes (a tensor on `device`) to one rank, which receives them."""
        raise RuntimeError(f"rank {to} cannot be sent anything: these ranks talk all together or not at all")

    def receive(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """`tensor`, in place: what rank `source` sends."""
        raise RuntimeError(f"rank {source} cannot send anything: these ranks talk all together or not at all")

    def barrier(self) -> None:
        """Blocks until every rank has called it."""


class TorchCollectives(Collectives):
    """Ranks of a torch.distributed process group."""

    _OPS: ClassVar = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

    def __init__(self, device: torch.device, group: ProcessGroup | None = None) -> None:
        super().__init__(device, dist.get_rank(group), dist.get_world_size(group))
        self.group = group
        # `barrier` takes device_ids with NCCL only; in a group with gloo as well, gloo runs the barrier.
        self._names_device = dist.get_backend(group) == "nccl"

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if tensor.ndim == 0:
            tensor = tensor.reshape(1)
        elif not tensor.is_contiguous():
            tensor = tensor.contiguous()
        if tensor.dtype not in _NATIVE_DTYPES:
            return self.all_gather(tensor.view(torch.uint8)).view(tensor.dtype)
        out = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        _all_gather_single(out, tensor, group=self.group)
        return out

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        dist.all_reduce(tensor, self._OPS[op], group=self.group)
        return tensor

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        wire = tensor
        # torch 2.6's gloo does not broadcast complex dtypes.
        carried = tensor.dtype in _NATIVE_DTYPES and not tensor.is_complex()
        if not carried and tensor.is_contiguous():
            wire = tensor.reshape(-1).view(torch.uint8)  # a view; scalars cannot be viewed in another size
        dist.broadcast(wire, self._global_rank(src), group=self.group)
        return tensor

    def all_gather_object(self, obj: _T) -> list[_T]:
        objects: list[Any] = [None] * self.size
        dist.all_gather_object(objects, obj, group=self.group)
        return objects

    def broadcast_object_list(self, objects: list[Any], src: int = 0) -> list[Any]:
        dist.broadcast_object_list(objects, self._global_rank(src), group=self.group, device=self.device)
        return objects

    def send(self, tensor: torch.Tensor, to: int) -> None:
        dist.send(tensor, self._global_rank(to), group=self.group)

    def receive(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        dist.recv(tensor, self._global_rank(source), group=self.group)
        return tensor

    def barrier(self) -> None:
        device_ids = [self.device.index] if self._names_device and self.device.index is not None else None
        dist.barrier(group=self.group, device_ids=device_ids)

    def _global_rank(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class XlaCollectives(Collectives):
    """Ranks of a torch_xla run, by the API of torch_xla 2.9: a process drives one device, or all of them with SPMD."""

    def __init__(self, device: torch.device) -> None:
        import torch_xla.runtime as xr

        super().__init__(device, xr.global_ordinal(), xr.world_size())

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch_xla.core.xla_model as xm

        return xm.all_gather(super().all_gather(tensor).contiguous())

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        import torch_xla.core.xla_model as xm

        xm.all_reduce(op, [tensor])
        return tensor

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        import torch_xla.core.xla_model as xm

        xm.collective_broadcast([tensor], root_ordinal=src)
        return tensor

    def all_gather_object(self, obj: _T) -> list[_T]:
        import torch_xla.core.xla_model as xm

        result: list[_T] = xm.mesh_reduce("accelerate.all_gather_object", obj, list)
        return result

    def broadcast_object_list(self, objects: list[Any], src: int = 0) -> list[Any]:
        objects[:] = self.all_gather_object(list(objects))[src]
        return objects

    def barrier(self) -> None:
        import torch_xla.core.xla_model as xm

        xm.rendezvous("accelerate.barrier")
