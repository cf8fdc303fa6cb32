"""One strategy class per backend of distributed training; `select_strategy` looks it up.

A strategy is a row here and a file beside this one. Other distributions add theirs through the entry-point group
``accelerate.strategies``, named after a member of `DistributedType`.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from ..settings.enums import DistributedType
from .base import Bundle, Strategy, StrategyConfig

if TYPE_CHECKING:
    from ..parallelism_config import ParallelismConfig
    from ..settings.plugins.fsdp import FullyShardedDataParallelPlugin
    from ..settings.resolve_args import Plugins

__all__ = ["STRATEGIES", "Bundle", "StrategyConfig", "Strategy", "select_strategy"]

_SINGLE = "accelerate.strategies.base:Strategy"
_DDP = "accelerate.strategies.ddp:DDPStrategy"
_TP = "accelerate.strategies.tensor_parallel:TensorParallelStrategy"

STRATEGIES: dict[DistributedType, str] = {
    DistributedType.NO: _SINGLE,
    DistributedType.MULTI_CPU: _DDP,
    DistributedType.MULTI_GPU: _DDP,
    DistributedType.MULTI_NPU: _DDP,
    DistributedType.MULTI_MLU: _DDP,
    DistributedType.MULTI_SDAA: _DDP,
    DistributedType.MULTI_MUSA: _DDP,
    DistributedType.MULTI_XPU: _DDP,
    DistributedType.MULTI_HPU: _DDP,
    DistributedType.MULTI_NEURON: _DDP,
    DistributedType.FSDP: "accelerate.strategies.fsdp2:FSDP2Strategy",
}
# Replacements on a mesh with a dimension, also used before the process group is initialized.
_ON_MESH = {
    (_SINGLE, "dp_replicate"): _DDP,
    (_SINGLE, "cp"): _DDP,
    (_SINGLE, "sp"): _DDP,
    (_SINGLE, "tp"): _TP,
    (_DDP, "tp"): _TP,
}
# Backend versions with a class of their own.
_VERSIONS = {(DistributedType.FSDP, 1): "accelerate.strategies.fsdp1:FSDP1Strategy"}


# Setting that requests a distributed type, for errors.
_REQUESTED_BY = {
    DistributedType.DEEPSPEED: "deepspeed_plugin (--use_deepspeed)",
    DistributedType.MEGATRON_LM: "megatron_lm_plugin (--use_megatron_lm)",
}


def select_strategy(
    kind: DistributedType,
    parallelism_config: ParallelismConfig | None = None,
    plugins: Plugins | None = None,
    fsdp: FullyShardedDataParallelPlugin | None = None,
) -> type[Strategy]:
    """Returns the strategy class for a distributed type.

    Args:
        kind: The distributed type.
        parallelism_config: Sizes of the device mesh, which the strategy must support.
        plugins: Plugins of the run, which the strategy must support.
        fsdp: FSDP plugin with the version, for a run whose plugins were checked before.

    Raises:
        ValueError: if neither this version nor an installed distribution has one.
    """
    strategy = _from_entry_points(kind) or _builtin(kind, parallelism_config, fsdp if plugins is None else plugins.fsdp)
    if plugins is not None:
        strategy.check_plugins(plugins)
    unsupported = (
        []
        if parallelism_config is None
        else [name for name in parallelism_config.active_mesh_dims if name not in strategy.supported_mesh_dims]
    )
    if unsupported:
        sizes = ", ".join(f"{name}_size={getattr(parallelism_config, f'{name}_size')}" for name in unsupported)
        reason = next((cause for name, cause in _REASONS.items() if name in unsupported), _UNSUPPORTED)
        raise ValueError(f"parallelism_config (--use_parallelism_config) asks for {sizes}: {reason}")
    if parallelism_config is not None:
        strategy.check_parallelism(parallelism_config)
    return strategy


def _from_entry_points(kind: DistributedType) -> type[Strategy] | None:
    for entry in entry_points(group="accelerate.strategies", name=kind.value):
        strategy: type[Strategy] = entry.load()
        return strategy
    return None


def _builtin(
    kind: DistributedType,
    parallelism_config: ParallelismConfig | None,
    fsdp: FullyShardedDataParallelPlugin | None,
) -> type[Strategy]:
    if kind not in STRATEGIES:
        source = _REQUESTED_BY.get(kind, "the device")
        raise ValueError(f"{source} asks for distributed type {kind.value}: {_UNSUPPORTED}")
    version = None if fsdp is None else fsdp.fsdp_version
    path = _VERSIONS.get((kind, version or 2), STRATEGIES[kind])
    for dimension in [] if parallelism_config is None else parallelism_config.active_mesh_dims:
        path = _ON_MESH.get((path, dimension), path)
    module, name = path.split(":")
    strategy: type[Strategy] = getattr(importlib.import_module(module), name)
    return strategy


_UNSUPPORTED = (
    "that is not part of this version, which trains on one process, on data-parallel ranks (DDP) and fully sharded "
    "(FSDP)."
)
_NEEDS_FSDP2 = "with fully sharded training it needs version 2 (fsdp_version=2, --fsdp_version 2)."
_REASONS = {
    "dp_shard": "shards are what fully sharded training has: pass fsdp_plugin as well (--use_fsdp).",
    "cp": _NEEDS_FSDP2,
    "sp": _NEEDS_FSDP2,
    "tp": _NEEDS_FSDP2,
}
