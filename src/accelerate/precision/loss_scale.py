"""The loss scale of an fp16 run, shared by all its optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from ..runtime.collective_backend import Collectives


class LossScaler(torch.amp.GradScaler):
    """A gradient scaler that defers `update` until the next loss is scaled or the state is read.

    torch requires one call of `update` after all optimizers of an iteration have stepped, and the wrapper of a single
    optimizer has no way to detect that point.

    Attributes:
        peers: Collectives of the ranks that hold other shards of the gradients, and skip steps together; None if every
            rank has all gradients.
    """

    peers: Collectives | None = None
    _stepped = False

    def update_if_stepped(self) -> None:
        """Updates the scale if any optimizer has stepped since the last update."""
        if self._stepped:
            self.update()

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """See torch; optional here."""
        self._stepped = False
        super().update(new_scale)

    def scale(self, outputs: Any) -> Any:
        """See torch; updates the scale first."""
        self.update_if_stepped()
        return super().scale(outputs)

    def get_scale(self) -> float:
        """See torch; updates the scale first."""
        self.update_if_stepped()
        return super().get_scale()

    def state_dict(self) -> dict[str, Any]:
        """See torch; updates the scale first."""
        self.update_if_stepped()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch; discards steps and overflows recorded since the last update."""
        self._stepped = False
        super().load_state_dict(state_dict)
        if self.is_enabled():
            self._per_optimizer_states.clear()

    def __getstate__(self) -> dict[str, Any]:
        self.update_if_stepped()  # torch refuses to pickle between a step and its update
        return super().__getstate__()

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the optimizer's gradients by the scale, once per update, however often it is called."""
        if self.is_enabled() and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            super().unscale_(optimizer)
            if self.peers is not None:
                self._sync_overflow(self.peers, optimizer)

    def _sync_overflow(self, peers: Collectives, optimizer: torch.optim.Optimizer) -> None:
        """All-reduces the overflow flags of all devices to one flag, 0 or 1, as fused kernels compare it to 1."""
        assert self._scale is not None, "unscaling made one"
        state = self._per_optimizer_states[id(optimizer)]
        # A rank may hold no gradients, and offloaded gradients are on another device than the loss.
        found = [one.to(peers.device) for one in state["found_inf_per_device"].values()]
        overflow = torch.stack([torch.zeros((), device=peers.device), *found]).max()
        peers.all_reduce(overflow, "max")
        state["found_inf_per_device"] = {self._scale.device: overflow.to(self._scale.device)}

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """See torch; the scale is updated later."""
        if self.is_enabled() and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.STEPPED:
            self.update_if_stepped()  # a second step: torch requires an `update` in between
        if self.peers is not None:
            self.unscale_(optimizer)  # fused optimizers unscale too, but check this rank's gradients only
        result = super().step(optimizer, *args, **kwargs)
        self._stepped = self.is_enabled()
        return result


def found_inf_of(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Returns the scaler's overflow flags of the last step, one tensor per device, above 0 for an overflow.

    Reading one synchronizes with its device.
    """
    if not scaler.is_enabled():
        return []
    found: dict[Any, torch.Tensor] = scaler._found_inf_per_device(optimizer)
    return list(found.values())
