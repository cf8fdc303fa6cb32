"""Device-mesh helpers: flattened dimensions, broadcasts along them, and gradient norms over shards of all kinds.

A missing dimension counts as one of size 1. Gradients are averaged over the dimensions along which ranks see different
tokens; along ``tp`` they hold shards of one model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ...parallelism_config import MESH_DIMS
from ...runtime import devices
from ...runtime.collective_backend import Collectives, TorchCollectives
from ...runtime.tensors.dtensor import is_dtensor
from ...runtime.world import World

# Along these dimensions, ranks see different samples, or different tokens of one sample.
GRAD_REDUCE_DIMS = tuple(name for name in MESH_DIMS if name != "tp")


def flatten_dims(mesh: DeviceMesh | None, names: Sequence[str]) -> DeviceMesh | None:
    """Flattens some dimensions of a mesh into a one-dimensional submesh; None if the mesh has none of them."""
    there = tuple(name for name in names if mesh is not None and name in (mesh.mesh_dim_names or ()))
    if mesh is None or not there:
        return None
    return mesh[there[0]] if len(there) == 1 else mesh[there]._flatten("_".join(there))


def broadcast_model(model: nn.Module, world: World, mesh: DeviceMesh | None = None) -> None:
    """Broadcasts parameters and buffers of rank 0; DTensors, from the first rank with the same shard. Collective."""
    if world.size == 1:
        return
    averaged = flatten_dims(mesh, GRAD_REDUCE_DIMS)
    peers = None if averaged is None else _collectives(averaged, world.device)
    for value in {id(value): value.data for value in (*model.parameters(), *model.buffers())}.values():
        if not is_dtensor(value):
            _broadcast(value, world.collectives)
        elif peers is not None:
            _broadcast(local_tensor(value), peers)


def sync_rng(world: World, mesh: DeviceMesh | None) -> None:
    """Broadcasts torch's RNG state along ``tp``, so that these ranks draw the same dropout masks. Collective."""
    sharing = flatten_dims(mesh, ("tp",))
    if sharing is None:
        return
    peers = _collectives(sharing, world.device)
    sources: list[Any] = [torch]
    if world.device.type != "cpu":
        sources.append(devices.device_kind(world.device).torch_module())
    for source in sources:
        state = source.get_rng_state()
        source.set_rng_state(peers.broadcast(state.to(world.device)).to(state.device))


def _broadcast(value: Tensor, collectives: Collectives) -> None:
    sent = value.contiguous()
    collectives.broadcast(sent)
    if sent is not value:
        value.copy_(sent)


def _collectives(dimension: DeviceMesh, device: torch.device) -> Collectives:
    return TorchCollectives(device, dimension.get_group())


# Norms ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_grad_norm_(
    parameters: Any,
    max_norm: float,
    norm_type: float = 2,
    *,
    device: torch.device,
    shard_groups: Callable[[Tensor], tuple[ProcessGroup, ...]] | None = None,
) -> Tensor:
    """Clips the gradient norm as ``torch.nn.utils.clip_grad_norm_`` does, over shards of any kind. Collective.

    Args:
        parameters: Parameters whose gradients are clipped, in the same order on all ranks.
        max_norm: Maximum norm of all gradients together.
        norm_type: Exponent of the norm.
        device: Device of the all-reduces.
        shard_groups: Returns the groups over which a parameter is sharded; None means `shard_groups_of` its gradient.

    Returns:
        The norm before clipping, the same on all ranks.
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not params:
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
    by_groups: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    for param in params:  # a rank without gradients still joins the all-reduce
        gradient = reduced_grad(param)
        groups = (
            shard_groups(param)
            if shard_groups is not None
            else shard_groups_of(param if gradient is None else gradient)
        )
        found = by_groups.setdefault(groups, [])
        if gradient is not None and gradient.numel():
            found.append(local_tensor(gradient))
    trained = [param.dtype for param in params if param.requires_grad]  # frozen ones may be quantized, of any dtype
    dtype = functools.reduce(torch.promote_types, trained or [params[0].dtype])
    total = _total_norm(by_groups, float(norm_type), device).to(dtype)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_ does
    for gradients in filter(None, by_groups.values()):
        torch._foreach_mul_(gradients, scale.to(gradients[0].device))
    return total


@torch.no_grad()
def clip_grad_value_(parameters: Any, clip_value: float) -> None:
    """Clamps gradients as ``torch.nn.utils.clip_grad_value_`` does, over shards of any kind."""
    for param in [parameters] if isinstance(parameters, Tensor) else list(parameters):
        gradient = reduced_grad(param)
        if gradient is not None:
            local_tensor(gradient).clamp_(-clip_value, clip_value)


def _total_norm(
    by_groups: dict[tuple[ProcessGroup, ...], list[Tensor]], norm_type: float, device: torch.device
) -> Tensor:
    maximum = norm_type == float("inf")
    parts = []
    for groups, gradients in by_groups.items():
        part = torch.nn.utils.get_total_norm(gradients, norm_type).to(device, torch.float64)
        part = part if maximum else part**norm_type
        for group in groups:
            TorchCollectives(device, group).all_reduce(part, "max" if maximum else "sum")
        parts.append(part)
    return torch.stack(parts).max() if maximum else torch.stack(parts).sum() ** (1 / norm_type)


def shard_groups_of(tensor: Tensor) -> tuple[ProcessGroup, ...]:
    """Returns the process groups over which a tensor is sharded; empty for a plain or replicated tensor."""
    if not is_dtensor(tensor):
        return ()
    cut = (dim for dim, placement in enumerate(tensor.placements) if hasattr(placement, "dim"))
    return tuple(tensor.device_mesh.get_group(dim) for dim in cut)


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns the local tensor of a DTensor, which shares its memory; a plain tensor is returned as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def reduced_grad(param: Tensor) -> Tensor | None:
    """Returns a parameter's gradient; one with partial placements is all-reduced first."""
    gradient = param.grad
    if is_dtensor(gradient) and any(placement.is_partial() for placement in gradient.placements):
        from torch.distributed.tensor import Replicate

        whole = [Replicate() if placement.is_partial() else placement for placement in gradient.placements]
        param.grad = gradient = gradient.redistribute(placements=whole)
    return gradient
