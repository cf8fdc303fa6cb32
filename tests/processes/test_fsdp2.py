"""FSDP 2 on real ranks: what a rank holds, what comes from rank 0, and what is refused; see also test_equivalence."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from accelerate import Accelerator
from accelerate.runtime.system.availability import is_torch_version
from accelerate.strategies import fsdp2
from tests.helpers import sharding
from tests.helpers.releases import FSDP2_ON_CPU
from tests.helpers.sharding import Block, Tiny

pytestmark = FSDP2_ON_CPU
plugin = functools.partial(sharding.plugin, 2)


# What a rank holds ---------------------------------------------------------------------------------------------------


def _held() -> tuple[float, float, set[str]]:
    """Of parameters and optimizer states, the part that this rank holds; and the kinds of parameter it steps."""
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin())
    model = nn.Sequential(*[Block(64) for _ in range(4)])
    whole = sum(param.numel() for param in model.parameters())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(torch.rand(2, 64)).sum())
    optimizer.step()
    mine = sum(param.to_local().numel() for param in model.parameters())
    states = sum(
        v.to_local().numel() for s in optimizer.state.values() for k, v in s.items() if k.startswith("exp_avg")
    )
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    return mine / whole, states / (2 * whole), {type(param).__name__ for param in model.parameters()}


def test_a_rank_holds_its_share(run_ranks):
    for share, states, kinds in run_ranks(4, _held):
        assert share == pytest.approx(0.25, abs=0.02) and states == pytest.approx(0.25, abs=0.02)
        assert kinds == {"DTensor"} or kinds == {"Parameter"}


def _whole_after_a_forward(reshard: bool, evaluation: bool) -> list[bool]:
    """Whether this rank still holds a unit's parameters whole: of the first, of the last, and of the model itself."""
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(reshard_after_forward=reshard))
    model = nn.Sequential(Block(4), Block(4), nn.Linear(4, 4))
    model = accelerator.prepare_model(model, evaluation_mode=evaluation)
    model(torch.rand(2, 4))
    return [not isinstance(linear.weight, DTensor) for linear in (model[0].up, model[1].up, model[2])]


@pytest.mark.parametrize(
    ("reshard", "evaluation", "whole"),
    [
        (True, False, [False, False, True]),  # the backward needs the model's own parameters at once
        (True, True, [False, False, not is_torch_version(">=", "2.7.0")]),
        (False, False, [True, True, True]),
    ],
)
def test_what_stays_whole_after_a_forward(reshard, evaluation, whole, run_ranks):
    assert run_ranks(2, _whole_after_a_forward, reshard, evaluation) == [whole] * 2


def _offload_policies(offload: bool) -> set[type]:
    # On the CPU, where an offloaded shard is already, nothing but torch's policy shows that it was asked for.
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(cpu_offload=offload))
    with mock.patch.object(fsdp2, "fully_shard", wraps=fsdp2.fully_shard) as sharded:
        accelerator.prepare(nn.Sequential(Block(4), Block(4)))
    assert sharded.call_count == 3
    return {type(call.kwargs["offload_policy"]) for call in sharded.call_args_list}


def test_every_unit_is_offloaded(run_ranks):
    assert run_ranks(2, _offload_policies, True) == [{CPUOffloadPolicy}] * 2
    assert run_ranks(2, _offload_policies, False) == [{OffloadPolicy}] * 2


def _only_rank_0_has_weights() -> list[float]:
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(cpu_ram_efficient_loading=True))
    with torch.device("cpu" if accelerator.is_main_process else "meta"):
        torch.manual_seed(7)
        model = Tiny()
        model.register_buffer("mask", torch.tensor([True, False]))  # a type that not every backend carries
    model.layers[0].down.weight.data = model.layers[0].down.weight.data.t().contiguous().t()  # nor every layout
    model = accelerator.prepare(model)
    assert model.mask.tolist() == [True, False] and model.head.weight is model.embedding.weight
    tokens = torch.arange(8).view(2, 4)
    return model(tokens).detach().flatten().tolist()


def test_ranks_without_weights_receive_them(run_ranks):
    torch.manual_seed(7)
    expected = Tiny()(torch.arange(8).view(2, 4)).detach().flatten().tolist()
    for found in run_ranks(2, _only_rank_0_has_weights):
        assert found == pytest.approx(expected, abs=1e-6)


def _held_back() -> tuple[bool, bool]:
    """Whether gradients differ between the ranks: after a backward under `no_sync`, and after one that synchronizes."""
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin())
    model = accelerator.prepare(nn.Sequential(Block(4)))
    inputs = torch.full((2, 4), float(accelerator.process_index + 1))
    with accelerator.no_sync(model):
        accelerator.backward(model(inputs).pow(2).sum())
    held = all(param.grad is None for param in model.parameters())
    accelerator.backward(model(inputs).pow(2).sum())
    return held, all(isinstance(param.grad, DTensor) for param in model.parameters())


def test_no_sync_holds_gradients_back(run_ranks):
    assert run_ranks(2, _held_back) == [(True, True)] * 2


# Refusals --------------------------------------------------------------------------------------------------------------


def _refused() -> list[str]:
    said = []

    def refuse(kind: type[Exception] = ValueError) -> Any:
        return pytest.raises(kind)

    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin())
    with refuse() as caught:
        accelerator.prepare(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1))
    said.append(str(caught.value))
    model = nn.Sequential(Block(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(1, 2)).sum().backward()
    optimizer.step()
    with refuse() as caught:
        accelerator.prepare(model, optimizer)
    said.append(str(caught.value))
    assert not isinstance(next(model.parameters()), DTensor)  # nothing has changed
    with refuse() as caught, torch.device("meta" if accelerator.is_main_process else "cpu"):
        accelerator.prepare(Tiny())
    said.append(str(caught.value))
    model = accelerator.prepare(nn.Sequential(Block(2)))
    with refuse() as caught, accelerator.join_uneven_inputs([model]):
        pass
    said.append(str(caught.value))
    model = nn.Sequential(Block(1))
    model.factor = nn.Parameter(torch.tensor(1.0))
    with refuse() as caught:
        accelerator.prepare(model)
    said.append(str(caught.value))
    with refuse() as caught:
        accelerator.prepare(nn.Sequential(Block(1), nn.Linear(1, 1), nn.Linear(1, 1).bfloat16()))
    said.append(str(caught.value))
    dist.barrier()
    return said


def test_what_is_refused_says_why(run_ranks):
    wanted = [
        "SGD holds parameters of a model that has not been prepared",
        "AdamW has stepped already",
        "parameter 'embedding.weight' is on the meta device of rank 0",
        "join_uneven_inputs does not work with fully sharded training",
        "parameter 'factor' is a scalar",
        "reduced in one dtype, but '1.weight' is torch.float32, '2.weight' is torch.bfloat16",
    ]
    for said in run_ranks(2, _refused):
        for message, expected in zip(said, wanted, strict=True):
            assert expected in message
