"""A rank's local state of models and optimizers: full tensors, DTensor shards, ranges of FSDP 1's flat parameters.

Every value has the FQN it has in the unwrapped model, and shares memory with the live state: it is saved from there and
loaded into there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...runtime.tensors.dtensor import is_dtensor
from .compat import EXTRA_STATE_KEY
from .shard_layout import LocalShard, ShardLayout, flat_range_to_layout, full_layout, local_shard

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def clean_fqn(name: str) -> str:
    """Removes the prefixes of wrappers (FSDP, activation checkpointing, torch.compile) from an FQN."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


# Models -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtraState:
    """The extra state of a module (`torch.nn.Module.get_extra_state`)."""

    module: nn.Module

    def set(self, value: Any) -> None:
        """Calls ``set_extra_state`` of the module."""
        self.module.set_extra_state(value)


def model_state(model: nn.Module) -> dict[str, Any]:
    """Returns `LocalShard` tensors and `ExtraState`, by FQN. FQNs of tied tensors map to the same object.

    Args:
        model: Model without DistributedDataParallel.
    """
    flat = _flat_param_shards(model)
    _reshard_unsharded(model)
    found: dict[int, LocalShard] = {}

    def of(tensor: torch.Tensor) -> LocalShard:
        if id(tensor) not in found:
            found[id(tensor)] = local_shard(tensor)
        return found[id(tensor)]

    state: dict[str, Any] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        prefix = clean_fqn(prefix)
        prefix += "." if prefix else ""
        for name, part in flat.get(module, {}).items():
            state[prefix + name] = part
        for name, tensor in (*module._parameters.items(), *_persistent_buffers(module)):
            if tensor is not None and prefix + name not in state and name != "_flat_param":
                state[prefix + name] = of(tensor)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            state[prefix + EXTRA_STATE_KEY] = ExtraState(module)
    return state


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    return ((n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set)


def _reshard_unsharded(model: nn.Module) -> None:
    """Reshards FSDP 2 modules that a forward without a backward left unsharded."""
    if unit_class := getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None):
        for unit in model.modules():
            if isinstance(unit, unit_class):
                unit.reshard()


def _flat_param_handles(model: nn.Module) -> list[Any]:
    """Returns the handles of FSDP 1's flat parameters, resharded if a forward without a backward left them unsharded."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._runtime_utils import _reshard

    handles = []
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        handle = unit._handle
        if handle is not None:
            if handle.uses_sharded_strategy and not handle.is_sharded(handle.flat_param):
                _reshard(unit, handle, True)
            handles.append(handle)
    return handles


def _local_flat_param(handle: Any) -> torch.Tensor:
    flat = handle.flat_param
    local: torch.Tensor = getattr(flat, "_local_shard", flat) if handle.uses_sharded_strategy else flat
    return local.detach()


def _flat_param_layouts(handle: Any) -> list[ShardLayout]:
    """Returns the layout of each original parameter within this rank's shard of a flat parameter."""
    flat = handle.flat_param
    is_writer = 0 in dist.get_process_group_ranks(handle.process_group)
    if not handle.uses_sharded_strategy:
        is_writer = dist.get_rank() == 0
    layouts = []
    for shape, info in zip(flat._shapes, flat._shard_param_infos, strict=True):
        if info.in_shard:
            first, last = info.intra_param_start_idx, info.intra_param_end_idx
            layouts.append(flat_range_to_layout(tuple(shape), first, last + 1, info.offset_in_shard, is_writer))
        else:
            layouts.append(ShardLayout(tuple(shape), (), False))
    return layouts


def _flat_param_shards(model: nn.Module) -> dict[nn.Module, dict[str, LocalShard]]:
    """Returns the shards of parameters that live in flat parameters: module -> name in it -> `LocalShard`."""
    found: dict[nn.Module, dict[str, LocalShard]] = {}
    for handle in _flat_param_handles(model):
        flat, local = handle.flat_param, _local_flat_param(handle)
        for info, layout in zip(flat._param_infos, _flat_param_layouts(handle), strict=True):
            found.setdefault(info.module, {})[info.param_name] = LocalShard(layout, local)
        for info in flat._shared_param_infos:
            found.setdefault(info.module, {})[info.param_name] = found[info.prim_module][info.prim_param_name]
    return found


# Optimizers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParamInfo:
    """A parameter as an optimizer holds it: an original parameter, or a flat parameter made of several.

    Attributes:
        tensor: The parameter.
        originals: (FQN, layout) of each original parameter in it.
        local_shape: Shape of this rank's part of optimizer states that have the shape of the parameter.
    """

    tensor: torch.Tensor
    originals: tuple[tuple[str, ShardLayout], ...]
    local_shape: tuple[int, ...]


