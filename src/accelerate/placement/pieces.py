"""A model cut into what a device map places: layers that stay whole, and tensors that lie directly on a larger module.

Pieces that share a tensor belong to one group, so that tied weights stay together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .sizes import Dtype, Measure
from .tree import Tree, split_points, walk


@dataclass(slots=True)
class Group:
    """Pieces that go to one device together.

    Attributes:
        names: Names of modules, or of tensors that lie directly on a module that has children.
        size: Bytes of the tensors in it, each counted once.
        buffers: Bytes of these that are buffers.
    """

    names: list[str]
    size: int
    buffers: int


def groups_of(
    model: nn.Module,
    no_split_module_classes: Sequence[str] | str | None = None,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
) -> list[Group]:
    """The groups of a model, in the order of their first pieces; arguments as for `infer_auto_device_map`."""
    return cut(walk(model), no_split_module_classes, Measure(dtype, special_dtypes))


def cut(tree: Tree, no_split_module_classes: Sequence[str] | str | None, measure: Measure) -> list[Group]:
    """`groups_of` a tree that was walked already."""
    keep_whole = split_points(no_split_module_classes)
    pieces = _Pieces(tree, measure)
    here = 0
    while here < len(tree):
        end = tree.ends[here]
        if end == here + 1 or keep_whole(tree.modules[here]):
            pieces.add([tree.names[here]], tree.starts[here], tree.starts[end])
            here = end
            continue
        start, stop = tree.starts[here], tree.starts[here + 1]
        if start < stop:
            pieces.add(tree.tensor_names[start:stop], start, stop)
        here += 1
    return pieces.groups()


class _Pieces:
    """Groups in the making, which grow together where they share a tensor."""

    def __init__(self, tree: Tree, measure: Measure) -> None:
        self._tree = tree
        self._measure = measure
        self._groups: list[Group] = []
        self._owner: dict[int, int] = {}
        self._taken: dict[int, int] = {}  # number of a group, and of the earlier one that took it

    def _current(self, number: int) -> int:
        while number in self._taken:
            number = self._taken[number]
        return number

    def add(self, names: list[str], start: int, stop: int) -> None:
        """Adds a piece with the tensors between two positions."""
        group, number = Group(names, 0, 0), len(self._groups)
        self._groups.append(group)
        owner, measure, tensor_names = self._owner, self._measure, self._tree.tensor_names
        for position in range(start, stop):
            tensor = self._tree.tensors[position]
            known = owner.get(id(tensor))
            if known is None:
                owner[id(tensor)] = number
                size = measure(tensor_names[position], tensor)
                group.size += size
                if type(tensor) is not nn.Parameter and not isinstance(tensor, nn.Parameter):
                    group.buffers += size
            elif known != number:
                group = self._merge(self._current(known), self._current(number))

    def _merge(self, one: int, other: int) -> Group:
        if one == other:
            return self._groups[one]
        # The earlier one takes all: its place in the order is where both go.
        first, second = sorted((one, other))
        taker, taken = self._groups[first], self._groups[second]
        taker.names = taker.names + taken.names
        taker.size += taken.size
        taker.buffers += taken.buffers
        self._taken[second] = first
        return taker

    def groups(self) -> list[Group]:
        """The groups, in the order of their first pieces."""
        return [group for number, group in enumerate(self._groups) if number not in self._taken]
