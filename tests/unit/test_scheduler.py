"""A scheduler keeps time with its optimizer: per batch, per update, to the end of its schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accelerate import Accelerator, PartialState
from accelerate.settings.handlers import DataLoaderConfiguration, GradientAccumulationPlugin


def stepped(updates: int, schedule: str = "LambdaLR", **options: object) -> int:
    """How far a schedule is after some updates, in a run of three processes."""
    PartialState(cpu=True).num_processes = 3
    accelerator = Accelerator(cpu=True, **options)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    arguments = {"lr_lambda": lambda _: 1.0} if schedule == "LambdaLR" else {"max_lr": 1.0, "total_steps": 10}
    made = getattr(torch.optim.lr_scheduler, schedule)(optimizer, **arguments)
    optimizer, scheduler = accelerator.prepare(optimizer, made)
    for _ in range(updates):
        optimizer.step()
        scheduler.step()
    return made.last_epoch


def test_an_update_counts_as_many_steps_as_there_are_processes():
    assert stepped(2) == 6
    assert stepped(2, dataloader_config=DataLoaderConfiguration(split_batches=True)) == 2
    assert stepped(2, schedule_per_update=True) == 2
    assert stepped(2, step_scheduler_with_optimizer=False) == 2


def test_one_cycle_ends_at_its_last_step():
    assert stepped(5, "OneCycleLR") == 10


def test_without_its_optimizer_a_schedule_counts_every_batch():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, step_scheduler_with_optimizer=False)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    made = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer, scheduler = accelerator.prepare(optimizer, made)
    optimizer.step()  # else torch warns of a schedule that begins before its optimizer
    for _ in range(4):
        with accelerator.accumulate():
            optimizer.step()
            scheduler.step()
    assert made.last_epoch == 4


@pytest.mark.parametrize(("adjust", "calls"), [(True, 5), (False, 3)])
def test_steps_that_only_accumulate_count_as_calls_if_asked_for(adjust, calls):
    plugin = GradientAccumulationPlugin(num_steps=2, adjust_scheduler=adjust)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    made = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer, scheduler = accelerator.prepare(optimizer, made)
    for _ in range(4):
        with accelerator.accumulate():
            optimizer.step()
            scheduler.step()
    assert (made.last_epoch, made._step_count) == (2, calls)  # making it was a call as well
