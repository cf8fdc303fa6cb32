"""The module tree of a model with its tensors, built in one pass.

`module.named_parameters()` traverses the whole model at each call and builds every name from the root. This pass collects
the data for sizes, ties and device maps in time linear in the number of modules and tensors. The tree is stored in flat
lists: with one object per module, garbage collection would take longer than everything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class ModuleTree:
    """Modules in pre-order, and their tensors in the same order.

    Attributes:
        names: Dotted names of modules; the root's is empty.
        modules: The modules.
        parents: Position of each module's parent; the root's is -1.
        ends: Position behind the last descendant of each module.
        starts: Position of each module's first own tensor; the last entry is the number of tensors. A module's own tensors
            end where those of the next module start.
        tensor_names: Full names of tensors: a module's parameters, then its buffers.
        tensors: The tensors.
        identities: The `id` of each tensor.
        sizes: Bytes of each tensor, if requested.
        buffers: Positions of the buffers.
    """

    names: list[str] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    tensor_names: list[str] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    identities: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields all tensors with their names; a tied tensor is repeated under each."""
        return zip(self.tensor_names, self.tensors, strict=True)

    @functools.cached_property
    def repeated(self) -> dict[int, list[int]]:
        """Positions of each tensor that occurs more than once, by its identity."""
        first: dict[int, int] = {}
        found: dict[int, list[int]] = {}
        for position, identity in enumerate(self.identities):
            earliest = first.setdefault(identity, position)
            if earliest != position:
                found.setdefault(identity, [earliest]).append(position)
        return found


def build_tree(model: nn.Module, *, parameters: bool = True, buffers: bool = True, sizes: bool = False) -> ModuleTree:
    """Builds the tree of a model. A module or tensor with several names is listed under each.

    Args:
        model: The root.
        parameters: Include parameters.
        buffers: Include buffers.
        sizes: Record the sizes of tensors.
    """
    tree = ModuleTree()
    names, modules, parents, ends, starts = tree.names, tree.modules, tree.parents, tree.ends, tree.starts
    tensor_names, tensors, identities = tree.tensor_names, tree.tensors, tree.identities

    def note(prefix: str, held: dict[str, torch.Tensor | None]) -> None:
        for key, tensor in held.items():
            if tensor is not None:
                tensor_names.append(prefix + key)
                # All attributes of a tensor are read here: in a large model, most time goes into cache misses on it.
                tensors.append(tensor)
                identities.append(id(tensor))
                if sizes:
                    tree.sizes.append(tensor.nbytes)

    def visit(module: nn.Module, name: str, parent: int) -> None:
        here = len(names)
        names.append(name)
        modules.append(module)
        parents.append(parent)
        ends.append(0)
        starts.append(len(tensors))
        prefix = f"{name}." if name else ""
        held = module.__dict__  # avoids the lookup in the class that attribute access does first
        if parameters and held["_parameters"]:
            note(prefix, held["_parameters"])
        if buffers and held["_buffers"]:
            before = len(tensors)
            note(prefix, held["_buffers"])
            tree.buffers.extend(range(before, len(tensors)))
        for key, child in held["_modules"].items():
            if child is not None:
                visit(child, prefix + key, here)
        ends[here] = len(names)

    visit(model, "", -1)
    starts.append(len(tensors))
    return tree


def split_points(no_split_module_classes: object) -> Callable[[nn.Module], bool]:
    """Returns a predicate that is true for modules that must stay on one device.

    Args:
        no_split_module_classes: Names of their classes: one, several, or None.
    """
    if no_split_module_classes is None:
        names: frozenset[str] = frozenset()
    elif isinstance(no_split_module_classes, str):
        names = frozenset((no_split_module_classes,))
    elif isinstance(no_split_module_classes, (list, tuple, set, frozenset)):
        names = frozenset(no_split_module_classes)
    else:
        raise TypeError(
            f"no_split_module_classes expects names of classes, such as ['Block']; got {no_split_module_classes!r}."
        )
    return lambda module: type(module).__name__ in names
