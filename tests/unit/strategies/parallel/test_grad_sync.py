"""What averages the gradients of a model holds on to nothing, and a copy of the model has nothing averaged."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from accelerate.strategies.parallel.grad_sync import has_grad_all_reduce, register_grad_all_reduce


@pytest.mark.parametrize("all_used", [True, False])
def test_the_model_goes_when_it_is_let_go(all_used: bool) -> None:
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    register_grad_all_reduce(model, model.parameters(), None, all_used=all_used)
    assert not model.weight.requires_grad and model.bias.requires_grad
    gone = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_a_copy_is_not_prepared() -> None:
    model = nn.Linear(3, 3)
    register_grad_all_reduce(model, model.parameters(), None, all_used=False)
    twin = copy.deepcopy(model)
    assert has_grad_all_reduce(model) and not has_grad_all_reduce(twin)
    twin(torch.ones(1, 3)).sum().backward()  # among no ranks, averaging would fail
    assert twin.bias.grad is not None
