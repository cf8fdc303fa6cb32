"""How the weights of rank 0 come to ranks that hold pieces of them: block by block, each rank keeping what is its own.

So no rank but rank 0 ever holds more than its pieces and a block, or with FSDP 1 the unit that is being cut.
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
        ValueError: If parameters of rank 0 are on the meta device, or those of another rank which cannot be sent.
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
                f"parameter {name!r} is on the meta device of rank {rank} and made of several tensors, which cannot be "
                "sent: load it on every rank (cpu_ram_efficient_loading=False)."
            )


def move_to_meta(
    model: nn.Module, upcast: Container[nn.Parameter] = (), only: Container[nn.Parameter] | None = None
) -> dict[str, nn.Parameter]:
    """Puts the model's parameters on the meta device, tied ones still tied, and gives back those it had, by name.

    Args:
        model: The model. What is a piece already, or stands for several tensors, stays as it is.
        wide: Parameters that become float32.
        only: Leave all other parameters as they are; None: lift every parameter.
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
    """Gives a lifted model, sharded by now, its memory, and the values that rank 0 had. Collective.

    No rank holds more on the device than its shards, what stays whole, and a block of `BLOCK_BYTES`.

    Args:
        model: The model. Whole parameters that were not lifted go to the device as the objects they are.
        lifted: What `move_to_meta` gave back; emptied on the way, so that rank 0 can release it.
        collectives: Of the run.
        device: Where parameters and buffers go.
        offload: Pieces go to the CPU.
    """
    there = torch.device("cpu") if offload else device
    broadcast_buffers(model, collectives, device)
    here = dict(model.named_parameters(remove_duplicate=False))
    sent = {here[name] for name in originals}
    for param in model.parameters():  # those that stay whole
        if not isinstance(param, DTensor):
            materialize_param(param, device)
            if param not in sent:
                broadcast_shard(param, param, collectives, device)
    # torch keeps a second reference to each piece, which follows on this road only.
    model._apply(lambda tensor: torch.empty_like(tensor, device=there) if tensor.is_meta else tensor)
    here = dict(model.named_parameters(remove_duplicate=False))
    for name in list(originals):
        broadcast_shard(originals.pop(name), here[name], collectives, device)


@torch.no_grad()
def broadcast_shard(
    source: torch.Tensor | None, target: torch.Tensor, collectives: Collectives, device: torch.device
) -> None:
    """Fills every rank's piece of a tensor with the values that rank 0 has of the whole. Collective.

    Args:
        source: The whole tensor; looked at on rank 0 only.
        target: A sharded tensor, or one that every rank has whole.
        collectives: Of the run.
        device: On which blocks are sent.
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
            block = mine  # all of it stays here
        else:
            block = torch.empty((stop - start, *target.shape[1:]), dtype=target.dtype, device=device)
        collectives.broadcast(block)
        if mine is not None and block is not mine and not (sends and source is target):
            within = (slice(first - start, last - start), *box[1:])
            mine.copy_(block[within])


def _local_shard(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """What this rank holds of a tensor, and where in the whole that lies."""
    ranges = [(0, size) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return tensor.detach(), tuple(slice(*limits) for limits in ranges)
    mesh, placements = tensor.device_mesh, tensor.placements
    # A strided piece is one of what the dimensions after it have left: it comes last.
    for dim in sorted(range(mesh.ndim), key=lambda dim: isinstance(placements[dim], _StridedShard)):
        cut = getattr(placements[dim], "dim", None)
        if cut is not None:
            start, stop = ranges[cut]
            size = -(-(stop - start) // mesh.size(dim))
            first = min(start + size * mesh.get_local_rank(dim), stop)
            ranges[cut] = first, min(first + size, stop)
    return tensor.to_local(), tuple(slice(*limits) for limits in ranges)


def broadcast_params(params: Iterable[nn.Parameter], collectives: Collectives, device: torch.device) -> None:
    """Gives whole parameters their memory on a device, and the values of rank 0. Collective."""
    for param in params:
        materialize_param(param, device)
        broadcast_shard(param, param, collectives, device)


def broadcast_buffers(model: nn.Module, collectives: Collectives, device: torch.device) -> None:
    """Gives the buffers of a model their memory on a device, and the values of rank 0. Collective."""
    fresh: dict[torch.Tensor, torch.Tensor] = {}  # a buffer may be in several places
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
    """Whether it stands for other tensors: a piece, or a number format that is made of several."""
    return is_traceable_wrapper_subclass(param.data)


def materialize_param(param: nn.Parameter, device: torch.device) -> None:
    """Puts a whole parameter on a device; one of the meta device gets any values, and stays the object it is."""
    if param.is_meta:
        torch.utils.swap_tensors(param, nn.Parameter(_empty(param, device), param.requires_grad))
    else:  # a layout of another order cannot be cut
        param.data = param.data.to(device).contiguous()


def _empty(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def initialize_meta_modules(
    model: nn.Module, param_init_fn: Callable[[nn.Module], object], device: torch.device
) -> None:
    """Has `param_init_fn` initialise each module that is on the meta device; parameters stay the objects they are."""
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
    """A function that initialises a module of `model` as `param_init_fn` does, and leaves tied parameters tied.

    Args:
        param_init_fn: Initialises one module, and may replace its parameters.
        model: The model as it is, tied.
        device: Where tied parameters go.
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
    """The places of each parameter: module and name there."""
    locations: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                locations.setdefault(param, []).append((module, name))
    return locations
