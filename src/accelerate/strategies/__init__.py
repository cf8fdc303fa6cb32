"""One strategy object per way of distributing. `choose` looks it up; nobody else asks which one it is.

A strategy is a row here and a file beside this one. Other distributions add theirs through the entry-point group
``accelerate.strategies``, named after a member of `DistributedType`.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from ..settings.enums import DistributedType
from .base import Bundle, RunSettings, Strategy

if TYPE_CHECKING:
    from ..parallelism_config import ParallelismConfig
    from ..settings.plugins.fsdp import FullyShardedDataParallelPlugin
    from ..settings.resolve_args import Plugins

__all__ = ["STRATEGIES", "Bundle", "RunSettings", "Strategy", "choose"]

_ALONE = "accelerate.strategies.base:Strategy"
_DDP = "accelerate.strategies.ddp:DataParallel"
_TENSORS = "accelerate.strategies.tensor_parallel:TensorParallel"

STRATEGIES: dict[DistributedType, str] = {
    DistributedType.NO: _ALONE,
    DistributedType.MULTI_CPU: _DDP,
    DistributedType.MULTI_GPU: _DDP,
    DistributedType.MULTI_NPU: _DDP,
    DistributedType.MULTI_MLU: _DDP,
    DistributedType.MULTI_SDAA: _DDP,
    DistributedType.MULTI_MUSA: _DDP,
    DistributedType.MULTI_XPU: _DDP,
    DistributedType.MULTI_HPU: _DDP,
    DistributedType.MULTI_NEURON: _DDP,
    DistributedType.FSDP: "accelerate.strategies.fsdp2:FullyShard",
}
# On a mesh with this dimension, another takes its place. (Before the run is joined, ranks are not known yet.)
_ON_MESH = {
    (_ALONE, "dp_replicate"): _DDP,
    (_ALONE, "cp"): _DDP,
    (_ALONE, "sp"): _DDP,
    (_ALONE, "tp"): _TENSORS,
    (_DDP, "tp"): _TENSORS,
}
# Of a way that comes in versions, those with a file of their own.
_VERSIONS = {(DistributedType.FSDP, 1): "accelerate.strategies.fsdp1:FlatShards"}


# What asks for a way of distributing, for the message.
_ASKED_BY = {
    DistributedType.DEEPSPEED: "deepspeed_plugin (--use_deepspeed)",
    DistributedType.MEGATRON_LM: "megatron_lm_plugin (--use_megatron_lm)",
}


def choose(
    kind: DistributedType,
    mesh: ParallelismConfig | None = None,
    plugins: Plugins | None = None,
    fsdp: FullyShardedDataParallelPlugin | None = None,
) -> type[Strategy]:
    """The strategy class for a way of distributing.

    Args:
        kind: The way.
        mesh: The sizes of the device mesh, which the strategy must serve.
        plugins: How it is to be done, which the strategy must be able to.
        fsdp: Of the plugins, the one that says which version; for a run whose plugins have been checked.

    Raises:
        ValueError: when neither this version nor an installed distribution has one.
    """
    found = _installed(kind) or _ours(kind, mesh, fsdp if plugins is None else plugins.fsdp)
    if plugins is not None:
        found.check_settings(plugins)
    beyond = [] if mesh is None else [name for name in mesh.active_mesh_dims if name not in found.dimensions]
    if beyond:
        sizes = ", ".join(f"{name}_size={getattr(mesh, f'{name}_size')}" for name in beyond)
        why = next((reason for name, reason in _WHY.items() if name in beyond), _NOT_YET)
        raise ValueError(f"parallelism_config (--use_parallelism_config) asks for {sizes}: {why}")
    if mesh is not None:
        found.check_sizes(mesh)
    return found


def _installed(kind: DistributedType) -> type[Strategy] | None:
    for entry in entry_points(group="accelerate.strategies", name=kind.value):
        strategy: type[Strategy] = entry.load()
        return strategy
    return None


def _ours(
    kind: DistributedType, mesh: ParallelismConfig | None, fsdp: FullyShardedDataParallelPlugin | None
) -> type[Strategy]:
    if kind not in STRATEGIES:
        raise ValueError(f"{_ASKED_BY.get(kind, 'the device')} asks for distributed type {kind.value}: {_NOT_YET}")
    version = None if fsdp is None else fsdp.fsdp_version
    path = _VERSIONS.get((kind, version or 2), STRATEGIES[kind])
    for dimension in [] if mesh is None else mesh.active_mesh_dims:
        path = _ON_MESH.get((path, dimension), path)
    module, name = path.split(":")
    found: type[Strategy] = getattr(importlib.import_module(module), name)
    return found


_NOT_YET = (
    "that is not part of this version, which trains on one process, on data-parallel ranks (DDP) and fully sharded "
    "(FSDP)."
)
_SECOND_ONLY = "with fully sharded training it needs version 2 (fsdp_version=2, --fsdp_version 2)."
_WHY = {
    "dp_shard": "shards are what fully sharded training has: pass fsdp_plugin as well (--use_fsdp).",
    "cp": _SECOND_ONLY,
    "sp": _SECOND_ONLY,
    "tp": _SECOND_ONLY,
}
