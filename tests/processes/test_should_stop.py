"""A signal on one rank stops all at the same step."""

from __future__ import annotations

import os
import signal
from typing import Any

from accelerate import Accelerator
from accelerate.runtime import world


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
        accelerator._preemption.release()
    return -1


def test_all_ranks_stop_at_the_same_step(run_ranks: Any) -> None:
    first, second = run_ranks(2, steps_until_stopped)
    assert first == second == 7


def steps_until_stopped_while_asking() -> int:
    """The signal comes in the middle of the question, when the others have been told that there is none."""
    accelerator = Accelerator(cpu=True)
    collectives = world.current().collectives
    reduce = collectives.all_reduce

    def interrupted(*args: Any) -> Any:
        if step == 7 and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return reduce(*args)

    collectives.all_reduce = interrupted  # type: ignore[method-assign]
    try:
        for step in range(50):
            if accelerator.should_stop:
                return step
    finally:
        del collectives.all_reduce
        accelerator._preemption.release()
    return -1


def test_a_signal_in_the_middle_of_the_question_is_not_lost(run_ranks: Any) -> None:
    assert run_ranks(2, steps_until_stopped_while_asking) == [8, 8]
