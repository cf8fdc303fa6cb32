"""Training on real gloo ranks: the same weights whatever the number of processes, exact accumulation, hooks, triggers."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator
from accelerate.settings.enums import DDPCommunicationHookType, DistributedType
from accelerate.settings.handlers import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
)

GLOBAL_BATCH = 24


def build(seed: int = 0) -> tuple[nn.Module, TensorDataset]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(GLOBAL_BATCH * 20, 6, generator=generator, dtype=torch.float64)
    targets = inputs.sin().sum(1, keepdim=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    return model, TensorDataset(inputs, targets)


def trained_weights(accumulation: int, optimizer_name: str, split_batches: bool, updates: int = 50) -> torch.Tensor:
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulation,
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches, use_seedable_sampler=True, data_seed=3),
        schedule_per_update=True,
    )
    model, data = build()
    batch_size = GLOBAL_BATCH if split_batches else GLOBAL_BATCH // accelerator.num_processes
    loader = DataLoader(data, batch_size=batch_size, shuffle=True)
    choices = {"sgd": (torch.optim.SGD, {"lr": 0.05}), "adamw": (torch.optim.AdamW, {"lr": 0.01})}
    kind, options = choices[optimizer_name]
    optimizer = kind(model.parameters(), **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=updates)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    done = 0
    while done < updates:
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            done += accelerator.sync_gradients
            if done == updates:
                break
    assert scheduler.last_epoch == updates
    return torch.cat([p.detach().flatten() for p in accelerator.unwrap_model(model).parameters()])


def all_trained_weights() -> dict[tuple[int, str, bool], torch.Tensor]:
    cases = itertools.product((1, 4), ("sgd", "adamw"), (False, True))
    return {case: trained_weights(*case) for case in cases}


@pytest.fixture(scope="module")
def weights_by_ranks(rank_pool):
    return {ranks: rank_pool.run(ranks, all_trained_weights, timeout=180) for ranks in (1, 2, 3)}


def test_weights_do_not_depend_on_the_number_of_ranks(weights_by_ranks):
    (alone,) = weights_by_ranks[1]
    start, _ = build()
    initial = torch.cat([p.detach().flatten() for p in start.parameters()])
    worst = 0.0
    for ranks in (2, 3):
        for rank, case in itertools.product(range(ranks), alone):
            worst = max(worst, (weights_by_ranks[ranks][rank][case] - alone[case]).abs().max().item())
    assert worst < 1e-10
    assert all((weights - initial).abs().max() > 1e-2 for weights in alone.values()), "training moved the weights"
    print(f"largest difference over {len(alone)} cases: {worst:.1e}")


# Exact accumulation ------------------------------------------------------------------------------------------------------


def ragged_gradient(sync_each_batch: bool) -> tuple[torch.Tensor, torch.Tensor]:
    plugin = GradientAccumulationPlugin(num_steps=3, sync_each_batch=sync_each_batch)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model, data = build()
    inputs, targets = data.tensors
    whole = copy.deepcopy(model)
    rank, size = accelerator.process_index, accelerator.num_processes
    # Ragged on every rank, and different on each: sizes 1, 5, 2 | 4, 0, 7 | 3, 3, 1
    sizes = [[1, 5, 2], [4, 0, 7], [3, 3, 1]][:size]
    total = sum(map(sum, sizes))
    nn.functional.mse_loss(whole(inputs[:total]), targets[:total]).backward()
    start = sum(map(sum, sizes[:rank]))
    model = accelerator.prepare(model)
    for count in sizes[rank]:
        with accelerator.accumulate(model):
            part = slice(start, start + count)
            loss = nn.functional.mse_loss(model(inputs[part]), targets[part], reduction="sum")
            accelerator.backward(loss, num_items=torch.tensor(count))
        start += count

    def flat(module: nn.Module) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in module.parameters()])

    return flat(model), flat(whole)


@pytest.mark.parametrize("sync_each_batch", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ragged_micro_batches_give_the_gradient_of_the_one_big_batch(run_ranks, ranks, sync_each_batch):
    for ours, whole in run_ranks(ranks, ragged_gradient, sync_each_batch):
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-13)


# What the interface documents for several ranks ---------------------------------------------------------------------------


def observed_steps(split_batches: bool, accumulation: int, batch_size: int = 0, **plugin: object) -> list[list[object]]:
    """[sync_gradients, weight, last_epoch] at each micro-step; x = 1..8, loss = mean(w x), SGD with lr 1."""
    with_optimizer = plugin.pop("step_scheduler_with_optimizer", True)
    accelerator = Accelerator(
        cpu=True,
        step_scheduler_with_optimizer=with_optimizer,
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, **plugin),
    )
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    size = batch_size or (accelerator.num_processes if split_batches else 1)
    loader = DataLoader(TensorDataset(torch.arange(1.0, 9.0).view(8, 1)), batch_size=size)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    seen = []
    for (x,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        weight = accelerator.unwrap_model(model).weight.item()
        seen.append([accelerator.sync_gradients, round(weight, 4), scheduler.last_epoch])
    return seen


def joined_and_triggered() -> dict[str, object]:
    accelerator = Accelerator(cpu=True)
    seen: dict[str, object] = {"type": accelerator.distributed_type, "repr": repr(accelerator.state)}
    if accelerator.process_index == 1:
        accelerator.set_trigger()
    seen["trigger"] = (accelerator.check_trigger(), accelerator.check_trigger())
    model = nn.Linear(1, 1)
    wrapped = accelerator.prepare(model)
    seen["wrapped"] = type(wrapped).__name__
    seen["inner"] = accelerator.unwrap_model(wrapped) is model
    seen["keys"] = sorted(accelerator.get_state_dict(wrapped))
    seen["own keys"] = sorted(accelerator.get_state_dict(wrapped, unwrap=False))
    frozen = nn.Linear(1, 1).requires_grad_(False)
    seen["frozen"] = accelerator.prepare(frozen) is frozen
    evaluated = nn.Linear(1, 1)
    seen["evaluated"] = accelerator.prepare_model(evaluated, evaluation_mode=True) is evaluated
    # Ranks bring different numbers of batches: without the join, the longer one would hang in its second backward.
    with accelerator.join_uneven_inputs([wrapped], even_batches=False):
        for _ in range(1 + accelerator.process_index):
            accelerator.backward(wrapped(torch.ones(1, 1)).sum())
    # Forwards under no_sync, synchronized by the last backward.
    wrapped.zero_grad()
    with accelerator.no_sync(wrapped):
        loss = wrapped(torch.full((1, 1), float(accelerator.process_index))).sum()
    with accelerator.trigger_sync_in_backward(wrapped):
        accelerator.backward(loss)
    seen["synced"] = model.weight.grad.item()
    wrapped.zero_grad()
    with accelerator.no_sync(wrapped):
        accelerator.backward(wrapped(torch.full((1, 1), float(accelerator.process_index))).sum())
    seen["local"] = model.weight.grad.item()
    seen["skipped"] = accelerator.optimizer_step_was_skipped
    return seen


def test_models_on_two_ranks(run_ranks):
    for rank, seen in enumerate(run_ranks(2, joined_and_triggered)):
        assert seen["type"] is DistributedType.MULTI_CPU
        assert "Backend: gloo" in seen["repr"]
        assert seen["trigger"] == (True, False)
        assert (seen["wrapped"], seen["inner"]) == ("DistributedDataParallel", True)
        assert (seen["keys"], seen["own keys"]) == (["bias", "weight"], ["module.bias", "module.weight"])
        assert seen["frozen"] and seen["evaluated"]
        assert (seen["synced"], seen["local"]) == (0.5, float(rank))


def two_models() -> tuple[float, float]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    second.bias = nn.Parameter(torch.zeros(1), requires_grad=False)
    for model in (first, second):
        nn.init.zeros_(model.weight)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in (first, second)]
    a, b, *optimizers = accelerator.prepare(first, second, *optimizers)
    for _ in range(2):
        with accelerator.accumulate(a, b):
            accelerator.backward((a(torch.full((1, 1), accelerator.process_index + 1.0)) + b(torch.ones(1, 1))).sum())
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return first.weight.item(), second.weight.item()


def test_two_models_accumulate_together(run_ranks):
    assert run_ranks(2, two_models) == [(-1.5, -1.0)] * 2


def with_hook(**options: object) -> torch.Tensor:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**options)])
    torch.manual_seed(0)
    model = nn.Linear(32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for step in range(12):
        generator = torch.Generator().manual_seed(100 * step + accelerator.process_index)
        accelerator.backward(wrapped(torch.randn(4, 32, generator=generator)).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    return model.weight.detach()


HOOK = DDPCommunicationHookType


HOOKS: list[dict[str, Any]] = [
    {"comm_hook": HOOK.FP16},
    {"comm_hook": HOOK.BF16},
    {"comm_hook": HOOK.POWER_SGD, "comm_state_option": {"matrix_approximation_rank": 32, "start_powerSGD_iter": 2}},
    {"comm_hook": HOOK.BATCHED_POWER_SGD, "comm_state_option": {"start_powerSGD_iter": 2}},
    {"comm_hook": HOOK.POWER_SGD, "comm_state_option": {"start_powerSGD_iter": 2}},
    {"comm_hook": HOOK.POWER_SGD, "comm_wrapper": HOOK.FP16, "comm_state_option": {"start_powerSGD_iter": 2}},
    {"comm_hook": HOOK.POWER_SGD, "comm_wrapper": HOOK.BF16, "comm_state_option": {"start_powerSGD_iter": 2}},
]


def with_every_hook() -> list[torch.Tensor]:
    return [with_hook(**options) for options in ({}, *HOOKS)]


def test_communication_hooks_train(run_ranks):
    first, second = run_ranks(2, with_every_hook)
    assert all(map(torch.equal, first, second)), "ranks stay in step"
    plain, *compressed = first
    for options, weights in zip(HOOKS, compressed, strict=True):
        off = (weights - plain).abs().max()
        assert 0 < off < (0.02 if "sgd" in options["comm_hook"].value else 2e-3), options
    for one, other in itertools.combinations(compressed, 2):
        assert not torch.equal(one, other), "each compresses in its own way"
    fp16, bf16 = ((weights - plain).abs().max() for weights in compressed[:2])
    assert 2 * fp16 < bf16, "bf16 has fewer digits"


def ddp_options() -> tuple[object, ...]:
    names = ("find_unused_parameters", "gradient_as_bucket_view", "static_graph")
    handler = DistributedDataParallelKwargs(**dict.fromkeys(names, True), bucket_cap_mb=3)
    wrapped = Accelerator(cpu=True, kwargs_handlers=[handler]).prepare(nn.Linear(1, 1))
    return (*(getattr(wrapped, name) for name in names), wrapped.bucket_bytes_cap)


def test_the_container_is_built_as_asked_for(run_ranks):
    assert run_ranks(2, ddp_options) == [(True, True, True, 3 * 2**20)] * 2


def gradients_while_accumulating(sync_each_batch: bool) -> list[float]:
    plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=sync_each_batch)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = nn.Linear(1, 1, bias=False)
    wrapped = accelerator.prepare(model)
    seen = []
    for _ in range(2):
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(torch.full((1, 1), 2.0 * accelerator.process_index)).sum())
        seen.append(model.weight.grad.item())
    return seen


def test_gradients_are_synchronized_at_each_batch_if_asked_for(run_ranks):
    assert run_ranks(2, gradients_while_accumulating, False) == [[0.0, 1.0], [1.0, 1.0]]
    assert run_ranks(2, gradients_while_accumulating, True) == [[0.5, 1.0]] * 2


def wrong_on_every_rank() -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model.hf_device_map = {"0": "cpu", "1": "disk"}
    assert accelerator.verify_device_map(model)
    accelerator.prepare(model)


def test_a_dispatched_model_is_refused_on_several_ranks(run_ranks):
    with pytest.raises(Exception, match="spread over several devices"):
        run_ranks(2, wrong_on_every_rank)


def compiled_container() -> dict[str, object]:
    from accelerate.settings.handlers import TorchDynamoPlugin

    accelerator = Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="eager"))
    model = nn.Linear(1, 1, bias=False)
    prepared = accelerator.prepare(model)
    x = torch.full((1, 1), float(accelerator.process_index + 1))
    with accelerator.no_sync(prepared):
        accelerator.backward(prepared(x).sum())
    seen: dict[str, object] = {"local": model.weight.grad.item(), "type": type(prepared).__name__}
    keys = sorted(prepared.state_dict())
    unwrapped = accelerator.unwrap_model(prepared)
    seen["kept"] = sorted(prepared.state_dict()) == keys and unwrapped is not prepared
    seen["inner"] = (
        unwrapped._orig_mod is model and accelerator.unwrap_model(prepared, keep_torch_compile=False) is model
    )
    seen["keys"] = sorted(accelerator.get_state_dict(prepared))
    with accelerator.join_uneven_inputs([prepared]):
        for _ in range(1 + accelerator.process_index):
            accelerator.backward(prepared(x).sum())
    return seen


def test_a_compiled_container_is_still_a_container(run_ranks):
    for rank, seen in enumerate(run_ranks(2, compiled_container, timeout=120)):
        assert seen == {"local": rank + 1.0, "type": "OptimizedModule", "kept": True, "inner": True, "keys": ["weight"]}


def ragged_results() -> tuple[list[int], bool]:
    import torch.distributed as dist

    from accelerate.data_loader import gathering

    configuration = DataLoaderConfiguration(even_batches=False)
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    loader = accelerator.prepare(DataLoader(torch.arange(8), batch_size=2))
    seen = [number for batch in loader for number in accelerator.gather_for_metrics(batch).tolist()]
    accelerator.end_training()
    return seen, bool(gathering._groups) or dist.is_initialized()


def test_groups_made_for_a_ragged_end_go_with_the_run(run_ranks):
    results = run_ranks(3, ragged_results, join=False)
    assert results[0] == (list(range(8)), False)
    assert not any(left for _, left in results)
