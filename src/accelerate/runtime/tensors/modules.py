"""Lookups of a model's modules: order, class, parameters, tensor-parallel size."""

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
    """Lists all modules of a model in post-order: children before parents, `model` last. A shared module comes once.

    Args:
        model: The root.
        return_fqns: Return pairs of FQN and module instead.
    """
    # The reverse of `named_modules`, which lists parents first.
    pairs = list(model.named_modules())[::-1]
    return pairs if return_fqns else [module for _, module in pairs]


def get_module_class_from_name(module: nn.Module, name: str) -> type[nn.Module] | None:
    """Returns the class of that name among the modules of `module`, itself included, or None."""
    return next((type(part) for part in module.modules() if type(part).__name__ == name), None)


def is_peft_model(model: nn.Module) -> bool:
    """Returns whether a model, inside its containers, is a `peft.PeftModel`. Does not import peft."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(extract_model_from_parallel(model), peft.PeftModel)


def model_has_dtensor(model: nn.Module) -> bool:
    """Returns whether any parameter of the model is a DTensor."""
    return any(hasattr(param, "device_mesh") and hasattr(param, "placements") for param in model.parameters())


def get_model_tp_size(model: nn.Module) -> int | None:
    """Returns the tensor-parallel size of a model, or None without tensor parallelism.

    Args:
        model: A model that transformers loaded with a ``tp_plan``, or that was prepared with ``tp_size``.
    """
    inner = extract_model_from_parallel(model)
    declared = getattr(inner, "tp_size", None) or getattr(inner, "_tp_size", None)
    if isinstance(declared, int):
        return declared
    meshes = (getattr(param, "device_mesh", None) for param in inner.parameters())
    sharing = (mesh for mesh in meshes if mesh is not None and "tp" in (mesh.mesh_dim_names or ()))
    return next((mesh.size(mesh.mesh_dim_names.index("tp")) for mesh in sharing), None)


def get_parameters_from_modules(
    modules: Iterable[nn.Module] | str | None, model: nn.Module, device: torch.device | str | int
) -> set[nn.Parameter]:
    """Moves some modules of a model to a device and returns their parameters, which FSDP is to ignore.

    Args:
        modules: The modules, or a regular expression that matches their whole FQNs; None selects none.
        model: The model in which the FQNs are looked up.
        device: The device.
    """
    return {parameter for module in resolve_modules(modules, model) for parameter in module.to(device).parameters()}


def resolve_modules(modules: Iterable[nn.Module] | str | None, model: nn.Module) -> list[nn.Module]:
    """Resolves modules given by a regular expression.

    Args:
        modules: The modules, or a regular expression that matches their whole FQNs; None selects none.
        model: The model in which the FQNs are looked up.
    """
    if modules is None:
        return []
    if isinstance(modules, str):
        wanted = re.compile(modules)
        return [module for name, module in model.named_modules() if wanted.fullmatch(name)]
    return list(modules)
