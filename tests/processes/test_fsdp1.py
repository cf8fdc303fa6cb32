"""FSDP 1 on real ranks: what a rank holds, what comes from rank 0, and what is refused; see also test_equivalence."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import BackwardPrefetch, FullyShardedDataParallel, ShardingStrategy

from accelerate import Accelerator, ParallelismConfig
from accelerate.runtime import world
from accelerate.state import AcceleratorState
from accelerate.strategies.fsdp1 import _mesh
from tests.helpers import sharding
from tests.helpers.llama import groups
from tests.helpers.sharding import Block, Tiny

# The version and what the launcher asks for by default.
plugin = functools.partial(sharding.plugin, 1, use_orig_params=True)


# Flat parameters -----------------------------------------------------------------------------------------------------


def _flat(strategy: str | None) -> tuple[dict[str, torch.Tensor], list[float], list[int]]:
    """Ten steps of a model whose units are one parameter each, and one of which is frozen; one group for each unit."""
    fields = {"sharding_strategy": strategy, "use_orig_params": False}
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(**fields) if strategy else None)
    torch.manual_seed(accelerator.process_index * bool(strategy))
    model = nn.Sequential(*[Block(5) for _ in range(3)]).double()
    model[1].requires_grad_(False)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    norms = []
    for step in range(10):
        inputs = torch.rand(4, 5, dtype=torch.double, generator=torch.Generator().manual_seed(step))
        mine = inputs[accelerator.process_index :: accelerator.num_processes]
        accelerator.backward(model(mine).pow(2).mean())
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    state = accelerator.get_state_dict(model)
    return state, norms, [len(group["params"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
def test_an_optimizer_follows_to_flat_parameters(strategy, run_ranks):
    expected, norms, _ = run_ranks(1, _flat, None)[0]
    results = run_ranks(2, _flat, strategy)
    for key, value in expected.items():
        torch.testing.assert_close(results[0][0][key], value, rtol=0, atol=1e-10)
    for _, found, sizes in results:
        assert found == pytest.approx(norms, abs=1e-10) and sizes == [1, 1]


# What a rank holds ---------------------------------------------------------------------------------------------------


def _held(use_orig_params: bool) -> tuple[float, float, float]:
    """Of the model's bytes, those that this rank holds in parameters, in gradients and in each moment of the optimizer."""
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(use_orig_params=use_orig_params))
    model = nn.Sequential(*[Block(64) for _ in range(4)])
    whole = sum(param.nbytes for param in model.parameters())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(torch.rand(2, 64)).sum())
    gradients = sum(param.grad.nbytes for param in model.parameters() if param.grad is not None)
    optimizer.step()
    storages = {param.untyped_storage().data_ptr(): param.untyped_storage().nbytes() for param in model.parameters()}
    moments = sum(v.nbytes for state in optimizer.state.values() for k, v in state.items() if k.startswith("exp_avg"))
    return sum(storages.values()) / whole, gradients / whole, moments / (2 * whole)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_a_rank_holds_its_share(use_orig_params, run_ranks):
    for found in run_ranks(4, _held, use_orig_params):
        assert max(found) <= 0.27 and min(found) > 0.2


def _held_around_a_forward(strategy: str, sizes: dict[str, int]) -> tuple[float, float]:
    """The part of the model's parameters that this rank holds before a forward, and between it and its backward."""
    accelerator = Accelerator(
        cpu=True,
        fsdp_plugin=plugin(sharding_strategy=strategy),
        parallelism_config=ParallelismConfig(**sizes) if sizes else None,
    )
    model = nn.Sequential(*[Block(64) for _ in range(2)])
    whole = sum(param.nbytes for param in model.parameters())
    model = accelerator.prepare(model)

    def held() -> float:
        storages = [param.untyped_storage() for param in model.parameters()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) / whole

    before = held()
    model(torch.rand(2, 64))
    return before, held()


