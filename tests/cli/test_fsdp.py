"""Fully sharded training as a person starts it."""

from __future__ import annotations

import pytest

from tests.cli.conftest import SAY
from tests.helpers.releases import FSDP2_ON_CPU

SCRIPT = """
import torch
from accelerate import Accelerator

accelerator = Accelerator()
model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
accelerator.backward(model(torch.rand(4, 5)).pow(2).mean())
accelerator.clip_grad_value_(model.parameters(), 0.1)
optimizer.step()
held = sum(param.to_local().numel() for param in model.parameters())
state = accelerator.get_state_dict(model)
say(accelerator.process_index, accelerator.is_fsdp2, held, len(state), accelerator.mixed_precision)
"""


@FSDP2_ON_CPU
@pytest.mark.slow
def test_a_launch_with_flags(accelerate, tmp_path):
    (tmp_path / "train.py").write_text(SAY + SCRIPT)
    flags = ["--cpu", "--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "bf16"]
    flags += [
        "--use_fsdp",
        "--fsdp_version",
        "2",
        "--fsdp_auto_wrap_policy",
        "SIZE_BASED_WRAP",
        "--fsdp_min_num_params",
        "6",
    ]
    done = accelerate("launch", *flags, "train.py")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 True 24 4 bf16", "1 True 12 0 bf16"]


FIRST_VERSION = """
import torch
from accelerate import Accelerator

accelerator = Accelerator()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
inputs, losses = torch.rand(4, 5), []
for step in range(20):
    loss = model(inputs).pow(2).mean()
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
state = accelerator.get_state_dict(model)
held = sum(param.numel() for param in model.parameters())
say(accelerator.process_index, accelerator.is_fsdp2, held, len(state), losses[-1] < losses[0] / 2)
"""


@pytest.mark.slow
def test_the_first_version_is_what_is_started(accelerate, tmp_path):
    (tmp_path / "train.py").write_text(SAY + FIRST_VERSION)
    done = accelerate("launch", "--cpu", "--use_fsdp", "--num_processes", "2", "--main_process_port", "0", "train.py")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 False 23 4 True", "1 False 13 0 True"]  # of 36
