"""Tied weights, that is, parameters with several names: finds them, and ties them again after weights were moved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .module_tree import ModuleTree, build_tree


def find_tied_parameters(model: nn.Module, **kwargs: Any) -> list[list[str]]:
    """Finds groups of names that refer to the same parameter.

    Args:
        model: The model; on the meta device, too, if tied parameters are the same objects.
        **kwargs: Ignored.

    Returns:
        A list of groups, each sorted.

    Example:
        ```python
        model.head.weight = model.emb.weight
        find_tied_parameters(model)  # [["emb.weight", "head.weight"]]
        ```
    """
    return tied_in(build_tree(model, buffers=False))


def tied_in(tree: ModuleTree) -> list[list[str]]:
    """Implements `find_tied_parameters` for an existing tree; buffers are ignored."""
    groups = (places for places in tree.repeated.values() if isinstance(tree.tensors[places[0]], nn.Parameter))
    return [sorted(tree.tensor_names[place] for place in places) for places in groups]


def retie_parameters(model: nn.Module, tied_params: Iterable[Sequence[str]]) -> None:
    """Ties each group of names to one parameter: the first that has values, if any.

    Args:
        model: The model, after its weights were loaded.
        tied_params: Groups from `find_tied_parameters`.
    """
    for group in tied_params:
        places = [_place(model, name) for name in group]
        values = [module._parameters[key] for module, key in places]
        found = next((value for value in values if value is not None and not value.is_meta), None)
        if found is None:
            found = next((value for value in values if value is not None), None)
        for module, key in places:
            module._parameters[key] = found


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, key = name.rpartition(".")
    return model.get_submodule(owner), key
