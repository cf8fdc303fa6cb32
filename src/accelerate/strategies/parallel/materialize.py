"""Materializes sharded models: the weights of rank 0 are broadcast block by block, and each rank keeps its shards.

No rank but rank 0 holds more than its shards and one block; with FSDP 1, its shards and the unit that is being wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...runtime.collective_backend import Collectives

BLOCK_BYTES = 4 * 2**20


def check_weights(models: Iterable[nn.Module], collectives: Collectives) -> None:
    """Raises unless every rank can start from the weights of rank 0. Collective.

    Raises:
        ValueError: if parameters of rank 0 are on the meta device, or tensor subclasses of another rank are.
    """
    empty = [(name, param) for model in models for name, param in model.named_parameters() if param.is_meta]
    lacking = next((name for name, _ in empty), None)
    composed = next((name for name, param in empty if is_tensor_subclass(param)), None)
    found = collectives.all_gather_object((lacking, composed))
    if found[0][0] is not None:
        raise ValueError(
            f"parameter {found[0][0]!r} is on the meta device of rank 0 and holds no values: load the weights there "
            "before `prepare`; the other ranks receive them."
        )
    for rank, (_, name) in enumerate(found):
        if name is not None:
            raise ValueError(
                f"parameter {name!r} is on the meta device of rank {rank} and a tensor subclass, which cannot be "
                "broadcast: load it on every rank (cpu_ram_efficient_loading=False)."
            )


def move_to_meta(
    model: nn.Module, upcast: Container[nn.Parameter] = (), only: Container[nn.Parameter] | None = None
) -> dict[str, nn.Parameter]:
    """Replaces a model's parameters with meta tensors, and returns the original parameters by FQN. Tied ones stay tied.

    Args:
        model: The model. Parameters that are tensor subclasses, such as DTensors, are kept.
        upcast: Parameters that become float32.
        only: Parameters to move; None means all.
    """
    originals: dict[str, nn.Parameter] = {}
    meta_params: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is None or is_tensor_subclass(param) or (only is not None and param not in only):
                continue
            if param not in meta_params:
                dtype = torch.float32 if param in upcast else param.dtype
                empty = torch.empty(param.shape, dtype=dtype, device="meta")
                meta_params[param] = nn.Parameter(empty, param.requires_grad)
                originals[f"{path}.{name}" if path else name] = param
            module._parameters[name] = meta_params[param]
    return originals


def materialize_and_broadcast(
    model: nn.Module, originals: dict[str, nn.Parameter], collectives: Collectives, device: torch.device, offload: bool
) -> None:
    """Allocates a sharded model that is on the meta device, and broadcasts the values of rank 0 to it. Collective.

    On the device, a rank holds its shards, unsharded parameters and one block of `BLOCK_BYTES`.

    Args:
        model: The model. Unsharded parameters that were not moved to the meta device keep their identity.
        originals: Parameters that `move_to_meta` returned; emptied on the way, to free memory of rank 0.
        collectives: Collectives of the run.
        device: Target device of parameters and buffers.
        offload: Whether shards stay on the CPU.
    """
    there = torch.device("cpu") if offload else device
    broadcast_buffers(model, collectives, device)
    here = dict(model.named_parameters(remove_duplicate=False))
    sent = {here[name] for name in originals}
    for param in model.parameters():  # unsharded ones
        if not isinstance(param, DTensor):
            materialize_param(param, device)
            if param not in sent:
                broadcast_shard(param, param, collectives, device)
    # fully_shard keeps a second reference to each shard, which only _apply updates.
    model._apply(lambda tensor: torch.empty_like(tensor, device=there) if tensor.is_meta else tensor)
    here = dict(model.named_parameters(remove_duplicate=False))
    for name in list(originals):
        broadcast_shard(originals.pop(name), here[name], collectives, device)


@torch.no_grad()
def broadcast_shard(
    source: torch.Tensor | None, target: torch.Tensor, collectives: Collectives, device: torch.device
) -> None:
    """Broadcasts a full tensor of rank 0 block by block; each rank copies the rows of its own shard. Collective.

    Args:
        source: Full tensor; read on rank 0 only.
        target: DTensor or plain tensor of the same global shape.
        collectives: Collectives of the run.
        device: Device of the blocks.
    """
    if target.ndim == 0:
        target, source = target.view(1), source if source is None else source.view(1)
    sends = collectives.rank == 0 and source is not None
    local, box = _local_shard(target)
    rows = max(1, BLOCK_BYTES // max(1, target.dtype.itemsize * target.shape[1:].numel()))
    for start in range(0, target.shape[0], rows):
        stop = min(start + rows, target.shape[0])
        first, last = max(start, box[0].start), min(stop, box[0].stop)
        mine = local[first - box[0].start : last - box[0].start] if first < last else None
        if sends and source is not None:
            block = source.detach()[start:stop].to(device, target.dtype).contiguous()
        elif mine is not None and mine.shape == (stop - start, *target.shape[1:]) and mine.device == device:
            block = mine  # received in place
        else:
            block = torch.empty((stop - start, *target.shape[1:]), dtype=target.dtype, device=device)
        collectives.broadcast(block)
        if mine is not None and block is not mine and not (sends and source is target):
            within = (slice(first - start, last - start), *box[1:])
            mine.copy_(block[within])


def _local_shard(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """Returns the local tensor of this rank, and its range in each dimension of the full tensor."""
    ranges = [(0, size) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return tensor.detach(), tuple(slice(*limits) for limits in ranges)
    mesh, placements = tensor.device_mesh, tensor.placements
    # A strided shard divides the result of the mesh dimensions after it, so it comes last.
    for dim in sorted(range(mesh.ndim), key=lambda dim: isinstance(placements[dim], _StridedShard)):
        cut = getattr(placements[dim], "dim", None)
        if cut is not None:
            start, stop = ranges[cut]
            size = -(-(stop - start) // mesh.size(dim))
            first = min(start + size * mesh.get_local_rank(dim), stop)
            ranges[cut] = first, min(first + size, stop)
    return tensor.to_local(), tuple(slice(*limits) for limits in ranges)


def broadcast_params(params: Iterable[nn.Parameter], collectives: Collectives, device: torch.device) -> None:
    """Moves or allocates unsharded parameters on a device, and broadcasts the values of rank 0. Collective."""
    for param in params:
        materialize_param(param, device)
        broadcast_shard(param, param, collectives, device)


def broadcast_buffers(model: nn.Module, collectives: Collectives, device: torch.device) -> None:
    """Moves or allocates the buffers of a model on a device, and broadcasts the values of rank 0. Collective."""
    fresh: dict[torch.Tensor, torch.Tensor] = {}  # a buffer may be registered in several modules
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if buffer not in fresh:
                    there = _empty(buffer, device) if buffer.is_meta else buffer.to(device).contiguous()
                    broadcast_shard(there, there, collectives, device)
                    fresh[buffer] = fresh[there] = there
                module._buffers[name] = fresh[buffer]


# Memory --------------------------------------------------------------------------------------------------------------


def is_tensor_subclass(param: torch.Tensor) -> bool:
    """Returns whether a parameter is a wrapper of other tensors: a DTensor, or a quantized tensor."""
    return is_traceable_wrapper_subclass(param.data)


def materialize_param(param: nn.Parameter, device: torch.device) -> None:
    """Moves an unsharded parameter to a device; a meta parameter gets uninitialized memory. The object stays the same."""
    if param.is_meta:
        torch.utils.swap_tensors(param, nn.Parameter(_empty(param, device), param.requires_grad))
    else:  # other memory formats cannot be sharded
        param.data = param.data.to(device).contiguous()


def _empty(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def initialize_meta_modules(
    model: nn.Module, param_init_fn: Callable[[nn.Module], object], device: torch.device
) -> None:
    """Calls `param_init_fn` for each module on the meta device; parameters keep their identity."""
    locations = {param: places for param, places in _param_locations(model).items() if param.is_meta}
    initialize = ensure_weights_retied(param_init_fn, model, device)
    for module in model.modules():
        if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            initialize(module)
    for param, places in locations.items():
        module, name = places[0]
        fresh = module._parameters[name]
        if fresh is not None and fresh is not param:
            torch.utils.swap_tensors(param, fresh)
            for module, name in places:
                module._parameters[name] = param


def ensure_weights_retied(
    param_init_fn: Callable[[nn.Module], object], model: nn.Module, device: torch.device
) -> Callable[[nn.Module], None]:
    """Wraps `param_init_fn` so that tied parameters stay tied.

    Args:
        param_init_fn: Initializes one module, and may replace its parameters.
        model: Model with tied parameters.
        device: Target device of tied parameters.
    """
    tied = {place: param for param, places in _param_locations(model).items() if len(places) > 1 for place in places}
    fresh: dict[nn.Parameter, nn.Parameter] = {}

    def initialize_and_retie(module: nn.Module) -> None:
        param_init_fn(module)
        for name, param in module._parameters.items():
            group = tied.get((module, name))
            if param is not None and group is not None:
                placed = param if param.device == device else nn.Parameter(param.to(device), param.requires_grad)
                module._parameters[name] = fresh.setdefault(group, placed)

    return initialize_and_retie


def _param_locations(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Maps each parameter to its modules, and its name in each."""
    locations: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                locations.setdefault(param, []).append((module, name))
    return locations
