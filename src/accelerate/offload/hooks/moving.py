"""Guards `to`, `cuda` and similar methods of a dispatched model: a move would undo the dispatch, or fail halfway."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ...runtime.devices import DEVICES

logger = logging.getLogger(__name__)

_NAMES = ("to", *DEVICES)


class GuardedMove:
    """Replaces a method that moves a model. A class, so that a copy of the model gets a guard for the copy.

    Args:
        model: The model.
        name: Name of the method.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model = model
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Moves the model if no part of it is offloaded.

        Raises:
            RuntimeError: if a part is offloaded.
        """
        model = self._model
        if self._name != "to" or _names_device(*args, **kwargs):
            if any(map(_fetches, model.modules())):
                raise RuntimeError(
                    f"{type(model).__name__} has parts that are offloaded to memory or disk, and cannot be moved: their "
                    "weights are loaded for each forward. To place it elsewhere, call dispatch_model with another "
                    "device_map; to load it into memory as a whole, call remove_hook_from_submodules(model)."
                )
            logger.warning(
                "%s is dispatched by hooks, which keep sending inputs to the old devices: call "
                "remove_hook_from_submodules(model) before you move it, or dispatch_model with another device_map.",
                type(model).__name__,
            )
        return getattr(type(model), self._name)(model, *args, **kwargs)


def _fetches(module: nn.Module) -> bool:
    hook = module.__dict__.get("_hf_hook")
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))


def _names_device(*args: Any, **kwargs: Any) -> bool:
    named = (*args, kwargs.get("device"), kwargs.get("tensor"))
    return any(
        isinstance(each, (str, int, torch.device, torch.Tensor)) and not isinstance(each, bool) for each in named
    )


def guard_moves(model: nn.Module) -> None:
    """Guards the methods that move a model, until its hooks are removed."""
    for name in _NAMES:
        if hasattr(type(model), name) and name not in model.__dict__:
            model.__dict__[name] = GuardedMove(model, name)


def release_moves(model: nn.Module) -> None:
    """Removes the guards."""
    for name in _NAMES:
        if isinstance(model.__dict__.get(name), GuardedMove):
            del model.__dict__[name]
