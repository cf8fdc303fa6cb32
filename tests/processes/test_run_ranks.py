"""The fixture `run_ranks` itself: the ranks are real, failures are named, nothing leaks from call to call."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import RankError, RankFailure


def summed() -> tuple[int, int, float]:
    value = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(value)
    return dist.get_rank(), dist.get_world_size(), value.item()


def joined_through_the_variables() -> tuple[bool, int]:
    before = dist.is_initialized()
    dist.init_process_group("gloo")
    return before, dist.get_world_size()


def add(a: int, b: int, *, c: int) -> int:
    return a + b + c


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"bad luck on {rank}")
    dist.barrier()


def raise_everywhere() -> None:
    raise KeyError(dist.get_rank())


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)


def spoil_the_process() -> None:
    os.environ["SPOILT"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1234)
    random.seed(1234)


def look_at_the_process() -> tuple[Any, ...]:
    drawn = (torch.rand(()).item(), random.random())
    return os.environ.get("SPOILT"), os.getcwd(), torch.get_default_dtype(), os.environ.get("GIVEN"), drawn


def process_id() -> int:
    return os.getpid()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ranks_form_one_group(run_ranks: Any, n: int) -> None:
    total = n * (n + 1) / 2
    assert run_ranks(n, summed) == [(rank, n, total) for rank in range(n)]


def test_joining_can_be_left_to_the_function(run_ranks: Any) -> None:
    assert run_ranks(2, joined_through_the_variables, join=False) == [(False, 2)] * 2


def test_arguments_travel(run_ranks: Any) -> None:
    assert run_ranks(2, add, 1, 2, c=3) == [6, 6]


def test_workers_are_reused(run_ranks: Any) -> None:
    first = run_ranks(2, process_id)
    assert run_ranks(2, process_id) == first
    assert run_ranks(1, process_id) == first[:1]


def test_a_failing_rank_is_named_with_its_traceback(run_ranks: Any) -> None:
    with pytest.raises(RankError, match="bad luck on 1") as caught:
        run_ranks(2, raise_on, 1)
    failure = caught.value.failures[0]
    assert failure.rank == 1
    assert isinstance(failure.exception, ValueError)
    assert "in raise_on" in failure.text
    assert run_ranks(2, summed)[1] == (1, 2, 3.0)


def test_expected_exceptions_come_back_as_results(run_ranks: Any) -> None:
    results = run_ranks(2, raise_everywhere, raises=True)
    assert all(isinstance(result, RankFailure) for result in results)
    assert [result.exception.args for result in results] == [(0,), (1,)]
    assert run_ranks(2, summed)[0] == (0, 2, 3.0)


def test_a_rank_that_dies_is_replaced(run_ranks: Any) -> None:
    with pytest.raises(RankError, match=r"rank 0: died\nthe worker ended with status -9"):
        run_ranks(2, die_on, 0)
    assert run_ranks(2, summed)[0] == (0, 2, 3.0)


def test_a_rank_that_hangs_is_killed_and_says_where_it_was(run_ranks: Any) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1: timeout\nno answer after 2 s.*in sleep_on"):
        run_ranks(2, sleep_on, 1, timeout=2)


def test_nothing_leaks_into_the_next_call(run_ranks: Any) -> None:
    before = run_ranks(2, look_at_the_process, env={"GIVEN": "yes"})
    run_ranks(2, spoil_the_process)
    after = run_ranks(2, look_at_the_process)
    assert [seen[3] for seen in before] == ["yes", "yes"]
    assert [seen[:3] + seen[4:] for seen in after] == [seen[:3] + seen[4:] for seen in before]
    assert [seen[3] for seen in after] == [None, None]


def test_a_function_without_an_importable_name_is_refused(run_ranks: Any) -> None:
    with pytest.raises(TypeError, match="move it to the top level"):
        run_ranks(2, lambda: None)
