"""Fixtures for every test: real gloo ranks on demand, and a process that is left as it was found."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
from hypothesis import settings

from tests.helpers import skips
from tests.helpers.ranks import RankPool
from tests.helpers.reset import reset_singletons

# What decides whether a change lands gives the same answer twice; pytest --hypothesis-profile=thorough looks further.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile("repeatable")

# A shell starts its background jobs with Ctrl-C ignored, and every child inherits that: tests that interrupt one would wait.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# A default configuration of whoever runs the tests is not for them, and they write none into their home.
_HOME = tempfile.TemporaryDirectory(prefix="accelerate-tests-")
os.environ["HF_HOME"] = _HOME.name


@pytest.fixture(scope="module", autouse=True)
def small_garbage_collections() -> None:
    """Takes the libraries and the tests out of later collections, of which some tests cause dozens: a second each."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    skips.fail_if_unexpected(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    skips.fail_if_unexpected(report)
    return report


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """The pool behind `run_ranks`; costs nothing until it is used."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def run_ranks(rank_pool: RankPool) -> Callable[..., list[Any]]:
    """`run_ranks(n, fn, *args, **kwargs)`: what a module-level function returned on each of n real gloo ranks.

    Options beside the function's own arguments: `timeout`, `group_timeout`, `join`, `raises`, `env`; see `RankPool.run`.

    Example:
        def ranks_seen():
            return accelerate.PartialState(cpu=True).process_index

        def test_every_rank_is_there(run_ranks):
            assert run_ranks(3, ranks_seen) == [0, 1, 2]
    """
    return rank_pool.run


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """Restores the environment, the working directory and accelerate's singletons after every test."""
    environment, directory = dict(os.environ), os.getcwd()
    yield
    reset_singletons()
    os.chdir(directory)
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)
