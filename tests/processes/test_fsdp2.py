"""Fully sharded training on real ranks: the same as one process, whatever is sharded and however; and what it refuses."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from accelerate import Accelerator
from accelerate.checkpointing.errors import SaveError
from accelerate.state import AcceleratorState
from tests.helpers import sharding
from tests.helpers.sharding import STEPS, Block, Tiny, train

plugin = functools.partial(sharding.plugin, 2)


@pytest.fixture(scope="module")
def alone(rank_pool) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What one process comes to."""
    found: tuple[dict[str, torch.Tensor], list[float]] = rank_pool.run(1, train, 2, None)[0]
    assert len(found[1]) == STEPS and max(found[1]) > 0.5  # clipping has something to do
    return found


CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "on one rank": (1, {}, {}),
    "on two": (2, {}, {}),
    "the exact mean": (2, {}, {"items": True}),
    "kept after the forward": (2, {"reshard_after_forward": False}, {}),
    "activations recomputed": (2, {"activation_checkpointing": True}, {}),
    "as one unit": (2, {"auto_wrap_policy": "no_wrap", "transformer_cls_names_to_wrap": None}, {}),
    "compiled": (2, {}, {"compiled": True}),
    "replicas of shards": (4, {}, {"sizes": {"dp_replicate_size": 2, "dp_shard_size": 2}}),
}


@pytest.mark.parametrize("name", CASES)
def test_sharded_training_is_training(name, run_ranks, alone):
    ranks, fields, more = CASES[name]
    results = run_ranks(ranks, train, 2, fields, **more)
    state, norms = results[0]
    assert state.keys() == alone[0].keys()
    for key, value in alone[0].items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
    for _, found in results:
        assert found == pytest.approx(alone[1], abs=1e-10)


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


def _in_bf16() -> tuple[str, str, str]:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", fsdp_plugin=plugin())
    model = Tiny().bfloat16()
    seen: list[torch.dtype] = []
    model.layers[1].register_forward_hook(lambda *found: seen.append(found[2].dtype))
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss = model(torch.arange(8).view(2, 4)).sum()
    accelerator.backward(loss)
    weight = model.layers[1].up.weight
    return str(weight.dtype), str(weight.grad.dtype), str(seen[0])


def test_weights_and_steps_are_float32_under_bf16(run_ranks):
    assert run_ranks(2, _in_bf16) == [("torch.float32", "torch.float32", "torch.bfloat16")] * 2


def _held_back() -> tuple[bool, bool]:
    """Whether gradients differ between the ranks: after a backward under `no_sync`, and after one that synchronises."""
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
    with refuse(SaveError) as caught:
        accelerator.save_state("nowhere")
    said.append(str(caught.value))
    with refuse() as caught, accelerator.join_uneven_inputs([model]):
        pass
    said.append(str(caught.value))
    AcceleratorState._reset_state()
    by_size = {"auto_wrap_policy": "size_based_wrap", "min_num_params": 50, "transformer_cls_names_to_wrap": None}
    with refuse() as caught:
        Accelerator(cpu=True, fsdp_plugin=plugin(**by_size)).prepare(Tiny())
    said.append(str(caught.value))
    AcceleratorState._reset_state()
    with refuse() as caught:
        Accelerator(cpu=True, mixed_precision="fp16", fsdp_plugin=plugin())
    said.append(str(caught.value))
    dist.barrier()
    return said


def test_what_is_refused_says_why(run_ranks):
    wanted = [
        "SGD holds parameters of a model that has not been prepared",
        "AdamW has stepped already",
        "parameter 'embedding.weight' is on the meta device of rank 0",
        "checkpoints of fully sharded training are not part of this version",
        "join_uneven_inputs does not work with fully sharded training",
        "'embedding.weight' is shared with 'head.weight', which is in another unit",
        "mixed_precision='fp16' is not part of fully sharded training",
    ]
    for said in run_ranks(2, _refused):
        for message, expected in zip(said, wanted, strict=True):
            assert expected in message
