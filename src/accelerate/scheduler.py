"""`AcceleratedScheduler`: a learning-rate scheduler that keeps time with its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .state import GradientState, PartialState


class AcceleratedScheduler:
    """Wraps a scheduler so that it steps only when its optimizers have stepped.

    A schedule is usually written for one process. When each of N processes brings a batch of its own, one update consumes
    N batches, and so by default each update steps the schedule N times.

    Args:
        scheduler: The scheduler to wrap.
        optimizers: The optimizer or optimizers it belongs to.
        step_with_optimizer: Step only when the optimizers did; False hands each call on as it is.
        split_batches: The batches are split over the processes, so that one update consumes one batch.
        per_update: Step once an update whatever the number of processes: the schedule is written in updates.
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
        """Steps the schedule, if the optimizers have just stepped. Arguments go to the wrapped scheduler."""
        if not self.step_with_optimizer:
            self.scheduler.step(*args, **kwargs)
            return
        if not self.gradient_state.sync_gradients:
            if self.gradient_state.adjust_scheduler and hasattr(self.scheduler, "_step_count"):
                # torch counts calls to warn about schedulers that step before their optimizer; this was one.
                self.scheduler._step_count += 1
            return
        if any(optimizer.step_was_skipped for optimizer in self.optimizers):
            return
        if self.split_batches or self.per_update:
            self.scheduler.step(*args, **kwargs)
            return
        total = getattr(self.scheduler, "total_steps", None)
        for _ in range(PartialState().num_processes):
            # OneCycleLR refuses to go beyond its end, which the last update of a run may reach half-way.
            if total is None or self.scheduler.last_epoch < total:
                self.scheduler.step(*args, **kwargs)

    def get_last_lr(self) -> list[float]:
        """The learning rates in use, one a parameter group."""
        rates: list[float] = self.scheduler.get_last_lr()
        return rates

    def state_dict(self) -> dict[str, Any]:
        """The wrapped scheduler's state."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the wrapped scheduler's state."""
        self.scheduler.load_state_dict(state_dict)

    def get_lr(self) -> list[float]:
        """The wrapped scheduler's next learning rates; see ``get_last_lr`` for those in use."""
        rates: list[float] = self.scheduler.get_lr()
        return rates

    def print_lr(self, *args: Any, **kwargs: Any) -> None:
        """See the wrapped scheduler."""
        self.scheduler.print_lr(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not set yet: being unpickled
            raise AttributeError(name)
        return getattr(self.scheduler, name)
