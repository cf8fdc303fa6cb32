"""Wrapping forwards, and unwrapping containers."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import nn

from accelerate.runtime.tensors import forward


class Doubled(forward.ForwardWrapper):
    def __call__(self, *args, **kwargs):
        return 2 * self.__wrapped__(*args, **kwargs)


class Plus(nn.Module):
    def __init__(self, amount):
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(float(amount)))

    def forward(self, x, scale: float = 1.0):
        return scale * x + self.amount


def test_a_wrapped_forward_keeps_its_signature_and_comes_off():
    model = Plus(1)
    forward.wrap_forward(model, Doubled())
    assert model(torch.tensor(1.0)).item() == 4
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale"]
    forward.unwrap_forward(model)
    assert model(torch.tensor(1.0)).item() == 2
    assert "forward" not in vars(model) and "_original_forward" not in vars(model)


def test_wrappers_stack_and_come_off_together():
    model = Plus(1)
    forward.wrap_forward(model, Doubled())
    forward.wrap_forward(model, Doubled())
    assert model(torch.tensor(0.0)).item() == 4
    forward.unwrap_forward(model)
    assert model(torch.tensor(0.0)).item() == 1


def test_a_forward_the_user_set_survives():
    model = Plus(1)
    model.forward = lambda x: x * 10
    forward.wrap_forward(model, Doubled())
    assert model(1) == 20
    forward.unwrap_forward(model)
    assert model(1) == 10


def test_a_copy_calls_its_own_weights():
    model = Plus(1)
    forward.wrap_forward(model, Doubled())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.amount.fill_(5)
    assert model(torch.tensor(0.0)).item() == 2
    assert twin(torch.tensor(0.0)).item() == 10


def test_containers_come_off():
    inner = nn.Linear(2, 2)
    assert forward.extract_model_from_parallel(nn.DataParallel(inner)) is inner
    assert forward.extract_model_from_parallel(inner) is inner
    outer = nn.Sequential(nn.DataParallel(inner))
    assert forward.extract_model_from_parallel(outer, recursive=True)[0] is inner
    compiled = torch.compile(nn.DataParallel(inner))
    assert forward.is_compiled_module(compiled)
    assert forward.extract_model_from_parallel(compiled, keep_torch_compile=False) is inner
    kept = forward.extract_model_from_parallel(compiled)
    assert forward.is_compiled_module(kept) and kept._orig_mod is inner
