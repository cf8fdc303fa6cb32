"""Tensor parallelism: neighbouring ranks share each layer's tensors and read the same data.

With replicas besides, gradients are averaged over them when a backward ends. Shards besides are the business of fully
sharded training, which shares tensors in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..optimizer import AcceleratedOptimizer
from ..runtime.world import World
from . import mesh, replacing, tensor_plan
from .averaging import average_gradients, averaging
from .base import Bundle, RunSettings, check_device_map
from .sharded_state import ShardedStateStrategy, guard_save_pretrained


class TensorParallel(ShardedStateStrategy):
    """Ranks of one group hold parts of each tensor; groups are replicas of each other."""

    supports_local_sgd = False
    dimensions = frozenset({"dp_replicate", "cp", "sp", "tp"})

    def __init__(self, world: World, settings: RunSettings) -> None:
        super().__init__(world, settings)
        if settings.precision.scaler is not None:
            raise ValueError(
                "mixed_precision='fp16' scales losses, which ranks that share tensors would do apart: use 'bf16', or FSDP 2 "
                "besides (--use_fsdp --fsdp_version 2)."
            )
        self._replaced = replacing.Replaced()
        self._averages = mesh.along(settings.mesh, mesh.AVERAGED)

    # Prepare ---------------------------------------------------------------------------------------------------------

    def check(self, bundle: Bundle) -> None:
        super().check(bundle)
        check_device_map(bundle.models.values())
        for model in bundle.models.values():
            tensor_plan.check(model, self.settings.mesh, self.settings.sizes)
        replacing.check_optimizers(bundle, self._replaced, self._is_prepared)

    def prepare_model(self, model: nn.Module, on_device: bool, evaluation: bool) -> nn.Module:
        before = dict(model.named_parameters(remove_duplicate=False))
        if on_device:
            model = model.to(self.world.device)
        mesh.same_everywhere(model, self.world, self.settings.mesh)
        tensor_plan.share(model, self.settings.mesh, self.settings.sizes)
        for name, param in model.named_parameters(remove_duplicate=False):
            self._replaced[before[name]] = param
        self.agree_on_random_states()
        guard_save_pretrained(model)
        return super().prepare_model(model, False, evaluation)

    def _is_prepared(self, param: torch.Tensor) -> bool:
        # Those that the plan leaves whole are their own successors.
        return isinstance(param, DTensor) or self._replaced.get(param) is param

    def synchronise(self, model: nn.Module) -> nn.Module:
        if self._averages is not None:
            average_gradients(model, model.parameters(), self._averages.get_group(), all_used=True)
        return model

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, on_device: bool) -> AcceleratedOptimizer:
        replacing.give_new_parameters(optimizer, self._replaced)
        return super().prepare_optimizer(optimizer, on_device)

    # Step ------------------------------------------------------------------------------------------------------------

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        return averaging(model, False)

    @staticmethod
    @contextmanager
    def sync_in_backward(model: nn.Module) -> Iterator[None]:
        with averaging(model, True):
            yield

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        return mesh.clip_grad_norm_(parameters, max_norm, norm_type, device=self.world.device)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        mesh.clip_grad_value_(parameters, clip_value)

    @contextmanager
    def join(self, models: Sequence[nn.Module]) -> Iterator[None]:
        raise ValueError(
            "join_uneven_inputs does not work with tensor parallelism, whose ranks take every step together: leave "
            "even_batches=True."
        )
        yield
