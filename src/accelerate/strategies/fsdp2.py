"""Fully sharded training with torch's `fully_shard` (FSDP, version 2): each rank holds a shard of every parameter.

A unit is gathered for its forward and backward and freed again; gradients are averaged and sharded as backward produces
them. Parameters are replaced when a model is prepared, so optimizers made before are given the new ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..runtime.forward import is_compiled_module
from ..runtime.world import World
from .base import RunSettings
from .sharding import ShardedStrategy, checkpoint_activations, is_half

if TYPE_CHECKING:
    from ..settings.arguments import Plugins


class FullyShard(ShardedStrategy):
    """Every rank holds a shard of the model, of its gradients and of its optimizers' states."""

    @classmethod
    def check_settings(cls, plugins: Plugins) -> None:
        plugin = plugins.fsdp
        if plugin is None:
            return
        offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        for name, asked in (
            ("cpu_offload", offloads),
            ("activation_checkpointing_offload", plugin.activation_checkpointing_offload),
        ):
            if asked:
                raise ValueError(f"{name} is not part of fully sharded training in this version: leave it out.")

    def __init__(self, world: World, settings: RunSettings) -> None:
        super().__init__(world, settings)
        if settings.precision.scaler is not None:
            raise ValueError(
                "mixed_precision='fp16' is not part of fully sharded training in this version: use 'bf16'."
            )
        self._mesh = _shards(settings.mesh, world)

    def is_sharded(self, param: torch.Tensor) -> bool:
        return isinstance(param, DTensor)

    # Prepare ---------------------------------------------------------------------------------------------------------

    def prepare_model(self, model: nn.Module, on_device: bool, evaluation: bool) -> nn.Module:
        if isinstance(model, FSDPModule):  # sharded by the user
            self.settings.precision.wrap_forward(model)
            return model
        model = self.settings.precision.convert(model)
        policy = self._policy()
        # Under mixed precision the optimizer steps in float32, whatever the weights were loaded in.
        mixed = policy.param_dtype is not None
        self._load(model, [param for param in model.parameters() if mixed and param.requires_grad and is_half(param)])
        before = dict(model.named_parameters(remove_duplicate=False))
        ignored = self._ignored(model)
        for unit in (*self._units(model), model):
            if self.plugin.activation_checkpointing and unit is not model:
                checkpoint_activations(unit)
            fully_shard(
                unit,
                mesh=self._mesh,
                reshard_after_forward=bool(self.plugin.reshard_after_forward),
                mp_policy=policy,
                ignored_params=ignored,
            )
        for name, param in model.named_parameters(remove_duplicate=False):
            self._replaced[before[name]] = param
        self.settings.precision.wrap_forward(model)
        return self._compiled(model)

    def _policy(self) -> MixedPrecisionPolicy:
        policy = self.plugin.mixed_precision_policy
        return policy if isinstance(policy, MixedPrecisionPolicy) else MixedPrecisionPolicy()

    # Step ------------------------------------------------------------------------------------------------------------

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        sharded = _sharded(model)
        return nullcontext() if sharded is None else _synchronising(sharded, False)

    @staticmethod
    @contextmanager
    def sync_in_backward(model: nn.Module) -> Iterator[None]:
        sharded = _sharded(model)
        with nullcontext() if sharded is None else _synchronising(sharded, True):
            yield

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        norm = super().clip_grad_norm_(parameters, max_norm, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # State -----------------------------------------------------------------------------------------------------------

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """The model's full state on the CPU of rank 0, and an empty one elsewhere. Collective."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.unwrap(model, keep_torch_compile=False), options=options)


def _shards(mesh: DeviceMesh | None, world: World) -> DeviceMesh:
    """The dimensions over which parameters are replicated (if there is such a one) and sharded."""
    if mesh is None:
        return init_device_mesh(world.device.type, (world.size,))
    names = mesh.mesh_dim_names or ()
    if "dp_shard" not in names:
        raise ValueError(
            "fully sharded training needs dp_shard_size above 1: with dp_replicate_size alone, leave FSDP out."
        )
    return mesh["dp_replicate", "dp_shard"] if "dp_replicate" in names else mesh["dp_shard"]


def _sharded(model: nn.Module) -> FSDPModule | None:
    inner = model._orig_mod if is_compiled_module(model) else model
    return inner if isinstance(inner, FSDPModule) else None


@contextmanager
def _synchronising(model: FSDPModule, wanted: bool) -> Iterator[None]:
    model.set_requires_gradient_sync(wanted)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
