"""State that ranks share: `ShardedStateStrategy`, for strategies whose models or optimizers no rank holds as a whole.

It asks what a rank holds (`checkpointing.sharded.local_state`), not which version of FSDP or which mesh made it so.
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
from .base import Strategy

if TYPE_CHECKING:
    from ..checkpointing import Entry
    from ..optimizer import AcceleratedOptimizer


class ShardedStateStrategy(Strategy, ABC):
    """A base for strategies whose ranks hold parts of a state."""

    can_save_mid_accumulation = False

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """The model's full state on the CPU of rank 0, and an empty one elsewhere. Collective."""
        return gather_full_state(local_state.model_state(unwrap_module(model)))

    def state_to_save(self, model: nn.Module) -> dict[str, Any]:
        return (
            self.model_state(model)
            if model_items.saves_full_state(self.config.fsdp)
            else local_state.model_state(unwrap_module(model))
        )

    def entries(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[AcceleratedOptimizer],
        weights: Sequence[dict[str, Any]],
        *,
        safe: bool = True,
    ) -> list[Entry]:
        bare, rank = list(map(unwrap_module, models)), self.world.rank
        if model_items.saves_full_state(self.config.fsdp):
            return [
                *(
                    model_items.gathered_optimizer(index, rank, optimizer, bare)
                    for index, optimizer in enumerate(optimizers)
                ),
                *(model_items.gathered_model(index, state) for index, state in enumerate(weights)),
            ]
        return [
            *(model_items.shards_of_model(index, rank, state) for index, state in enumerate(weights)),
            *(
                model_items.shards_of_optimizer(index, rank, optimizer, bare)
                for index, optimizer in enumerate(optimizers)
            ),
        ]

    def model_entries(self, folder: Path, models: Sequence[nn.Module], options: dict[str, Any]) -> list[Entry]:
        full = model_items.saves_full_state(self.config.fsdp)
        return [
            model_items.model_in(folder, i, unwrap_module(model), sharded=True, full=full)
            for i, model in enumerate(models)
        ]

    def optimizer_entries(
        self, folder: Path, optimizers: Sequence[AcceleratedOptimizer], models: Sequence[nn.Module]
    ) -> list[Entry]:
        full, bare = model_items.saves_full_state(self.config.fsdp), list(map(unwrap_module, models))
        return [
            model_items.optimizer_in(folder, index, optimizer, bare, sharded=True, full=full)
            for index, optimizer in enumerate(optimizers)
        ]


def guard_save_pretrained(model: nn.Module) -> None:
    """Has a model's `save_pretrained` ask for the whole state: what it would save by itself is this rank's part."""
    save = getattr(model, "save_pretrained", None)
    # Those that transformers has cut, it also puts together.
    if save is not None and not getattr(model, "is_distributed_loading_by_transformers", False):
        model.__dict__["save_pretrained"] = functools.partial(_save_whole, save)


def _save_whole(save: Callable[..., Any], folder: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) < 2 and kwargs.get("state_dict") is None:  # the third argument, in transformers
        raise ValueError(
            "save_pretrained of a model whose tensors lie in parts on several ranks needs its whole state: pass "
            "state_dict=accelerator.get_state_dict(model), which all ranks call together. transformers' Trainer does that "
            "with FSDP 2 (FULL_STATE_DICT), which may have tensor parallelism only (tp_size, no dp_shard_size)."
        )
    return save(folder, *args, **kwargs)
