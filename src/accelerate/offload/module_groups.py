"""A model cut into what a device map places: layers that stay whole, and tensors that lie directly on a larger module.

Pieces that share a tensor belong to one group, so that tied weights stay together.
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
    """What goes to one device together. Kept as columns, for the reason that a tree is.

    Attributes:
        tree: The model.
        sizes: Bytes of each group, each tensor counted once; in the order of the groups' first pieces.
        buffers: Bytes of these that are buffers.
        units: Bytes of the largest module in each, without those inside it: what a hook fetches as one.
        visited: Positions of the modules that are pieces, and of those that were cut open, in order.
        numbers: For each of these, the group that it belongs to (or the tensors that lie directly on it); -1: none does.
    """

    tree: ModuleTree
    sizes: list[int] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    visited: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def names(self) -> list[list[str]]:
        """For each group, the names of its modules and of tensors that lie directly on a larger one."""
        found: list[list[str]] = [[] for _ in self.sizes]
        for here, number in zip(self.visited, self.numbers, strict=True):
            if number >= 0:
                found[number] += self.own_tensors(here) if self.is_open(here) else [self.tree.names[here]]
        return found

    def is_open(self, here: int) -> bool:
        """Whether a visited module was cut open."""
        after = bisect.bisect_right(self.visited, here)
        return after < len(self.visited) and self.visited[after] < self.tree.ends[here]

    def own_tensors(self, here: int) -> list[str]:
        """Names of the tensors that lie directly on a module."""
        return self.tree.tensor_names[self.tree.starts[here] : self.tree.starts[here + 1]]


def group_modules(
    model: nn.Module,
    no_split_module_classes: Sequence[str] | str | None = None,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
) -> ModuleGroups:
    """The groups of a model; arguments as for `infer_auto_device_map`."""
    keep_whole, measure = split_points(no_split_module_classes), SizeMeasure(dtype, special_dtypes)
    tree = build_tree(model, sizes=True)
    found = ModuleGroups(tree)
    each = measure.all(tree)
    taken = [0, *itertools.accumulate(each)]
    in_buffers = [0, *itertools.accumulate(each[position] for position in tree.buffers)]

    def buffers_before(position: int) -> int:
        return in_buffers[bisect.bisect_left(tree.buffers, position)]

    behind: list[int] = []  # each group's end, in positions of tensors
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
    """Makes those groups one that share a tensor: the first takes all, and its place in the order is where they go."""
    taker = list(range(len(found.sizes)))  # by number of a group, itself or an earlier one

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