@pytest.mark.parametrize(
    ("strategy", "ranks", "shares"),
    [
        ("FULL_SHARD", 2, (0.5, 0.5)),
        ("SHARD_GRAD_OP", 2, (0.5, 1)),
        ("NO_SHARD", 2, (1, 1)),
        ("HYBRID_SHARD", 4, (0.5, 0.5)),
        ("HYBRID_SHARD_ZERO2", 4, (0.5, 1)),
    ],
)
def test_what_a_rank_holds_around_a_forward(strategy, ranks, shares, run_ranks):
    sizes = {"dp_replicate_size": 2, "dp_shard_size": 2} if ranks == 4 else {}
    for found in run_ranks(ranks, _held_around_a_forward, strategy, sizes):
        assert found == pytest.approx(shares, abs=0.03)


def _left_whole(ignored: str | None) -> list[bool]:
    """Whether this rank holds all of each of two layers."""
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(auto_wrap_policy="no_wrap", ignored_modules=ignored))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    layers = list(model)
    accelerator.prepare(model)
    return [layer.weight.numel() == 64 for layer in layers]


def test_parts_left_whole(run_ranks):
    assert run_ranks(2, _left_whole, "0") == [[True, False]] * 2
    # As one unit, the model is cut in the middle: each rank holds one layer.
    assert run_ranks(2, _left_whole, None) == [[True, False], [False, True]]


def _on_two_machines() -> tuple[tuple[int, ...], list[int]]:
    """The mesh of a hybrid strategy, as if ranks 0 and 1 were on one machine, and 2 and 3 on another."""
    Accelerator(cpu=True)
    here = dataclasses.replace(world.current(), local_size=2, local_rank=world.current().rank % 2)
    mesh = _mesh(None, here, ShardingStrategy.HYBRID_SHARD)
    return tuple(mesh.shape), list(mesh.get_coordinate() or ())


def test_a_hybrid_strategy_shards_within_each_machine(run_ranks):
    assert run_ranks(4, _on_two_machines) == [((2, 2), [rank // 2, rank % 2]) for rank in range(4)]


def _containers(**fields: object) -> set[tuple[object, ...]]:
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(**fields))
    model = accelerator.prepare(nn.Sequential(Block(4), Block(4)))
    return {
        (unit.backward_prefetch, unit.forward_prefetch, unit.limit_all_gathers)
        for unit in FullyShardedDataParallel.fsdp_modules(model)
    }


def test_when_units_are_gathered(run_ranks):
    fields = {"backward_prefetch": "BACKWARD_POST", "forward_prefetch": True, "limit_all_gathers": False}
    assert run_ranks(2, _containers, **fields) == [{(BackwardPrefetch.BACKWARD_POST, True, False)}] * 2
    assert run_ranks(2, _containers) == [{(None, False, True)}] * 2


def _only_rank_0_has_weights() -> tuple[list[float], bool]:
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(cpu_ram_efficient_loading=True))
    with torch.device("cpu" if accelerator.is_main_process else "meta"):
        torch.manual_seed(7)
        model = Tiny()
        model.register_buffer("mask", torch.tensor([True, False]))  # a type that not every backend carries
    model = accelerator.prepare(model)
    inner = accelerator.unwrap_model(model)
    assert inner.mask.tolist() == [True, False] and inner.head.weight is inner.embedding.weight
    return model(torch.arange(8).view(2, 4)).detach().flatten().tolist(), type(inner) is Tiny


def test_ranks_without_weights_receive_them(run_ranks):
    torch.manual_seed(7)
    expected = Tiny()(torch.arange(8).view(2, 4)).detach().flatten().tolist()
    for found, unwrapped in run_ranks(2, _only_rank_0_has_weights):
        assert found == pytest.approx(expected, abs=1e-6) and unwrapped


# Several models, whole parts, held back ---------------------------------------------------------------------------------


def _several() -> tuple[bool, list[float], bool]:
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(ignored_modules="0"))
    torch.manual_seed(3)
    first, second, fixed = nn.Sequential(Block(4), Block(4)), nn.Sequential(Block(4), Block(4)), nn.Sequential(Block(4))
    plain = copy.deepcopy((first, second))
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()])
    first, second, optimizer = accelerator.prepare(first, second, optimizer)
    fixed = accelerator.prepare_model(fixed.requires_grad_(False), evaluation_mode=True)
    inputs = torch.rand(2, 4)
    with accelerator.no_sync(first), accelerator.no_sync(second):
        loss = second(first(inputs)).pow(2).sum() + fixed(inputs).sum()
        with accelerator.trigger_sync_in_backward(first), accelerator.trigger_sync_in_backward(second):
            accelerator.backward(loss)
    params = [*first.parameters(), *second.parameters()]
    norms = [float(accelerator.clip_grad_norm_(params, 1e9, kind)) for kind in (2, float("inf"), 1)]
    plain[1](plain[0](inputs)).pow(2).sum().backward()
    expected = [
        float(nn.utils.clip_grad_norm_([*plain[0].parameters(), *plain[1].parameters()], 1e9, kind))
        for kind in (2, float("inf"), 1)
    ]
    optimizer.step()
    inner = accelerator.unwrap_model(first)
    return norms == pytest.approx(expected, rel=1e-5), norms, type(inner) is nn.Sequential


