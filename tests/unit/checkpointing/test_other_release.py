"""Checkpoints that release 1.15 of the original wrote are read as they are.

tests/data/checkpoints_of_1.15 was made by running that release in an environment of its own: ten steps of the model
below on one process, saved twice. facts.json is what its objects held afterwards, and the random numbers that came next.
In `sharded`, three steps of another model on two processes with fsdp_version=2; sharded.torch is what torch said of it.
`full` is the same state, that release's FULL_STATE_DICT of two processes.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from accelerate import Accelerator
from accelerate.checkpointing import LoadError
from accelerate.utils import set_seed

DATA = Path(__file__).resolve().parents[2] / "data" / "checkpoints_of_1.15"


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


class Counter:
    seen = torch.tensor(0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.seen = state["seen"]


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_everything_is_taken_over(form: str, tmp_path: Path) -> None:
    facts = json.loads((DATA / "facts.json").read_text())
    shutil.copytree(DATA / form, tmp_path / "checkpoint")
    set_seed(7)
    accelerator = Accelerator(cpu=True)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    loader = torch.utils.data.DataLoader(torch.arange(40) % 10, batch_size=4, shuffle=True)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    accelerator.load_state(tmp_path / "checkpoint")
    following = [torch.rand(1).item(), random.random(), float(np.random.rand())]
    state = optimizer.state_dict()["state"][0]
    assert model.head.weight is model.embedding.weight
    assert {
        "weight": model.embedding.weight.tolist(),
        "mean": model.norm.running_mean.tolist(),
        "moment": state["exp_avg_sq"].tolist(),
        "steps": int(state["step"]),
        "lr": scheduler.get_last_lr()[0],
        "seen": int(counter.seen),
        "next": following,
    } == facts


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l1 = torch.nn.Linear(3, 5)
        self.l2 = torch.nn.Linear(5, 3)
        self.norm = torch.nn.BatchNorm1d(3)


@pytest.mark.parametrize("form", ["sharded", "full"])
def test_fsdp_of_two_processes_is_taken_over_by_one(form: str, tmp_path: Path) -> None:
    shutil.copytree(DATA / form, tmp_path / "checkpoint")
    weights, states = torch.load(DATA / "sharded.torch", weights_only=True)
    accelerator = Accelerator(cpu=True)
    model = Normed()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.load_state(tmp_path / "checkpoint")
    found = model.state_dict()
    assert found.keys() == weights.keys() and all(torch.equal(found[name], value) for name, value in weights.items())
    state = optimizer.state_dict()
    for number, (name, _) in enumerate(model.named_parameters()):
        for key, value in states["state"][name].items():
            assert torch.equal(state["state"][number][key], value)
    assert state["param_groups"][0]["lr"] == states["param_groups"][0]["lr"] == scheduler.get_last_lr()[0]


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    shutil.copytree(DATA / "sharded", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "optimizer_0" / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[content.index(b"/data/0") + 75] ^= 1  # behind what fills the space in front of the first tensor
    path.write_bytes(content)
    accelerator = Accelerator(cpu=True)
    with pytest.raises(LoadError, match="optimizer_0/__1_0.distcp: corrupt"):
        accelerator.load_state(tmp_path / "checkpoint")