@dataclass
class ParamIndex:
    """FQNs of the parameters of several models.

    Attributes:
        params: ``id`` of a parameter -> `ParamInfo`.
        aliases: FQN of a tied parameter -> its canonical FQN.
        positions: FQN -> its position in the model.
    """

    params: dict[int, ParamInfo] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)


def index_params(models: Sequence[nn.Module]) -> ParamIndex:
    """Indexes the parameters of models by FQN; with several models, the model's number is the first part of an FQN."""
    index = ParamIndex()
    for number, model in enumerate(models):
        prefix = f"{number}." if len(models) > 1 else ""
        params = _param_infos(model)
        first: dict[int, str] = {}
        for name, value in model_state(model).items():
            counts = first.setdefault(id(value), name)
            index.positions[prefix + name] = len(index.positions)
            if counts != name:
                index.aliases[prefix + name] = prefix + counts
        for tensor, originals, local_shape in params:
            prefixed = tuple((prefix + name, layout) for name, layout in originals)
            index.params[id(tensor)] = ParamInfo(tensor, prefixed, local_shape)
    return index


def _param_infos(model: nn.Module) -> Iterator[tuple[torch.Tensor, list[tuple[str, ShardLayout]], tuple[int, ...]]]:
    modules = {module: clean_fqn(prefix) for prefix, module in model.named_modules()}
    done: set[int] = set()
    for handle in _flat_param_handles(model):
        flat, layouts = handle.flat_param, _flat_param_layouts(handle)
        fqns = [f"{modules[info.module]}.{info.param_name}".lstrip(".") for info in flat._param_infos]
        if flat._params is None:
            done.add(id(flat))
            yield flat, list(zip(fqns, layouts, strict=True)), tuple(_local_flat_param(handle).shape)
        else:
            for param, name, layout in zip(flat._params, fqns, layouts, strict=True):
                done.add(id(param))
                yield param, [(name, layout.rebased())], tuple(param.shape)
    for name, param in model.named_parameters():
        if id(param) not in done:
            of = local_shard(param)
            yield param, [(clean_fqn(name), of.layout)], tuple(of.local.shape)


def trainable_params(model: nn.Module) -> set[str]:
    """Returns the FQNs of parameters that require gradients."""
    return {name for tensor, originals, _ in _param_infos(model) if tensor.requires_grad for name, _ in originals}


def resolve_param_groups(optimizer: Any, models: Sequence[nn.Module]) -> tuple[list[list[ParamInfo]], ParamIndex]:
    """Returns the parameters of an optimizer's groups, and their FQNs in the models.

    Raises:
        ValueError: if a parameter belongs to none of the models.
    """
    params = {id(param) for group in optimizer.param_groups for param in group["params"]}
    used = [model for model in models if any(id(param) in params for param in _all_params(model))]
    index = index_params(used)
    lost = params - index.params.keys()
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(params)} parameters of {type(optimizer).__name__} belong to no prepared model, and have "
            "no FQN to save their states under: prepare the model together with the optimizer."
        )
    return [[index.params[id(param)] for param in group["params"]] for group in optimizer.param_groups], index


def _all_params(model: nn.Module) -> Iterator[torch.Tensor]:
    for handle in _flat_param_handles(model):
        yield handle.flat_param
        yield from handle.flat_param._params or ()
    yield from model.parameters()


def group_fqns(groups: Iterable[Sequence[ParamInfo]], index: ParamIndex) -> list[list[str]]:
    """Returns the FQNs of each group, in the order of the model where flat parameters hold several."""
    found = []
    for group in groups:
        own = [name for param in group for name, _ in param.originals]
        if any(len(param.originals) > 1 for param in group):
            own.sort(key=lambda name: index.positions[name])
        found.append(own)
    return found


def optimizer_state(optimizer: Any, groups: Iterable[Sequence[ParamInfo]]) -> dict[tuple[str, str], Any]:
    """Returns (FQN, key) -> `LocalShard` tensors, and other values on the rank that saves them."""
    state: dict[tuple[str, str], Any] = {}
    for group in groups:
        for param in group:
            for key, value in optimizer.state.get(param.tensor, {}).items():
                for name, layout in param.originals:
                    if (one := _local_value(value, param, layout)) is not None:
                        state[name, key] = one
    return state


def _local_value(value: Any, param: ParamInfo, layout: ShardLayout) -> Any:
    if not isinstance(value, torch.Tensor):
        return value if layout.writes_scalars else None
    if is_dtensor(value):
        return local_shard(value)
    if value.dim() and tuple(value.shape) == param.local_shape:
        return LocalShard(layout, value.detach())
    return LocalShard(full_layout(tuple(value.shape), layout.writes_scalars), value.detach())
