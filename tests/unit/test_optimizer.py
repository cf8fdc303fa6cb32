"""A prepared optimizer hands on what its methods are given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accelerate import Accelerator


@pytest.mark.parametrize(
    ("options", "cleared"), [({}, None), ({"set_to_none": True}, None), ({"set_to_none": False}, 0)]
)
def test_gradients_become_none_or_zero(options, cleared):
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    accelerator.backward(model(torch.ones(1, 1)).sum())
    optimizer.zero_grad(**options)
    grad = model.weight.grad
    assert (None if grad is None else grad.item()) == cleared


def test_a_closure_is_called_and_its_result_returned():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))

    def closure() -> float:
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(1, 1)).sum())
        return 3.5

    before = model.bias.item()
    assert optimizer.step(closure) == 3.5
    assert model.bias.item() == pytest.approx(before - 1)


def test_nothing_is_cleared_or_stepped_while_gradients_accumulate():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.bias)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    seen = []
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
            optimizer.zero_grad()
        seen.append((None if model.bias.grad is None else model.bias.grad.item(), model.bias.item()))
    assert seen == [(0.5, 0.0), (None, -1.0)]
