"""Documented functions of FSDP version 2, for scripts that prepare models by hand.

Each delegates to the strategy of the given `Accelerator`, or to its building blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..checkpointing.errors import bullet_list
from ..checkpointing.sharded.compat import compare_weights, group_ties, tied_names
from ..checkpointing.sharded.local_state import clean_fqn
from ..checkpointing.storage.formats import shared_tensor_names
from ..precision.loss_scale import LossScaler
from ..runtime import world
from .fsdp_base import FSDPStrategy
from .parallel.materialize import broadcast_shard, ensure_weights_retied

__all__ = [
    "ensure_weights_retied",
    "fsdp2_apply_ac",
    "fsdp2_canonicalize_names",
    "fsdp2_load_full_state_dict",
    "fsdp2_prepare_model",
    "fsdp2_switch_optimizer_parameters",
    "get_fsdp2_grad_scaler",
]


def fsdp2_prepare_model(accelerator: Any, model: nn.Module) -> nn.Module:
    """Shards a model by the accelerator's FSDP plugin, as `Accelerator.prepare_model` does.

    Args:
        accelerator: Of a run with ``fsdp_version=2``.
        model: Model, which may be sharded already.

    Raises:
        ValueError: for a run without FSDP 2, and for a model that cannot be sharded.
    """
    _strategy(accelerator)
    prepared: nn.Module = accelerator.prepare_model(model)
    return prepared


def fsdp2_apply_ac(accelerator: Any, model: nn.Module) -> nn.Module:
    """Applies activation checkpointing to the units of a model, if the plugin enables it.

    Args:
        accelerator: Of a run with ``fsdp_version=2``.
        model: Model before sharding; changed in place.
    """
    strategy = _strategy(accelerator)
    strategy.apply_activation_checkpointing(strategy.select_wrap_modules(model))
    return model


def fsdp2_load_full_state_dict(
    accelerator: Any, model: nn.Module, full_sd: dict[str, Any], cpu_offload: bool = False
) -> None:
    """Loads a full state dict of rank 0 into a sharded model. Collective.

    Tensors are broadcast block by block, and each rank keeps its shards.

    Args:
        accelerator: Of a run with ``fsdp_version=2``.
        model: Sharded model, possibly on the meta device.
        full_sd: Full state dict on rank 0; ignored on other ranks.
        cpu_offload: Whether to put the shards on the CPU.

    Raises:
        ValueError: naming missing and unexpected keys, and tensors of other shapes.
    """
    here = world.current()
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    targets = bare.state_dict(keep_vars=True)
    tied = tied_names(targets)
    wrong: list[Any] = [None]
    if here.rank == 0:
        wrong = [
            compare_weights(
                "full_sd", type(bare).__name__, targets, full_sd, tied, group_ties(shared_tensor_names(full_sd))
            )
        ]
    here.collectives.broadcast_object_list(wrong)
    if wrong[0]:
        raise ValueError(f"the state does not fit {type(bare).__name__}:\n{bullet_list(wrong[0])}")
    there = torch.device("cpu") if cpu_offload else here.device
    if any(tensor.is_meta for tensor in targets.values()):
        bare._apply(lambda tensor: torch.empty_like(tensor, device=there) if tensor.is_meta else tensor)
        targets = bare.state_dict(keep_vars=True)
    for name, target in targets.items():
        source = None
        if here.rank == 0:
            source = next(full_sd[one] for one in (name, *sorted(tied.get(name, ()))) if one in full_sd)
        broadcast_shard(source, target.detach(), here.collectives, here.device)


def fsdp2_switch_optimizer_parameters(optimizer: torch.optim.Optimizer, mapping: Mapping[Any, torch.Tensor]) -> None:
    """Replaces the parameters of an optimizer by the sharded ones.

    Args:
        optimizer: An optimizer that has not stepped yet.
        mapping: Original parameter, or its ``data_ptr()``, -> the sharded one.

    Raises:
        KeyError: if a parameter of the optimizer is not in the mapping; nothing has changed then.
    """
    known = dict(mapping)
    sharded = {id(param) for param in known.values()}
    switched: dict[int, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            found = known.get(param)
            if found is None and not isinstance(param, DTensor):
                found = known.get(param.data_ptr())
            if found is None and id(param) not in sharded:
                raise KeyError(
                    f"a parameter of {type(optimizer).__name__} of shape {tuple(param.shape)} is not in the mapping: it "
                    "belongs to a model that was not sharded."
                )
            switched[id(param)] = param if found is None else found
    for group in optimizer.param_groups:
        group["params"] = [switched[id(param)] for param in group["params"]]


def fsdp2_canonicalize_names(named_params: dict[str, Any]) -> dict[str, Any]:
    """Returns the dict with the FQNs of the plain model, without prefixes of wrappers.

    Args:
        named_params: Name -> anything.
    """
    return {clean_fqn(name): value for name, value in named_params.items()}


def get_fsdp2_grad_scaler(**kwargs: Any) -> torch.amp.GradScaler:
    """Returns a gradient scaler that synchronizes overflows between ranks.

    Args:
        **kwargs: For `torch.amp.GradScaler`.
    """
    here = world.current()
    scaler = LossScaler(**{"device": here.device.type, **kwargs})
    scaler.peers = here.collectives
    return scaler


def _strategy(accelerator: Any) -> FSDPStrategy:
    strategy = accelerator.strategy
    if not isinstance(strategy, FSDPStrategy) or strategy.plugin.fsdp_version != 2:
        raise ValueError(
            f"this is for runs with fsdp_version=2, and this one is {accelerator.distributed_type.value}: pass "
            "fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2), or use accelerator.prepare."
        )
    return strategy
