"""`ShardedStateStrategy`: checkpoints of models and optimizers that no rank holds as a whole.

It reads the local shards from `checkpointing.sharded.local_state`, whatever FSDP version or mesh made them.
"""

from __future__ import annotations

import functools
from abc import ABC
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..checkpointing.items import model_items
from ..checkpointing.sharded import local_state
from ..checkpointing.sharded.gathering import gather_full_state
from ..runtime.tensors.forward import unwrap_module
from .base import Strategy, unwrap_optimizer

if TYPE_CHECKING:
    from ..checkpointing import LoadItem, SaveItem
    from ..optimizer import AcceleratedOptimizer


class ShardedStateStrategy(Strategy, ABC):
    """Base of strategies with sharded state."""

    can_save_mid_accumulation = False

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """Returns the full state dict on the CPU of rank 0, and an empty one elsewhere. Collective."""
        return gather_full_state(local_state.model_state(unwrap_module(model)))

    def state_to_save(self, model: nn.Module) -> dict[str, Any]:
        return (
            self.model_state(model)
            if model_items.saves_full_state(self.config.fsdp)
            else local_state.model_state(unwrap_module(model))
        )

    def save_items(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[AcceleratedOptimizer],
        weights: Sequence[dict[str, Any]],
        *,
        safe: bool = True,
    ) -> list[SaveItem]:
        full, rank, bare = model_items.saves_full_state(self.config.fsdp), self.world.rank, _unwrap(models)
        save_models = [model_items.save_sharded_model(i, rank, state, full) for i, state in enumerate(weights)]
        save_optimizers = [
            model_items.save_sharded_optimizer(index, rank, unwrap_optimizer(optimizer), bare, full)
            for index, optimizer in enumerate(optimizers)
        ]
        return [*save_optimizers, *save_models] if full else [*save_models, *save_optimizers]

    def load_model_items(self, folder: Path, models: Sequence[nn.Module], options: dict[str, Any]) -> list[LoadItem]:
        full = model_items.saves_full_state(self.config.fsdp)
        return [
            model_items.load_model(folder, index, model, sharded=True, full=full)
            for index, model in enumerate(_unwrap(models))
        ]

    def load_optimizer_items(
        self, folder: Path, optimizers: Sequence[AcceleratedOptimizer], models: Sequence[nn.Module]
    ) -> list[LoadItem]:
        full, bare = model_items.saves_full_state(self.config.fsdp), _unwrap(models)
        return [
            model_items.load_optimizer(folder, index, unwrap_optimizer(optimizer), bare, sharded=True, full=full)
            for index, optimizer in enumerate(optimizers)
        ]


def _unwrap(models: Sequence[nn.Module]) -> list[nn.Module]:
    return [unwrap_module(model) for model in models]


def guard_save_pretrained(model: nn.Module) -> None:
    """Makes `save_pretrained` require a state dict: by itself it would save this rank's shards."""
    save = getattr(model, "save_pretrained", None)
    # transformers gathers models that it has sharded itself.
    if save is not None and not getattr(model, "is_distributed_loading_by_transformers", False):
        model.__dict__["save_pretrained"] = functools.partial(_save_whole, save)


def _save_whole(save: Callable[..., Any], folder: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) < 2 and kwargs.get("state_dict") is None:  # the third argument, in transformers
        raise ValueError(
            "save_pretrained of a model that is sharded over ranks needs its full state dict: pass "
            "state_dict=accelerator.get_state_dict(model), which all ranks call together. transformers' Trainer does that "
            "with FSDP 2 (FULL_STATE_DICT), which may have tensor parallelism only (tp_size, no dp_shard_size)."
        )
    return save(folder, *args, **kwargs)
