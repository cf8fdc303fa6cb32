"""Questions about the modules of a model: which are there, in which order, of which class."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Literal, overload

import torch
from torch import nn

from .forward import extract_model_from_parallel


@overload
def get_module_children_bottom_up(model: nn.Module, return_fqns: Literal[False] = False) -> list[nn.Module]: ...
@overload
def get_module_children_bottom_up(model: nn.Module, return_fqns: Literal[True]) -> list[tuple[str, nn.Module]]: ...
def get_module_children_bottom_up(
    model: nn.Module, return_fqns: bool = False
) -> list[nn.Module] | list[tuple[str, nn.Module]]:
    """All modules of `model`, each after those inside it; the last is `model` itself. A shared module comes once.

    Args:
        model: The root.
        return_fqns: Give pairs of dotted name and module instead.
    """
    # named_modules lists parents first, so the reverse lists every module after its descendants.
    pairs = list(model.named_modules())[::-1]
    return pairs if return_fqns else [module for _, module in pairs]


def get_module_class_from_name(module: nn.Module, name: str) -> type[nn.Module] | None:
    """The class called `name` among the modules of `module`, itself included, or None."""
    return next((type(part) for part in module.modules() if type(part).__name__ == name), None)


def is_peft_model(model: nn.Module) -> bool:
    """Whether `model`, whatever it is wrapped in, is a `peft.PeftModel`. Does not import peft."""
    # Without peft imported nothing can be an instance of its classes.
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(extract_model_from_parallel(model), peft.PeftModel)


def get_parameters_from_modules(
    modules: Iterable[nn.Module] | str | None, model: nn.Module, device: torch.device | str | int
) -> set[nn.Parameter]:
    """The parameters of some modules of a model, moved to a device: those that a sharded model is to leave whole.

    Args:
        modules: The modules, or a regular expression that matches their whole dotted names; None: none.
        model: Where names are looked up.
        device: Where the modules go.
    """
    if modules is None:
        return set()
    if isinstance(modules, str):
        wanted = re.compile(modules)
        modules = [module for name, module in model.named_modules() if wanted.fullmatch(name)]
    return {parameter for module in modules for parameter in module.to(device).parameters()}
