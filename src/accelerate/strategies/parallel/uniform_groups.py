"""`UniformGroupsOptimizer`: steps where some parameters are DTensors and others are not.

torch's foreach and fused kernels take lists of plain tensors, or of DTensors of one mesh. A parameter group that holds
both is split during a step only; at all other times the optimizer has its original groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...optimizer import AcceleratedOptimizer


class UniformGroupsOptimizer(AcceleratedOptimizer):
    """An `AcceleratedOptimizer` that splits parameter groups by device mesh for the length of a step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._uniform_lists: list[tuple[int, int]] = []  # ids and lengths of parameter lists that need no split

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See `AcceleratedOptimizer.step`."""
        with self._split_groups():
            return super().step(closure)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """See `AcceleratedOptimizer.zero_grad`."""
        with self._split_groups() as parts:
            if parts is None:
                super().zero_grad(set_to_none)
            for part in parts or ():  # a single call would collect all gradients in one list
                self.optimizer.param_groups = [part]
                super().zero_grad(set_to_none)

    @contextmanager
    def _split_groups(self) -> Iterator[list[dict[str, Any]] | None]:
        """Replaces mixed groups by uniform ones, and yields these; yields None if there is nothing to split."""
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
                group.update({name: value for name, value in part.items() if name != "params"})  # such as a step count


def _by_mesh(params: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Groups parameters by device mesh; plain tensors form a list of their own."""
    lists: dict[Any, list[torch.Tensor]] = {}
    for param in params:
        lists.setdefault(getattr(param, "device_mesh", None), []).append(param)
    return list(lists.values()) or [[]]
