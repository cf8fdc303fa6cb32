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


def model_has_dtensor(model: nn.Module) -> bool:
    """Whether any parameter of the model is one that ranks of a device mesh share."""
    return any(hasattr(param, "device_mesh") and hasattr(param, "placements") for param in model.parameters())


def get_model_tp_size(model: nn.Module) -> int | None:
    """How many ranks share each of the model's tensors; None for a model whose tensors are whole.

    Args:
        model: One that transformers has loaded with a ``tp_plan``, or that has been prepared with ``tp_size``.
    """
    inner = extract_model_from_parallel(model)
    said = getattr(inner, "tp_size", None) or getattr(inner, "_tp_size", None)
    if isinstance(said, int):
        return said
    meshes = (getattr(param, "device_mesh", None) for param in inner.parameters())
    sharing = (mesh for mesh in meshes if mesh is not None and "tp" in (mesh.mesh_dim_names or ()))
    return next((mesh.size(mesh.mesh_dim_names.index("tp")) for mesh in sharing), None)


def get_parameters_from_modules(
    modules: Iterable[nn.Module] | str | None, model: nn.Module, device: torch.device | str | int
) -> set[nn.Parameter]:
    """The parameters of some modules of a model, moved to a device: those that a sharded model is to leave whole.

    Args:
        modules: The modules, or a regular expression that matches their whole dotted names; None: none.
        model: Where names are looked up.
        device: Where the modules go.
    """
    return {parameter for module in resolve_modules(modules, model) for parameter in module.to(device).parameters()}


def resolve_modules(modules: Iterable[nn.Module] | str | None, model: nn.Module) -> list[nn.Module]:
    """The modules that are meant.

    Args:
        modules: They themselves, or a regular expression that matches their whole dotted names; None: none.
        model: Where names are looked up.
    """
    if modules is None:
        return []
    if isinstance(modules, str):
        wanted = re.compile(modules)
        return [module for name, module in model.named_modules() if wanted.fullmatch(name)]
    return list(modules)
