"""A request to stop: a signal on any rank becomes a flag that all ranks see at the same step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch

from ..runtime import world

EXIT_CODE = 75
"""What a script exits with when it has saved because it was asked to stop: EX_TEMPFAIL, "try again later"."""


class PreemptionHandler:
    """Remembers that this process was asked to stop, and shares it with the others."""

    def __init__(self) -> None:
        self.raised = False
        self._before: dict[int, Any] = {}

    def watch(self, *signals: int) -> None:
        """Has these signals remembered instead of ending the process. A handler that is there is called as well.

        Raises:
            ValueError: on another thread than the main one, where Python sets no handlers.
        """
        for number in signals:
            if number not in self._before:
                self._before[number] = signal.signal(number, self._note)

    @property
    def watching(self) -> bool:
        """Whether any signal is watched."""
        return bool(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        before = self._before.get(number)
        if callable(before):
            before(number, frame)

    def release(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        self._before.clear()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. All ranks call this together; once true it stays so."""
        here = world.current()
        flag = torch.tensor(int(self.raised), device=here.device)
        asked = bool(here.collectives.all_reduce(flag, "max").item())
        self.raised = self.raised or asked  # a signal may have come meanwhile: the next call tells
        return asked
