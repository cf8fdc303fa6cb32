"""Fully sharded training as a person starts it."""

from __future__ import annotations

import pytest

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
print(accelerator.process_index, accelerator.is_fsdp2, held, len(state), accelerator.mixed_precision)
"""


@pytest.mark.slow
def test_a_launch_with_flags(accelerate, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
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


@pytest.mark.slow
def test_the_first_version_is_refused(accelerate, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    done = accelerate("launch", "--cpu", "--use_fsdp", "--num_processes", "1", "train.py")
    assert done.returncode == 1 and "fsdp_version=1 is not part of this version: use fsdp_version=2" in done.stderr
