"""The logger on real ranks: who speaks, with which prefix, and in which order."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from accelerate.logging import get_logger
from accelerate.state import PartialState
from tests.helpers.behaviors import outputs, per_rank

RunRanks = Callable[..., list[Any]]


class Kept(logging.Handler):
    """Keeps what is said, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.getMessage(), time.monotonic()))


def spoken() -> list[str]:
    PartialState(cpu=True)
    handler = Kept()
    logger = get_logger("tests.spoken", log_level="INFO")
    logger.logger.addHandler(handler)
    logger.info("a")
    logger.info("b", main_process_only=False)
    logger.info("c", main_process_only=False, in_order=True)
    logger.debug("d", main_process_only=False)
    logger.logger.removeHandler(handler)
    return " ".join(text for text, _ in handler.said).split()


def ordered() -> list[tuple[str, float]]:
    state = PartialState(cpu=True)
    handler = Kept()
    logger = get_logger("tests.ordered", log_level="INFO")
    logger.logger.addHandler(handler)
    time.sleep(0.1 * (state.num_processes - state.process_index))  # the last rank is ready first
    logger.info("%s here", state.process_index, main_process_only=False, in_order=True)
    # One rank does not listen: the others must not wait for it in vain.
    logger.setLevel("ERROR" if state.process_index == 1 else "INFO")
    logger.info("again", main_process_only=False, in_order=True)
    state.wait_for_everyone()
    logger.logger.removeHandler(handler)
    return handler.said


@pytest.mark.parametrize("size", [2, 3])
def test_who_speaks(run_ranks: RunRanks, size: int) -> None:
    expected = per_rank(outputs("get_logger", P=3)[0], 3)[:size]
    assert run_ranks(size, spoken) == expected


@pytest.mark.parametrize("size", [2, 3])
def test_in_order(run_ranks: RunRanks, size: int) -> None:
    ranks = run_ranks(size, ordered)
    first = [rank[0] for rank in ranks]
    assert [text for text, _ in first] == [f"[RANK {rank}] {rank} here" for rank in range(size)]
    assert [moment for _, moment in first] == sorted(moment for _, moment in first)
    assert [len(rank) for rank in ranks] == [1 if rank == 1 else 2 for rank in range(size)]
