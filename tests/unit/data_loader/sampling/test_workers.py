"""Workers outlast a SIGTERM while their loader is in use, and end with it."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader

from accelerate.data_loader import prepare_data_loader
from accelerate.data_loader.sampling.workers import _live_workers

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


@pytest.fixture(autouse=True)
def _collected_before() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def make(stateful: bool, persistent: bool, dataset: Any = None, workers: int = 2) -> Any:
    plain: DataLoader[Any] = DataLoader(
        list(range(400)) if dataset is None else dataset, num_workers=workers, persistent_workers=persistent
    )
    return prepare_data_loader(plain, use_stateful_dataloader=stateful)


def begin(loader: Any) -> tuple[Any, list[Any]]:
    """An iteration at its first batch, and the workers that read for it."""
    iterator = iter(loader)
    next(iterator)
    return iterator, _live_workers()


kinds = pytest.mark.parametrize(
    ("stateful", "persistent"), [(False, False), (False, True), (True, False), (True, True)]
)


@kinds
def test_workers_survive_sigterm_to_all_processes(stateful: bool, persistent: bool) -> None:
    iterator, workers = begin(make(stateful, persistent))
    assert len(workers) == 2
    next(iterator)  # of the second worker, which is up by then as well
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert sum(1 for _ in iterator) == 398


@kinds
def test_no_worker_is_alive_without_its_loader(stateful: bool, persistent: bool) -> None:
    loader = make(stateful, persistent)
    iterator, workers = begin(loader)
    del loader, iterator
    assert len(workers) == 2 and not any(worker.is_alive() for worker in workers)


@kinds
def test_no_worker_is_alive_without_its_loader_in_a_cycle(stateful: bool, persistent: bool) -> None:
    loader = make(stateful, persistent)
    iterator, workers = begin(loader)
    loader.itself = [loader]
    del loader, iterator
    gc.collect()
    for worker in workers:
        worker.join(20)
    assert len(workers) == 2 and not any(worker.is_alive() for worker in workers)


class Hangs:
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index:
            time.sleep(600)
        return index


def test_a_worker_that_hangs_ends_too() -> None:
    loader = make(False, True, Hangs(), workers=1)
    iterator, workers = begin(loader)
    del loader, iterator
    workers[0].join(10)  # not every release of torch waits for the worker that it has killed
    assert len(workers) == 1 and not workers[0].is_alive()
