"""`AcceleratedScheduler`: a learning-rate scheduler that steps with its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .state import GradientState, PartialState


class AcceleratedScheduler:
    """Wraps a scheduler so that it steps only when its optimizers have stepped.

    A schedule is usually written for one process. Where each of N processes reads its own batch, one update consumes N
    batches, so by default each update steps the schedule N times.

    Args:
        scheduler: Scheduler to wrap.
        optimizers: Its optimizer or optimizers.
        step_with_optimizer: Whether to step only if the optimizers did; if False, each call steps the scheduler.
        split_batches: Whether batches are split over the processes, so that one update consumes one batch.
        per_update: Whether to step once per update, whatever the number of processes.
    """

    def __init__(
        self,
        scheduler: Any,
        optimizers: Any,
        step_with_optimizer: bool = True,
        split_batches: bool = False,
        per_update: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.optimizers: Sequence[Any] = optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]
        self.split_batches = split_batches
        self.step_with_optimizer = step_with_optimizer
        self.per_update = per_update
        self.gradient_state = GradientState()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Steps the schedule if the optimizers have just stepped. Arguments are passed to the wrapped scheduler."""
        if not self.step_with_optimizer:
            self.scheduler.step(*args, **kwargs)
            return
        if not self.gradient_state.sync_gradients:
            if self.gradient_state.adjust_scheduler and hasattr(self.scheduler, "_step_count"):
                # torch counts calls to warn about schedulers that step before their optimizer. Count this one.
                self.scheduler._step_count += 1
            return
        if any(optimizer.step_was_skipped for optimizer in self.optimizers):
            return
        if self.split_batches or self.per_update:
            self.scheduler.step(*args, **kwargs)
            return
        total = getattr(self.scheduler, "total_steps", None)
        for _ in range(PartialState().num_processes):
            # OneCycleLR raises beyond its end, which the last update may reach before all N steps.
            if total is None or self.scheduler.last_epoch < total:
                self.scheduler.step(*args, **kwargs)

    def get_last_lr(self) -> list[float]:
        """Returns the current learning rate of each parameter group."""
        rates: list[float] = self.scheduler.get_last_lr()
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the wrapped scheduler."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of the wrapped scheduler."""
        self.scheduler.load_state_dict(state_dict)

    def get_lr(self) -> list[float]:
        """Computes the learning rates of the wrapped scheduler; see ``get_last_lr`` for the current ones."""
        rates: list[float] = self.scheduler.get_lr()
        return rates

    def print_lr(self, *args: Any, **kwargs: Any) -> None:
        """Calls ``print_lr`` of the wrapped scheduler."""
        self.scheduler.print_lr(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not set yet, during unpickling
            raise AttributeError(name)
        return getattr(self.scheduler, name)
