"""`LossScaler` on the CPU: what a step leaves in it, and what loading, updating and pickling make of that."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.precision.loss_scale import LossScaler
from accelerate.utils import GradScalerKwargs


def run(accumulation: int = 1, fused: bool = False) -> tuple[Accelerator, nn.Module, AcceleratedOptimizer]:
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="fp16",
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[GradScalerKwargs(init_scale=2.0**10)],
    )
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    return (accelerator, *accelerator.prepare(model, optimizer))


def train(accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer, steps: int = 1) -> None:
    for _ in range(steps):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 2)).sum())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_after_a_loaded_state(accumulation, fused, tmp_path):
    accelerator, *prepared = run(accumulation, fused)
    accelerator.save_state(tmp_path)
    train(accelerator, *prepared, steps=2 * accumulation)
    expected = [param.detach().clone() for param in prepared[0].parameters()]
    accelerator.load_state(tmp_path)
    train(accelerator, *prepared, steps=2 * accumulation)
    assert all(map(torch.equal, prepared[0].parameters(), expected))
    assert accelerator.scaler.get_scale() == 2.0**10


def test_a_loaded_state_forgets_gradients_that_were_unscaled(tmp_path):
    accelerator, model, optimizer = run()
    accelerator.save_state(tmp_path)
    accelerator.backward(model(torch.ones(1, 2)).sum() * float("inf"))
    accelerator.unscale_gradients()
    accelerator.load_state(tmp_path)
    optimizer.zero_grad()
    train(accelerator, model, optimizer)
    assert not optimizer.step_was_skipped and accelerator.scaler.get_scale() == 2.0**10


def test_a_step_directly_after_loading(tmp_path):
    """The gradients of a backward before the load have no loss scaled after it."""
    accelerator, model, optimizer = run()
    train(accelerator, model, optimizer)
    accelerator.save_state(tmp_path)
    accelerator.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    accelerator.load_state(tmp_path)
    optimizer.step()
    assert not optimizer.step_was_skipped


def test_updates_of_the_user():
    accelerator, model, optimizer = run()
    for _ in range(2):
        train(accelerator, model, optimizer)
        accelerator.scaler.update()  # as loops written for torch's scaler do
    assert accelerator.scaler.get_scale() == 2.0**10


def test_a_scaler_that_is_switched_off():
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(enabled=False)])
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.weight.detach().clone()
    train(accelerator, model, optimizer)
    assert not torch.equal(before, model.weight) and not optimizer.step_was_skipped


def test_pickled_after_a_step():
    accelerator, model, optimizer = run()
    train(accelerator, model, optimizer)
    scaler = pickle.loads(pickle.dumps(accelerator.scaler))
    assert isinstance(scaler, LossScaler) and scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_gradients_are_clipped_as_they_are_not_as_they_were_scaled(clip):
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=2.0**10)])
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    accelerator.backward(model(torch.ones(1, 1)).sum())
    if clip == "norm":
        assert accelerator.clip_grad_norm_(model.parameters(), 0.5) == 1.0
    else:
        accelerator.clip_grad_value_(model.parameters(), 0.5)
    optimizer.step()
    assert model.weight.item() == pytest.approx(-0.5, rel=1e-5)


def test_a_second_step_on_one_gradient():
    accelerator, model, optimizer = run()
    accelerator.backward(model(torch.ones(1, 2)).sum())
    for _ in range(2):  # torch's own scaler wants an update in between
        optimizer.step()
        assert not optimizer.step_was_skipped
    assert accelerator.scaler.get_scale() == 2.0**10


def test_the_scaler_is_made_as_asked_for():
    options = {"init_scale": 8.0, "growth_factor": 3.0, "backoff_factor": 0.25, "growth_interval": 2}
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(**options)])
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scales = []
    for factor in (1.0, 1.0, float("inf")):
        accelerator.backward(model(torch.ones(1, 1)).sum() * factor)
        optimizer.step()
        optimizer.zero_grad()
        scales.append(accelerator.scaler.get_scale())
    assert scales == [8.0, 24.0, 6.0]


def test_gradients_are_unscaled_once_an_update():
    accelerator, model, optimizer = run()
    for _ in range(2):
        accelerator.backward(model(torch.ones(1, 2)).sum())
        for _ in range(3):
            accelerator.unscale_gradients(optimizer)
            assert model.bias.grad.item() == 1.0
        optimizer.step()
        optimizer.zero_grad()
