"""A signal on one rank stops all at the same step."""

from __future__ import annotations

import os
import signal
from typing import Any

from accelerate import Accelerator


def steps_until_stopped() -> int:
    accelerator = Accelerator(cpu=True)
    try:
        for step in range(50):
            if step == 7 and accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if accelerator.should_stop:
                assert accelerator.should_stop
                return step
    finally:
        accelerator._stop_request.release()
    return -1


def test_all_ranks_stop_at_the_same_step(run_ranks: Any) -> None:
    first, second = run_ranks(2, steps_until_stopped)
    assert first == second == 7
