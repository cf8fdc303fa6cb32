"""The loss scale of an fp16 run, shared by all its optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.amp.grad_scaler import OptState


class LossScaler(torch.amp.GradScaler):
    """torch's gradient scaler, whose factor changes between updates and never within one.

    torch wants `update` called once, after all optimizers of an iteration have stepped; a wrapper around one optimizer
    cannot know when that is. Here a step only notes that it happened, and the factor is updated before the next loss is
    scaled, or its state read.

    Attributes:
        agree: Adds up over the ranks what each found in its gradients, where they hold different pieces of them.
    """

    agree: Callable[[torch.Tensor], None] | None = None
    _stepped = False

    def settle(self) -> None:
        """Updates the factor if any optimizer has stepped since the last update."""
        if self._stepped:
            self._stepped = False
            self.update()

    def scale(self, outputs: Any) -> Any:
        """See torch; settles first."""
        self.settle()
        return super().scale(outputs)

    def get_scale(self) -> float:
        """See torch; settles first."""
        self.settle()
        return super().get_scale()

    def state_dict(self) -> dict[str, Any]:
        """See torch; settles first."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch; a step that was noted before belongs to the state that is replaced."""
        self._stepped = False
        super().load_state_dict(state_dict)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the optimizer's gradients by the factor; once an update, however often it is called."""
        if self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            super().unscale_(optimizer)
            if self.agree is not None:
                self._agree(self.agree, optimizer)

    def _agree(self, add: Callable[[torch.Tensor], None], optimizer: torch.optim.Optimizer) -> None:
        assert self._scale is not None, "unscaling made one"
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        # A rank may hold no piece of what has gradients.
        add(found.setdefault(self._scale.device, torch.zeros(1, device=self._scale.device)))

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """See torch; the factor is updated later."""
        if self._per_optimizer_states[id(optimizer)]["stage"] is OptState.STEPPED:
            self.settle()  # two steps on one gradient: what torch would have needed an `update` between
        result = super().step(optimizer, *args, **kwargs)
        self._stepped = self.is_enabled()
        return result


def overflow_of(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What the scaler found in the optimizer's gradients at the last step: one number a device, above 0 for an overflow.

    They stay on their devices: reading one waits for it.
    """
    found: dict[Any, torch.Tensor] = scaler._found_inf_per_device(optimizer)
    return list(found.values())
