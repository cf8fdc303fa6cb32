"""Preemption: a signal on any rank becomes a flag that all ranks see at the same step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch

from ..runtime import world

EXIT_CODE = 75
"""Exit code of a script that saved because it was asked to stop: EX_TEMPFAIL, "try again later"."""


class PreemptionHandler:
    """Records signals that ask this process to stop, and shares them with the other ranks."""

    def __init__(self) -> None:
        self.raised = False
        self._previous: dict[int, Any] = {}

    def watch(self, *signals: int) -> None:
        """Records these signals instead of ending the process. A previous handler is called as well.

        Raises:
            ValueError: on a thread other than the main one, where Python sets no handlers.
        """
        for number in signals:
            if number not in self._previous:
                self._previous[number] = signal.signal(number, self._handle)

    @property
    def watching(self) -> bool:
        """Returns whether any signal is recorded."""
        return bool(self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)

    def release(self) -> None:
        """Restores the previous handlers."""
        for number, previous in self._previous.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
        self._previous.clear()

    def agreed(self) -> bool:
        """Returns whether any rank was asked to stop. Collective; once true, it stays true."""
        here = world.current()
        flag = torch.tensor(int(self.raised), device=here.device)
        stop = bool(here.collectives.all_reduce(flag, "max").item())
        self.raised = self.raised or stop  # a signal that arrived since the reduction counts at the next call
        return stop
