"""`AcceleratedOptimizer`: a torch optimizer that steps only when gradients are synchronized.

It is a subclass of torch's ``Optimizer``, as schedulers require, and delegates to the optimizer it wraps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .precision.loss_scale import LossScaler, found_inf_of
from .runtime.tensors.pytree import send_to_device
from .state import AcceleratorState, GradientState


class AcceleratedOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer so that `step` and `zero_grad` do nothing while gradients accumulate.

    Args:
        optimizer: The optimizer to wrap.
        device_placement: Whether to move the optimizer's state to the device of the run.
        scaler: Gradient scaler of an fp16 run; it skips a step whose gradients overflowed.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device_placement: bool = True,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        # No super().__init__(): state, groups and defaults are the wrapped optimizer's.
        self.optimizer = optimizer
        self.scaler = scaler
        self.accelerator_state = AcceleratorState()
        self.gradient_state = GradientState()
        self.device_placement = device_placement
        self._overflow: list[torch.Tensor] = []
        if device_placement and optimizer.state:
            device = self.accelerator_state.device
            for param, values in optimizer.state.items():
                target = param.device if isinstance(param, torch.Tensor) else device
                optimizer.state[param] = {
                    # Scalar step counters stay on the CPU, unless the optimizer is capturable.
                    key: value if key == "step" else send_to_device(value, target)
                    for key, value in values.items()
                }

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = param_groups

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See ``torch.optim.Optimizer.add_param_group``."""
        self.optimizer.add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``torch.optim.Optimizer.load_state_dict``."""
        self.optimizer.load_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """See ``torch.optim.Optimizer.state_dict``."""
        return self.optimizer.state_dict()

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Clears gradients if this step synchronizes them; accumulating gradients are kept.

        Args:
            set_to_none: As in torch; None means the default of the wrapped optimizer.
        """
        if not self.gradient_state.sync_gradients:
            return
        if set_to_none is None:
            self.optimizer.zero_grad()
        else:
            self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps if gradients are synchronized, and returns the result of the wrapped optimizer's step."""
        if not self.gradient_state.sync_gradients:
            return None
        self.gradient_state.divided = False
        if self.scaler is None:
            return self.optimizer.step() if closure is None else self.optimizer.step(closure)
        result = self.scaler.step(self.optimizer) if closure is None else self.scaler.step(self.optimizer, closure)
        self._overflow = found_inf_of(self.scaler, self.optimizer)
        if not isinstance(self.scaler, LossScaler):  # which updates itself
            self.scaler.update()
        return result

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped because fp16 gradients overflowed."""
        return any(found.item() > 0 for found in self._overflow)

    def train(self) -> None:
        """Switches to training mode, for optimizers that have one (schedule-free ones)."""
        if callable(mode := getattr(self.optimizer, "train", None)):
            mode()

    def eval(self) -> None:
        """Switches to evaluation mode, for optimizers that have one."""
        if callable(mode := getattr(self.optimizer, "eval", None)):
            mode()

    def parameters(self) -> Iterator[torch.Tensor]:
        """Yields the parameters of all groups."""
        for group in self.param_groups:
            yield from group["params"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "device_placement": self.device_placement, "scaler": self.scaler}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # connects to the shared states of this process
