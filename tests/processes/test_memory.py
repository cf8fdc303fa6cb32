"""`find_executable_batch_size` on real ranks: all agree on each size, and the case that cannot be retried ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from accelerate.runtime import world
from accelerate.runtime.collectives import reduce
from accelerate.runtime.memory import find_executable_batch_size
from tests.helpers.ranks import RankFailure

RunRanks = Callable[..., list[Any]]


def sizes_tried(limits: list[int], meet: bool) -> tuple[int, list[int]]:
    """The search where each rank has room for another size; `meet`: those with room add something up before."""
    here = world.join(cpu=True)
    tried: list[int] = []

    @find_executable_batch_size(starting_batch_size=64)
    def attempt(batch_size: int) -> int:
        tried.append(batch_size)
        if meet:
            assert reduce(torch.ones(1), "sum").item() == here.size
        if batch_size > limits[here.rank]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        time.sleep(0.02 * here.rank)
        return batch_size

    found = attempt()
    assert attempt() == found  # the second search uses the same channel
    # The ranks are still in step.
    assert reduce(torch.ones(1), "sum").item() == here.size
    return found, tried


@pytest.mark.parametrize(
    ("limits", "found"), [([100, 20], 16), ([5, 100], 4), ([100, 100], 64), ([40, 3, 100], 2), ([1, 1, 1], 1)]
)
def test_all_ranks_try_the_same_sizes(run_ranks: RunRanks, limits: list[int], found: int) -> None:
    for meet in (False, True):
        ranks = run_ranks(len(limits), sizes_tried, limits, meet)
        assert all(rank == ranks[0] for rank in ranks)
        size, expected = 64, []
        while size >= found:
            expected.append(size)
            size //= 2
        assert ranks[0] == (found, expected * 2)


def words_while_searching() -> list[str]:
    world.join(cpu=True)
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("accelerate").addHandler(handler)

    @find_executable_batch_size(starting_batch_size=8)
    def attempt(batch_size: int) -> None:
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    attempt()
    logging.getLogger("accelerate").removeHandler(handler)
    return heard


def test_a_search_that_goes_well_is_quiet(run_ranks: RunRanks) -> None:
    assert run_ranks(2, words_while_searching) == [[], []]


def joins_inside() -> tuple[int, list[int]]:
    tried: list[int] = []
    assert not world.is_joined()

    @find_executable_batch_size(starting_batch_size=8)
    def attempt(batch_size: int) -> int:
        tried.append(batch_size)
        here = world.current() if world.is_joined() else world.join(cpu=True)
        if batch_size > 3 and here.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch_size

    return attempt(), tried


def test_a_run_that_is_joined_inside_the_first_attempt(run_ranks: RunRanks) -> None:
    assert run_ranks(2, joins_inside, join=False) == [(2, [8, 4, 2])] * 2


def uneven_steps() -> tuple[list[int], str]:
    here = world.join(cpu=True)
    tried: list[int] = []

    def attempt(batch_size: int) -> None:
        tried.append(batch_size)
        if here.rank == 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    search = find_executable_batch_size(attempt, 16, lambda size: size - (3 if here.rank else 5))
    try:
        search()
    except RuntimeError as error:
        return tried, str(error)
    raise AssertionError("nothing fitted on rank 0, and no error came")


def test_the_smallest_next_size_counts_and_all_give_up_together(run_ranks: RunRanks) -> None:
    for tried, error in run_ranks(2, uneven_steps):
        assert tried == [16, 11, 6, 1]
        assert "No executable batch size found" in error


def peers_wait_inside() -> None:
    here = world.join(cpu=True)

    @find_executable_batch_size(starting_batch_size=8)
    def attempt(batch_size: int) -> None:
        if here.rank == 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        dist.all_reduce(torch.ones(1))

    attempt()


def test_a_peer_that_waits_inside_times_out_and_all_raise(run_ranks: RunRanks) -> None:
    """What the docstring promises for the case that cannot be retried: an error on every rank, nothing mixed up."""
    start = time.monotonic()
    alone, waiting = run_ranks(2, peers_wait_inside, raises=True, group_timeout=3.0, timeout=40.0)
    assert time.monotonic() - start < 30
    assert isinstance(alone, RankFailure)
    assert isinstance(waiting, RankFailure)
    assert "could not agree on a batch size" in alone.text
    assert waiting.kind in ("RuntimeError", "DistBackendError")
    assert "could not agree" not in waiting.text


def one_has_a_mistake() -> None:
    here = world.join(cpu=True)

    @find_executable_batch_size(starting_batch_size=8)
    def attempt(batch_size: int) -> None:
        if here.rank == 1:
            raise KeyError("a mistake of mine")

    attempt()


def test_other_errors_are_not_held_up(run_ranks: RunRanks) -> None:
    left, mistaken = run_ranks(2, one_has_a_mistake, raises=True, timeout=40.0)
    assert isinstance(mistaken, RankFailure)
    assert isinstance(left, RankFailure)
    assert mistaken.kind == "KeyError"
    assert "could not agree" in left.text
