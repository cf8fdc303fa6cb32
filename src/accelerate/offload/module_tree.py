"""A model as a tree of its tensors, walked once.

`module.named_parameters()` walks the whole model anew and builds every name from the root; here one pass gives what sizes,
ties and device maps need, in time linear in the number of modules and tensors. The tree is kept as flat lists: an object for
every module would keep the garbage collector busy for longer than everything else takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class ModuleTree:
    """Modules, each before those inside it, and their tensors in the same order.

    Attributes:
        names: Dotted names of modules; the root's is empty.
        modules: The modules.
        parents: Position of the module around each; the root's is -1.
        ends: Position behind the last module inside each.
        starts: Position of each module's first own tensor, and behind the last the number of tensors. A module's own tensors
            end where those of the next module start.
        tensor_names: Full names of tensors: a module's parameters, then its buffers.
        tensors: The tensors.
        identities: What tells tensors apart.
        sizes: Their bytes, if asked for.
        buffers: Positions of those that are buffers.
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
        """All tensors with their names; one that has several comes with each."""
        return zip(self.tensor_names, self.tensors, strict=True)

    @functools.cached_property
    def repeated(self) -> dict[int, list[int]]:
        """The positions of each tensor that stands in several places, by its identity."""
        first: dict[int, int] = {}
        found: dict[int, list[int]] = {}
        for position, identity in enumerate(self.identities):
            earliest = first.setdefault(identity, position)
            if earliest != position:
                found.setdefault(identity, [earliest]).append(position)
        return found


def build_tree(model: nn.Module, *, parameters: bool = True, buffers: bool = True, sizes: bool = False) -> ModuleTree:
    """The tree of a model. A module or tensor that stands in two places is listed in both.

    Args:
        model: The root.
        parameters: List parameters.
        buffers: List buffers.
        sizes: Note the sizes of tensors as well.
    """
    tree = ModuleTree()
    names, modules, parents, ends, starts = tree.names, tree.modules, tree.parents, tree.ends, tree.starts
    tensor_names, tensors, identities = tree.tensor_names, tree.tensors, tree.identities

    def note(prefix: str, held: dict[str, torch.Tensor | None]) -> None:
        for key, tensor in held.items():
            if tensor is not None:
                tensor_names.append(prefix + key)
                # All that is asked of a tensor is asked here: in a large model, getting to it is what takes time.
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
        held = module.__dict__  # an attribute of a module is looked for in its class first
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
    """Whether a module is of a class that stays on one device.

    Args:
        no_split_module_classes: Names of classes: one, several, or None.
    """
    if no_split_module_classes is None:
        names: frozenset[str] = frozenset()
    elif isinstance(no_split_module_classes, str):
        names = frozenset((no_split_module_classes,))
    elif isinstance(no_split_module_classes, (list, tuple, set, frozenset)):
        names = frozenset(no_split_module_classes)
    else:
        raise TypeError(
            f"no_split_module_classes takes names of classes, such as ['Block']; got {no_split_module_classes!r}."
        )
    return lambda module: type(module).__name__ in names