def test_several_models_and_whole_parts(run_ranks):
    for same, norms, unwrapped in run_ranks(2, _several):
        assert same and unwrapped, norms


# Refusals --------------------------------------------------------------------------------------------------------------


def _refused() -> list[str]:
    said: list[str] = []

    @contextlib.contextmanager
    def refused(kind: type[Exception] = ValueError) -> Iterator[None]:
        with pytest.raises(kind) as caught:
            yield
        said.append(str(caught.value))

    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin())
    with refused():
        accelerator.prepare(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1))
    model = nn.Sequential(Block(2))
    with refused():
        model[0].norm.double()
        accelerator.prepare(model)
    assert not isinstance(model[0], FullyShardedDataParallel)  # nothing has changed
    with refused(), torch.device("meta" if accelerator.is_main_process else "cpu"):
        accelerator.prepare(Tiny())
    model = accelerator.prepare(nn.Sequential(Block(2)))
    with refused(), accelerator.join_uneven_inputs([model]):
        pass
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin(use_orig_params=False))
    with refused():
        accelerator.prepare(Tiny())
    model = nn.Sequential(Block(2))
    with refused():
        accelerator.prepare(model, torch.optim.AdamW(groups(model)))
    AcceleratorState._reset_state()
    replicas = ParallelismConfig(dp_replicate_size=2)
    with refused():
        Accelerator(cpu=True, fsdp_plugin=plugin(sharding_strategy="HYBRID_SHARD"), parallelism_config=replicas)
    AcceleratorState._reset_state()
    with refused():
        Accelerator(cpu=True, fsdp_plugin=plugin(), parallelism_config=replicas)
    alone = dataclasses.replace(world.current(), local_size=1)  # as if each rank were on a machine of its own
    with refused():
        _mesh(None, alone, ShardingStrategy.HYBRID_SHARD)
    dist.barrier()
    return said


def test_what_is_refused_says_why(run_ranks):
    wanted = [
        "SGD holds parameters of a model that has not been prepared",
        "a unit of FSDP 1 needs parameters of one dtype, but",
        "parameter 'embedding.weight' is on the meta device of rank 0",
        "join_uneven_inputs does not work with fully sharded training",
        "is trained and 'layers.0.up.weight' is frozen, and both are in one unit: set use_orig_params=True",
        "are in one unit, but not in one parameter group of AdamW: set use_orig_params=True",
        "sharding_strategy HYBRID_SHARD needs dp_replicate_size and dp_shard_size above 1",
        "sharding_strategy FULL_SHARD goes with dp_shard_size alone",
        "sharding_strategy HYBRID_SHARD with one process a machine has nothing to shard",
    ]
    for said in run_ranks(2, _refused):
        for message, expected in zip(said, wanted, strict=True):
            assert expected in message
