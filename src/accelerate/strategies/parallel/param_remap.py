"""Parameters that `prepare` replaces, and the optimizers that were made of those before."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ...checkpointing.sharded.compat import unwrap_optimizer

ParamMap = WeakIdKeyDictionary
"""Parameter before -> the one in its place."""


def check_optimizers(
    models: Iterable[nn.Module],
    optimizers: Iterable[torch.optim.Optimizer],
    param_map: ParamMap,
    is_replacement: Callable[[torch.Tensor], bool],
) -> None:
    """Refuses optimizers that cannot follow when parameters are replaced.

    Args:
        models: Models whose parameters are about to be replaced.
        optimizers: Optimizers prepared in the same call.
        replaced: Replaced parameters of models prepared before.
        is_new: Returns whether a parameter is a replacement.

    Raises:
        ValueError: saying what to prepare when.
    """
    here = {id(param) for model in models for param in model.parameters()}
    for optimizer in optimizers:
        inner = unwrap_optimizer(optimizer)
        params = [param for group in inner.param_groups for param in group["params"]]
        if inner.state and not all(map(is_replacement, params)):
            raise ValueError(
                f"{type(inner).__name__} has stepped already, and its states cannot follow parameters that are about to "
                "be sharded: prepare model and optimizer before the first step."
            )
        if not all(id(param) in here or param in param_map or is_replacement(param) for param in params):
            raise ValueError(
                f"{type(inner).__name__} holds parameters of a model that has not been prepared: prepare the model in "
                "the same call, or before."
            )


def remap_optimizer(optimizer: torch.optim.Optimizer, param_map: ParamMap) -> None:
    """Has the optimizer step the parameters that are now in the model."""
    for group in unwrap_optimizer(optimizer).param_groups:
        new = [param_map.get(param, param) for param in group["params"]]
        group["params"] = list({id(param): param for param in new}.values())  # several may have become one
