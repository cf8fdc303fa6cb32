"""Compiling by region, in place."""

from __future__ import annotations

import torch
from torch import nn

from accelerate.utils import compile_regions_deepspeed, has_compiled_regions


def test_an_engines_module_is_compiled_in_place():
    model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.Linear(2, 2))
    assert compile_regions_deepspeed(model, backend="eager") is None
    blocks, rest = model[0], model[1]
    assert all(block._compiled_call_impl is not None for block in blocks) and rest._compiled_call_impl is None
    whole = nn.Linear(2, 2)
    before = whole(torch.ones(1, 2))
    compile_regions_deepspeed(whole, backend="eager")
    assert has_compiled_regions(whole) and torch.equal(whole(torch.ones(1, 2)), before)
