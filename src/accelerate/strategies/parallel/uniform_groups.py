"""`UniformGroupsOptimizer`: steps where some parameters are DTensors and others are not.

torch's foreach and fused kernels take lists of plain tensors, or of DTensors of one mesh. A parameter group that holds
both is split for the length of a step; who looks at the optimizer at another time finds the groups as they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...optimizer import AcceleratedOptimizer


class UniformGroupsOptimizer(AcceleratedOptimizer):
    """An `AcceleratedOptimizer` that steps each parameter group in parts of one kind of tensor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._uniform_lists: list[
            tuple[int, int]
        ] = []  # the lists of parameters that were of one kind, and their lengths

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See `AcceleratedOptimizer.step`."""
        with self._split_groups():
            return super().step(closure)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """See `AcceleratedOptimizer.zero_grad`."""
        with self._split_groups() as parts:
            if parts is None:
                super().zero_grad(set_to_none)
            for part in parts or ():  # one call for all would put the gradients of all into one list again
                self.optimizer.param_groups = [part]
                super().zero_grad(set_to_none)

    @contextmanager
    def _split_groups(self) -> Iterator[list[dict[str, Any]] | None]:
        """Replaces groups of several kinds by their parts, and yields these; None where there is nothing to split."""
        groups = self.optimizer.param_groups
        lists = [(id(group["params"]), len(group["params"])) for group in groups]
        if lists == self._uniform_lists or not self.gradient_state.sync_gradients:
            yield None
            return
        parts = [[{**group, "params": params} for params in _by_mesh(group["params"])] for group in groups]
        if all(len(each) == 1 for each in parts):
            self._uniform_lists = lists
            yield None
            return
        self.optimizer.param_groups = split = [part for each in parts for part in each]
        try:
            yield split
        finally:
            self.optimizer.param_groups = groups
            for group, (part, *_) in zip(groups, parts, strict=True):
                group.update({name: value for name, value in part.items() if name != "params"})  # a count, say


def _by_mesh(params: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Sorts parameters into lists for torch's kernels; an empty list stays one."""
    lists: dict[Any, list[torch.Tensor]] = {}
    for param in params:
        lists.setdefault(getattr(param, "device_mesh", None), []).append(param)
    return list(lists.values()) or [[]]
