"""Gradient accumulation: contexts around one micro-step, and the exact mean over a ragged global batch.

With micro-batches of different sizes, the mean of means is not the mean: a short micro-batch weighs as much as a long one.
With `TokenWeightedMean` every micro-batch adds the *sum* of its losses, and the step that synchronizes gradients divides
them by the number of items of all micro-batches of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..state import GradientState

if TYPE_CHECKING:
    from .base import Strategy


class AccumulateContext(AbstractContextManager[None]):
    """Context of one micro-step: decides whether gradients synchronize, and enters `no_sync` if they do not.

    A class, since a generator with an exit stack would cost more around every forward.

    Args:
        counter: Counter of micro-steps.
        models: Models whose gradients accumulate.
    """

    __slots__ = ("_contexts", "_counter", "_models")

    def __init__(self, counter: StepCounter, models: Sequence[nn.Module]) -> None:
        self._counter = counter
        self._models = models
        self._contexts: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        counter = self._counter
        state = counter.gradient_state
        counter.advance()
        counter.active_models = self._models
        if state.sync_gradients or state.sync_each_batch:
            return
        for model in self._models:
            context = counter.strategy.no_sync(model)
            context.__enter__()
            self._contexts.append(context)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._contexts:
            self._contexts.pop().__exit__(kind, error, trace)
        self._counter.active_models = ()


class StepCounter:
    """Counts the micro-steps of a run.

    Attributes:
        step: Micro-steps since the last one at the end of a loader.
        window: The models of the micro-step in progress.
        held: How many `no_sync` blocks are open.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.gradient_state = GradientState()
        self.step = 0
        self.active_models: Sequence[nn.Module] = ()
        self.no_sync_depth = 0

    def advance(self) -> None:
        """Counts a micro-step and sets whether it synchronizes gradients."""
        state = self.gradient_state
        if state.end_of_dataloader and state.sync_with_dataloader:
            self.step = 0
            state._set_sync_gradients(True)
        else:
            self.step += 1
            state._set_sync_gradients(self.step % state.num_steps == 0)


def _has_gradients(model: nn.Module) -> bool:
    return any(param.grad is not None for param in model.parameters())


class TokenWeightedMean:
    """Scales accumulated gradients to those of the mean over all items of a global batch.

    Attributes:
        items: Count of this rank since the last division, or None.

    Args:
        strategy: Strategy whose ranks share the batch.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._state = GradientState()
        self.items: torch.Tensor | None = None

    def add(self, num_items: int | float | torch.Tensor, models: Sequence[nn.Module]) -> None:
        """Adds the items (tokens, samples, or their weights) of one micro-batch of this rank.

        Raises:
            ValueError: for a negative or non-scalar count, or if the gradients of `models` were divided already and no
                optimizer has stepped since.
        """
        device = self._strategy.world.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        if isinstance(num_items, torch.Tensor):
            if num_items.numel() != 1:
                raise ValueError(
                    f"num_items must be one number, found a tensor of shape {tuple(num_items.shape)}: pass the count of "
                    "items whose losses were summed, such as `(labels != -100).sum()`."
                )
            # A copy: the sum over the ranks is taken in place.
            count = num_items.detach().to(device, dtype, copy=True).reshape(())
            if device.type == "cpu":  # elsewhere, item() would synchronize
                self._check(count.item())
        else:
            self._check(num_items)
            count = torch.tensor(float(num_items), dtype=dtype, device=device)
        if self.items is None and self._state.divided and any(map(_has_gradients, models)):
            raise ValueError(
                "backward(..., num_items=...) has divided the gradients of this update already, and no prepared optimizer "
                "has stepped since. Add losses up before one backward, or mark all but the last backward of an update "
                "with `accumulate` or `no_sync`."
            )
        self.items = count if self.items is None else self.items + count

    @staticmethod
    def _check(num_items: float) -> None:
        if num_items < 0:
            raise ValueError(f"num_items must not be negative, found {num_items}.")

    def divide(self, models: Sequence[nn.Module]) -> None:
        """Divides the synchronized gradients of `models` by the number of items on all ranks, and restarts the count."""
        assert self.items is not None, "add() comes first"
        items, self.items = self.items, None
        # Tensor-parallel ranks count the same items; their number cancels out of the factor.
        ranks = self._strategy.world.size
        if ranks > 1:
            self._strategy.world.collectives.all_reduce(items)
        # Gradients are averaged over ranks: times `ranks` is their sum. Without items, they become zero.
        factor = torch.where(items > 0, ranks / items, torch.zeros_like(items))
        gradients = {param.grad for model in models for param in model.parameters() if param.grad is not None}
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for gradient in gradients:
            if gradient.is_sparse:
                gradient.mul_(factor.to(gradient.device))
            else:  # the local shard of a DTensor
                own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                by_device.setdefault(gradient.device, []).append(own)
        for device, dense in by_device.items():
            torch._foreach_mul_(dense, factor.to(device))
        self._state.divided = bool(gradients)
