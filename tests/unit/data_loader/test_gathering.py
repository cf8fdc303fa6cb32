"""Gathering on one process; tests/processes/test_data_loader_gathering.py has the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from accelerate.data_loader import (
    StepSizes,
    gather_for_metrics,
    gather_items,
    gather_rows,
    prepare_data_loader,
    skip_first_batches,
)
from accelerate.data_loader.gathering import active_collectives
from accelerate.runtime.collective_backend import Collectives
from accelerate.state import GradientState


def test_one_process_gathers_its_input_unchanged() -> None:
    state = GradientState()
    loader = prepare_data_loader(DataLoader(list(range(5)), batch_size=2))
    for batch in loader:
        tree = {"rows": batch, "pair": (batch, [batch])}
        assert gather_for_metrics(tree, state) == tree
        assert gather_for_metrics(["a"], state) == ["a"]
        assert gather_for_metrics({"any": "thing"}, state) == {"any": "thing"}
        assert gather_for_metrics(batch, state, use_gather_object=True) is batch
    assert gather_for_metrics(torch.ones(3), state).tolist() == [1, 1, 1]


class Halves(IterableDataset):
    """The numbers below `n`, of unknown length; each worker reads its half."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter(range(first, self.n, step))


class Batches(BatchSampler):
    """A batch sampler of one's own: its length and the rows of its batches are taken from no one."""


def _map(**options: Any) -> Any:
    return DataLoader(list(range(19)), batch_size=8, **options)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: prepare_data_loader(_map()),
        lambda: prepare_data_loader(_map(shuffle=True)),
        lambda: prepare_data_loader(_map(shuffle=True), use_seedable_sampler=True),
        lambda: prepare_data_loader(_map(shuffle=True, generator=torch.Generator()), rng_types=["generator"]),
        lambda: prepare_data_loader(_map(), use_stateful_dataloader=True),
        lambda: prepare_data_loader(_map(), split_batches=True),
        lambda: prepare_data_loader(_map(num_workers=2)),
        lambda: prepare_data_loader(_map(), put_on_device=True, dispatch_batches=True),
        lambda: prepare_data_loader(_map(collate_fn=lambda rows: [str(row) for row in rows])),
        lambda: skip_first_batches(prepare_data_loader(_map()), 1),
        lambda: prepare_data_loader(
            DataLoader(list(range(19)), batch_sampler=Batches(SequentialSampler(range(19)), 8, False))
        ),
        lambda: prepare_data_loader(DataLoader(Halves(19), batch_size=8)),
        lambda: prepare_data_loader(DataLoader(Halves(19), batch_size=8, num_workers=2)),
        lambda: prepare_data_loader(DataLoader(Halves(19), batch_size=8), use_stateful_dataloader=True),
        lambda: prepare_data_loader(DataLoader(Halves(19), batch_size=8), put_on_device=True, dispatch_batches=True),
        lambda: skip_first_batches(DataLoader(Halves(19), batch_size=8), 1),
    ],
)
def test_a_value_repeated_to_a_full_batch_is_trimmed_like_the_batch(make: Any) -> None:
    loader, state = make(), GradientState()
    lengths = []
    for batch in loader:
        held = len(batch)
        lengths.append(held)
        tree = {"loss": torch.tensor(0.5).repeat(8), "rows": [torch.arange(held)], "six": torch.ones(6, 2)}
        found = gather_for_metrics(tree, state)
        assert found["loss"].shape == (held,)
        assert found["rows"][0].tolist() == list(range(held)), "rows of the batch stay"
        assert found["six"].shape == (6, 2), "what is neither of the batch nor repeated to a full one stays too"
        assert gather_for_metrics([0.5] * 8, state) == [0.5] * held
        assert len(gather_for_metrics(torch.ones(8), state, use_gather_object=True)) == held
    assert min(lengths) < 8 and sum(lengths) == (11 if loader.__dict__.get("_origin") or len(lengths) == 2 else 19)
    assert len(gather_for_metrics(torch.ones(8), state)) == 8, "outside of a loop nothing is cut"


def test_a_last_batch_of_as_many_rows_as_a_full_one_stays_whole() -> None:
    state = GradientState()

    def four_rows_each(samples: list[int]) -> torch.Tensor:
        return torch.tensor(samples).repeat_interleave(4)

    loader = prepare_data_loader(DataLoader(list(range(10)), batch_size=8, collate_fn=four_rows_each))
    assert [len(gather_for_metrics(batch, state)) for batch in loader] == [32, 8]
    loader = prepare_data_loader(DataLoader(list(range(10)), batch_size=8, drop_last=True))
    assert [len(gather_for_metrics(torch.ones(8), state)) for _ in loader] == [8]
    loader = prepare_data_loader(DataLoader(list(range(16)), batch_size=8))
    assert [len(gather_for_metrics(torch.ones(8), state)) for _ in loader] == [8, 8]


class Foreign:
    """A loader of another library: it says how many samples its last batch holds, and no more."""

    end_of_dataloader = True
    remainder = 2


def test_the_remainder_of_a_foreign_loader_is_used() -> None:
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
    ("step_sizes", "rows", "items"),
    [
        (None, [7, 8] * 3, ["a", "b"] * 3),
        (StepSizes((2, 2, 2), 3), [7, 8, 7], ["a", "b", "a"]),
        (StepSizes((1, 1, 1), 2, counts_batches=True), [7, 8, 7, 8], ["a", "b", "a", "b"]),
        (StepSizes((2, 0, 0), 2), [7, 8], ["a", "b"]),
    ],
)
def test_padding_is_dropped_by_step_sizes(step_sizes: StepSizes | None, rows: list[int], items: list[str]) -> None:
    assert gather_rows(torch.tensor([7, 8]), step_sizes, Three()).tolist() == rows
    assert gather_items(["a", "b"], step_sizes, Three()) == items


def test_a_scalar_is_a_row() -> None:
    assert gather_rows(torch.tensor(7), StepSizes((1, 1, 1), 2), Three()).tolist() == [7, 7]
    assert gather_rows(torch.tensor(7), StepSizes((1, 1, 1), 3, counts_batches=True), Three()).tolist() == [7, 7, 7]


def test_some_ranks_only_need_a_process_group() -> None:
    with pytest.raises(NotImplementedError, match="even_batches=True"):
        active_collectives(StepSizes((2, 1, 0), 3), Three())
