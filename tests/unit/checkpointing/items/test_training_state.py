"""What was accumulated in an open window, taken up by any number of ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from accelerate.checkpointing.items.state_item import TrainingState
from accelerate.checkpointing.items.training_state import restore_gradients
from accelerate.state import GradientState


def state_of(model):
    holder = SimpleNamespace(step=0, items=None)
    return TrainingState([model], [], [], [], [], None, holder, holder, GradientState())


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("counted", [False, True])
def test_other_ranks_share_what_all_had_accumulated(size, counted):
    model = nn.Linear(2, 1, bias=False)
    run = state_of(model)
    saved = [
        {"gradients": [torch.full((1, 2), float(rank))], "items": torch.tensor(10.0 * rank) if counted else None}
        for rank in (1, 2, 3)
    ]
    restore_gradients(run, saved, size)
    # The next synchronization averages over the ranks: of sums, the ranks' parts make the sum; of means, each is the mean.
    share = 6 / size if counted else 2
    assert model.weight.grad is not None and model.weight.grad[0].tolist() == pytest.approx([share, share])
    assert (None if run.mean.items is None else run.mean.items.item()) == (
        pytest.approx(60 / size) if counted else None
    )


@pytest.mark.parametrize("items", [None, torch.tensor(4.0)])
def test_a_rank_takes_up_its_own(items):
    model = nn.Linear(2, 1, bias=False)
    run = state_of(model)
    restore_gradients(run, [{"gradients": [torch.ones(1, 2)], "items": items}], 3)
    assert model.weight.grad is not None and model.weight.grad.tolist() == [[1, 1]]
    assert run.mean.items == items
