"""The loss scale of an fp16 run, shared by all its optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from ..runtime.collective_backend import Collectives


class LossScaler(torch.amp.GradScaler):
    """torch's gradient scaler, whose factor changes between updates and never within one.

    torch wants `update` called once, after all optimizers of an iteration have stepped; a wrapper around one optimizer
    cannot know when that is. Here a step only notes that it happened, and the factor is updated before the next loss is
    scaled, or its state read.

    Attributes:
        peers: The ranks that hold other shards of the gradients, and skip a step together; None: each rank sees them all.
    """

    peers: Collectives | None = None
    _stepped = False

    def update_if_stepped(self) -> None:
        """Updates the factor if any optimizer has stepped since the last update."""
        if self._stepped:
            self.update()

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """See torch; not needed here, and loops that call it after their steps may do so."""
        self._stepped = False
        super().update(new_scale)

    def scale(self, outputs: Any) -> Any:
        """See torch; settles first."""
        self.update_if_stepped()
        return super().scale(outputs)

    def get_scale(self) -> float:
        """See torch; settles first."""
        self.update_if_stepped()
        return super().get_scale()

    def state_dict(self) -> dict[str, Any]:
        """See torch; settles first."""
        self.update_if_stepped()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch; steps and overflows recorded since the last update belong to the state that is replaced."""
        self._stepped = False
        super().load_state_dict(state_dict)
        if self.is_enabled():
            self._per_optimizer_states.clear()

    def __getstate__(self) -> dict[str, Any]:
        self.update_if_stepped()  # torch refuses to pickle between a step and its update
        return super().__getstate__()

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the optimizer's gradients by the factor; once an update, however often it is called."""
        if self.is_enabled() and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            super().unscale_(optimizer)
            if self.peers is not None:
                self._sync_overflow(self.peers, optimizer)

    def _sync_overflow(self, peers: Collectives, optimizer: torch.optim.Optimizer) -> None:
        """Replaces the overflows found per device by one number, 0 or 1 on all ranks: fused kernels compare it to 1."""
        assert self._scale is not None, "unscaling made one"
        state = self._per_optimizer_states[id(optimizer)]
        # A rank may hold no shard of what has gradients, and offloaded gradients are not where the loss was.
        found = [one.to(peers.device) for one in state["found_inf_per_device"].values()]
        overflow = torch.stack([torch.zeros((), device=peers.device), *found]).max()
        peers.all_reduce(overflow, "max")
        state["found_inf_per_device"] = {self._scale.device: overflow.to(self._scale.device)}

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """See torch; the factor is updated later."""
        if self.is_enabled() and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.STEPPED:
            self.update_if_stepped()  # two steps on one gradient: what torch would have needed an `update` between
        if self.peers is not None:
            self.unscale_(optimizer)  # torch leaves this to fused optimizers, which look at this rank's gradients only
        result = super().step(optimizer, *args, **kwargs)
        self._stepped = self.is_enabled()
        return result


def found_inf_of(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What the scaler found in the optimizer's gradients at the last step: one number a device, above 0 for an overflow.

    They stay on their devices: reading one waits for it.
    """
    if not scaler.is_enabled():
        return []
    found: dict[Any, torch.Tensor] = scaler._found_inf_per_device(optimizer)
    return list(found.values())
