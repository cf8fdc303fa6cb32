"""Options of the loaders that are made without `prepare`: each test fails if its option is ignored."""

from __future__ import annotations

from typing import Any

import pytest

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, SkipDataLoader


@pytest.fixture(autouse=True)
def run():
    Accelerator(cpu=True)


def batches(loader: Any) -> list[Any]:
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("kind", [DataLoaderShard, DataLoaderDispatcher, SkipDataLoader])
def test_batches_are_skipped(kind):
    loader = kind(range(6), skip_batches=2, batch_size=2)
    assert batches(loader) == [[4, 5]]


@pytest.mark.parametrize("kind", [DataLoaderShard, DataLoaderDispatcher])
def test_epochs_are_numbered_from_where_asked(kind):
    loader = kind(range(2), iteration=3)
    assert loader.iteration == 3
    list(loader)
    assert loader.iteration == 4


@pytest.mark.parametrize("kind", [DataLoaderShard, DataLoaderDispatcher, SkipDataLoader])
def test_a_loader_keeps_its_position_if_asked(kind):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is optional").StatefulDataLoader
    assert isinstance(kind(range(2), use_stateful_dataloader=True), stateful)
    assert not isinstance(kind(range(2)), stateful)
