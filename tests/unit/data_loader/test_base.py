"""Loaders constructed directly: options, and the choice of class."""

from __future__ import annotations

import sys
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
def test_iteration_sets_the_first_epoch(kind):
    loader = kind(range(2), iteration=3)
    assert loader.iteration == 3
    list(loader)
    assert loader.iteration == 4


@pytest.mark.parametrize("kind", [DataLoaderShard, DataLoaderDispatcher, SkipDataLoader])
def test_use_stateful_dataloader_keeps_the_position(kind):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is optional").StatefulDataLoader
    assert isinstance(kind(range(2), use_stateful_dataloader=True), stateful)
    assert not isinstance(kind(range(2)), stateful)


def test_missing_torchdata_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torchdata")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchdata", None)
    with pytest.raises(ImportError, match=r"accelerate\[stateful\]"):
        DataLoaderShard(range(4), use_stateful_dataloader=True)


def test_use_stateful_dataloader_is_a_keyword_argument() -> None:
    with pytest.raises(TypeError, match="as a keyword argument"):
        DataLoaderShard(range(4), None, None, None, 0, True)


def test_a_custom_class_has_no_stateful_variant() -> None:
    pytest.importorskip("torchdata")

    class Own(DataLoaderShard):
        pass

    with pytest.raises(TypeError, match="Own has none: derive from one of StatefulDataLoaderShard"):
        Own(range(4), use_stateful_dataloader=True)
