"""Gathering on one process; tests/processes/test_data_loader_gathering.py has the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from accelerate.data_loader import Round, gather_for_metrics, gather_items, gather_rows, prepare_data_loader
from accelerate.data_loader.gathering import holders
from accelerate.runtime.transport import Collectives
from accelerate.state import GradientState


def test_on_one_process_everything_is_what_it_was() -> None:
    state = GradientState()
    loader = prepare_data_loader(DataLoader(list(range(5)), batch_size=2))
    for batch in loader:
        tree = {"rows": batch, "pair": (batch, [batch])}
        assert gather_for_metrics(tree, state) == tree
        assert gather_for_metrics(["a"], state) == ["a"]
        assert gather_for_metrics({"any": "thing"}, state) == {"any": "thing"}
        assert gather_for_metrics(batch, state, use_gather_object=True) is batch
    assert gather_for_metrics(torch.ones(3), state).tolist() == [1, 1, 1]


class Foreign:
    """A loader of another library: it says how many samples its last batch holds, and no more."""

    end_of_dataloader = True
    remainder = 2


def test_a_foreign_loaders_word_is_taken() -> None:
    state, loader = GradientState(), Foreign()
    state._add_dataloader(loader)
    assert gather_for_metrics((torch.arange(4),), state)[0].tolist() == [0, 1]
    assert gather_for_metrics(["a", "b", "c"], state) == ["a", "b"]
    loader.end_of_dataloader = False
    assert gather_for_metrics(["a", "b", "c"], state) == ["a", "b", "c"]


class Three(Collectives):
    """Rank 0 of three that all hold the same."""

    def __init__(self, size: int = 3) -> None:
        super().__init__(torch.device("cpu"), 0, size)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().all_gather(tensor)] * self.size)

    def all_gather_object(self, obj: Any) -> list[Any]:
        return [obj] * self.size


@pytest.mark.parametrize(
    ("round", "rows", "items"),
    [
        (None, [7, 8] * 3, ["a", "b"] * 3),
        (Round((2, 2, 2), 3), [7, 8, 7], ["a", "b", "a"]),
        (Round((1, 1, 1), 2, whole=True), [7, 8, 7, 8], ["a", "b", "a", "b"]),
        (Round((2, 0, 0), 2), [7, 8], ["a", "b"]),
    ],
)
def test_the_round_decides(round: Round | None, rows: list[int], items: list[str]) -> None:
    assert gather_rows(torch.tensor([7, 8]), round, Three()).tolist() == rows
    assert gather_items(["a", "b"], round, Three()) == items


def test_a_scalar_is_a_row() -> None:
    assert gather_rows(torch.tensor(7), Round((1, 1, 1), 2), Three()).tolist() == [7, 7]
    assert gather_rows(torch.tensor(7), Round((1, 1, 1), 3, whole=True), Three()).tolist() == [7, 7, 7]


def test_some_ranks_only_need_a_process_group() -> None:
    with pytest.raises(NotImplementedError, match="even_batches=True"):
        holders(Round((2, 1, 0), 3), Three())
