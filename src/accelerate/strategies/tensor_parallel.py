"""Tensor parallelism: adjacent ranks hold shards of each layer's tensors and read the same data.

Gradients are all-reduced over replicas, if the mesh has any. Combined with FSDP, `fsdp2` applies tensor parallelism.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from ..optimizer import AcceleratedOptimizer
from ..runtime.world import World
from .base import Bundle, StrategyConfig, check_device_map
from .parallel import mesh, param_remap, tp_plan
from .parallel.grad_sync import grad_sync_enabled, register_grad_all_reduce
from .parallel.materialize import check_weights, materialize_and_broadcast, move_to_meta
from .parallel.uniform_groups import UniformGroupsOptimizer
from .sharded_checkpoint import ShardedStateStrategy, guard_save_pretrained


class TensorParallelStrategy(ShardedStateStrategy):
    """Shards tensors over the ranks of a group; groups are replicas of each other."""

    supports_local_sgd = False
    optimizer_class = UniformGroupsOptimizer
    supported_mesh_dims = frozenset({"dp_replicate", "cp", "sp", "tp"})

    def __init__(self, world: World, config: StrategyConfig) -> None:
        super().__init__(world, config)
        if config.precision.scaler is not None:
            raise ValueError(
                "mixed_precision='fp16' would scale losses differently on tensor-parallel ranks: use 'bf16', or add FSDP 2 "
                "(--use_fsdp --fsdp_version 2)."
            )
        self._param_map = param_remap.ParamMap()
        self._unsharded = WeakIdKeyDictionary()  # set of prepared parameters outside of the plan
        self._grad_mesh = mesh.flatten_dims(config.mesh, mesh.GRAD_REDUCE_DIMS)

    # Prepare ---------------------------------------------------------------------------------------------------------

    def check(self, bundle: Bundle) -> None:
        # Parameters on the meta device get memory here, so only rank 0 needs values.
        super().check(dataclasses.replace(bundle, on_device=frozenset()))
        check_device_map(bundle.models.values())
        check_weights(bundle.models.values(), self.world.collectives)
        for model in bundle.models.values():
            tp_plan.check(model, self.config.mesh, self.config.parallelism_config)
        param_remap.check_optimizers(
            bundle.models.values(), bundle.optimizers.values(), self._param_map, self._is_prepared
        )

    def prepare_model(self, model: nn.Module, on_device: bool, evaluation: bool) -> nn.Module:
        before = dict(model.named_parameters(remove_duplicate=False))
        planned_params = tp_plan.planned_params(model, self.config.parallelism_config)
        if planned_params is not None:
            # Shard, then move: no device holds the whole model, and only rank 0 needs values.
            originals = move_to_meta(model, only=planned_params)
            tp_plan.parallelize(model, self.config.mesh, self.config.parallelism_config)
            materialize_and_broadcast(model, originals, self.world.collectives, self.world.device, offload=False)
        else:  # transformers loaded it sharded
            if on_device:
                model = model.to(self.world.device)
            mesh.broadcast_model(model, self.world, self.config.mesh)
        for name, param in model.named_parameters(remove_duplicate=False):
            if param is before[name]:
                self._unsharded[param] = None
            else:
                self._param_map[before[name]] = param
        self.sync_rng()
        guard_save_pretrained(model)
        return super().prepare_model(model, False, evaluation)

    def _is_prepared(self, param: torch.Tensor) -> bool:
        return isinstance(param, DTensor) or param in self._unsharded

    def wrap_model(self, model: nn.Module) -> nn.Module:
        if self._grad_mesh is not None:
            # Replicas run no other collectives in a backward; ranks that share sequences do.
            overlap = self._grad_mesh.mesh_dim_names == ("dp_replicate",)
            group = self._grad_mesh.get_group()
            register_grad_all_reduce(model, model.parameters(), group, all_used=True, overlap=overlap)
        return model

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, on_device: bool) -> AcceleratedOptimizer:
        param_remap.remap_optimizer(optimizer, self._param_map)
        return super().prepare_optimizer(optimizer, on_device)

    # Step ------------------------------------------------------------------------------------------------------------

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        return grad_sync_enabled(model, False)

    @staticmethod
    @contextmanager
    def sync_in_backward(model: nn.Module) -> Iterator[None]:
        with grad_sync_enabled(model, True):
            yield

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        return mesh.clip_grad_norm_(parameters, max_norm, norm_type, device=self.world.device)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        mesh.clip_grad_value_(parameters, clip_value)

    @contextmanager
    def join(self, models: Sequence[nn.Module]) -> Iterator[None]:
        raise ValueError(
            "join_uneven_inputs does not work with tensor parallelism, whose ranks run every step together: leave "
            "even_batches=True."
        )
        yield
