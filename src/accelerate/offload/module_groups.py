"""Splits a model into the groups that a device map assigns: unsplit layers, and tensors directly on a split module.

Layers that share a tensor are in one group, so that tied weights stay together.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from .module_tree import ModuleTree, build_tree, split_points
from .sizes import Dtype, SizeMeasure


@dataclass
class ModuleGroups:
    """Groups of modules and tensors that go to one device. Stored as columns, for the same reason as `ModuleTree`.

    Attributes:
        tree: The model.
        sizes: Bytes of each group, counting each tensor once; in the order of the groups' first members.
        buffers: Bytes of the buffers of each group.
        units: Bytes of the largest module of each group, without its submodules: the most that one hook loads at once.
        visited: Positions of unsplit and of split modules, in order.
        numbers: For each of these the index of its group (for split modules, that of their own tensors); -1: no group.
    """

    tree: ModuleTree
    sizes: list[int] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    visited: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def names(self) -> list[list[str]]:
        """Returns, for each group, the names of its modules and of its tensors that belong directly to a split module."""
        found: list[list[str]] = [[] for _ in self.sizes]
        for here, number in zip(self.visited, self.numbers, strict=True):
            if number >= 0:
                found[number] += self.own_tensors(here) if self.is_open(here) else [self.tree.names[here]]
        return found

    def is_open(self, here: int) -> bool:
        """Returns whether a visited module was split."""
        after = bisect.bisect_right(self.visited, here)
        return after < len(self.visited) and self.visited[after] < self.tree.ends[here]

    def own_tensors(self, here: int) -> list[str]:
        """Returns the names of a module's own tensors."""
        return self.tree.tensor_names[self.tree.starts[here] : self.tree.starts[here + 1]]


def group_modules(
    model: nn.Module,
    no_split_module_classes: Sequence[str] | str | None = None,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
) -> ModuleGroups:
    """Splits a model into groups; arguments as for `infer_auto_device_map`."""
    keep_whole, measure = split_points(no_split_module_classes), SizeMeasure(dtype, special_dtypes)
    tree = build_tree(model, sizes=True)
    found = ModuleGroups(tree)
    each = measure.all(tree)
    taken = [0, *itertools.accumulate(each)]
    in_buffers = [0, *itertools.accumulate(each[position] for position in tree.buffers)]

    def buffers_before(position: int) -> int:
        return in_buffers[bisect.bisect_left(tree.buffers, position)]

    behind: list[int] = []  # the end of each group, as a position of a tensor
    here = 0
    while here < len(tree):
        found.visited.append(here)
        first, start, after = here, tree.starts[here], tree.ends[here]
        whole = after == here + 1 or keep_whole(tree.modules[here])
        here = after if whole else here + 1
        stop = tree.starts[here]
        if start == stop and not whole:
            found.numbers.append(-1)
            continue
        found.numbers.append(len(found.sizes))
        found.sizes.append(taken[stop] - taken[start])
        found.buffers.append(buffers_before(stop) - buffers_before(start))
        ends = [taken[position] for position in tree.starts[first : here + 1]]
        found.units.append(max(end - begin for begin, end in itertools.pairwise(ends)))
        behind.append(stop)
    if tree.repeated:
        _join(found, behind)
    return found


def _join(found: ModuleGroups, behind: Sequence[int]) -> None:
    """Merges groups that share a tensor into the first of them (union-find)."""
    taker = list(range(len(found.sizes)))  # the parent of each group: itself or an earlier one

    def current(number: int) -> int:
        while number != taker[number]:
            number = taker[number]
        return number

    for positions in found.tree.repeated.values():
        first, *others = sorted({current(bisect.bisect_right(behind, position)) for position in positions})
        for number in others:
            found.sizes[first] += found.sizes[number]
            found.buffers[first] += found.buffers[number]
            found.units[first] = max(found.units[first], found.units[number])
            taker[number] = first
    left = [number for number, by in enumerate(taker) if number == by]
    renumbered = dict(zip(left, itertools.count()))
    found.sizes = [found.sizes[number] for number in left]
    found.buffers = [found.buffers[number] for number in left]
    found.units = [found.units[number] for number in left]
    found.numbers = [renumbered[current(number)] if number >= 0 else -1 for number in found.numbers]
