"""Remaps optimizers to the parameters that `prepare` puts in place of the original ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ...checkpointing.sharded.compat import unwrap_optimizer

ParamMap = WeakIdKeyDictionary
"""Original parameter -> its replacement."""


def check_optimizers(
    models: Iterable[nn.Module],
    optimizers: Iterable[torch.optim.Optimizer],
    param_map: ParamMap,
    is_replacement: Callable[[torch.Tensor], bool],
) -> None:
    """Raises for optimizers that cannot be remapped to replaced parameters.

    Args:
        models: Models whose parameters will be replaced.
        optimizers: Optimizers prepared in the same call.
        replaced: Replaced parameters of models prepared before.
        is_new: Returns whether a parameter is a replacement.

    Raises:
        ValueError: naming which objects to prepare together.
    """
    here = {id(param) for model in models for param in model.parameters()}
    for optimizer in optimizers:
        inner = unwrap_optimizer(optimizer)
        params = [param for group in inner.param_groups for param in group["params"]]
        if inner.state and not all(map(is_replacement, params)):
            raise ValueError(
                f"{type(inner).__name__} has stepped already, and its state does not fit parameters that will be "
                "sharded: prepare model and optimizer before the first step."
            )
        if not all(id(param) in here or param in param_map or is_replacement(param) for param in params):
            raise ValueError(
                f"{type(inner).__name__} holds parameters of a model that has not been prepared: prepare the model in "
                "the same call, or before."
            )


def remap_optimizer(optimizer: torch.optim.Optimizer, param_map: ParamMap) -> None:
    """Replaces the optimizer's parameters by those that are now in the model."""
    for group in unwrap_optimizer(optimizer).param_groups:
        new = [param_map.get(param, param) for param in group["params"]]
        group["params"] = list(
            {id(param): param for param in new}.values()
        )  # FSDP 1 may have flattened several into one
