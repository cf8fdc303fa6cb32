"""Parameters that leave for the meta device and come back, and initialization that keeps ties."""

from __future__ import annotations

import torch
from torch import nn

from accelerate.runtime.collective_backend import Collectives
from accelerate.strategies.parallel import materialize
from accelerate.utils import ensure_weights_retied, fsdp2_canonicalize_names

CPU = torch.device("cpu")


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.bfloat16), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[1].weight
    model.register_buffer("mask", torch.tensor([True, False]), persistent=False)
    return model


def test_lifted_and_lowered_a_model_is_what_it_was(monkeypatch):
    monkeypatch.setattr(materialize, "BLOCK_BYTES", 4)  # many blocks
    model = tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    originals = materialize.move_to_meta(model, {model[0].weight})
    assert all(param.is_meta for param in model.parameters()) and model[2].weight is model[1].weight
    assert list(originals) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    materialize.materialize_and_broadcast(model, originals, Collectives(CPU, 0, 1), CPU, offload=False)
    assert model[2].weight is model[1].weight and model.mask.tolist() == [True, False] and not originals
    assert model[0].weight.dtype is torch.float32 and model[0].bias.dtype is torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name].to(value.dtype))


def test_initialization_keeps_ties_and_objects():
    with torch.device("meta"):
        model = tied()
    there = model[1].weight

    def fill(module: nn.Module) -> None:
        module.to_empty(device="cpu", recurse=False)
        for param in module.parameters(recurse=False):
            nn.init.ones_(param)

    materialize.initialize_meta_modules(model, fill, CPU)
    assert model[1].weight is there and model[2].weight is there and there.sum() == 9


def test_retied_one_module_after_the_other():
    with torch.device("meta"):
        model = tied()
    initialize_meta_modules = ensure_weights_retied(
        lambda module: module.to_empty(device="cpu", recurse=False), model, CPU
    )
    for module in model:
        initialize_meta_modules(module)
    assert model[2].weight is model[1].weight and not model[2].weight.is_meta


def test_names_of_the_plain_model():
    wrapped = {"_orig_mod.layers.0._checkpoint_wrapped_module.up": 1, "_fsdp_wrapped_module.head": 2}
    assert fsdp2_canonicalize_names(wrapped) == {"layers.0.up": 1, "head": 2}
