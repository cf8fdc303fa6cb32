"""Local SGD on real ranks, against the same training done by hand on one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from accelerate import Accelerator, local_sgd
from accelerate.local_sgd import LocalSGD
from accelerate.runtime import world
from accelerate.runtime.collective_backend import TorchCollectives
from accelerate.runtime.collectives import gather
from tests.helpers.behaviors import outputs, per_rank

RunRanks = Callable[..., list[Any]]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def batch_of(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return (torch.rand(5, 3, generator=generator).double(), torch.rand(5, 1, generator=generator).double())


def loss_of(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    inputs, targets = batch_of(rank, step)
    return nn.functional.mse_loss(model(inputs), targets)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def trained(steps: int, every: int, *, accumulation: int = 1, enabled: bool = True) -> dict[str, Any]:
    """The guide's loop; `steps` counts micro-steps."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    rank = accelerator.process_index
    model = small_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    alike: list[bool] = []
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=every, enabled=enabled) as local:
        for step in range(steps):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, rank, step))
                optimizer.step()
                optimizer.zero_grad()
                local.step()
            everyone = gather(flat(model)[None])
            alike.append(torch.equal(everyone[rank], everyone[0]))
    everyone = gather(flat(model)[None])
    return {
        "alike": alike,
        "num_steps": local.num_steps,
        "alike at the end": bool((everyone == everyone[0]).all()),
        "weights": flat(model).tolist(),
        "syncs again": model.require_backward_grad_sync,
    }


def by_hand(ranks: int, steps: int, every: int, accumulation: int = 1) -> list[float]:
    """Every rank's training in this process, averaged as documented."""
    models = [small_model() for _ in range(ranks)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in models]

    def average() -> None:
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            mean = torch.stack([p.detach() for p in parameters]).mean(0)
            for parameter in parameters:
                parameter.data.copy_(mean)

    for step in range(steps):
        for rank, model in enumerate(models):
            (loss_of(model, rank, step) / accumulation).backward()
        if (step + 1) % accumulation == 0:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if (step + 1) % every == 0:  # micro-steps, as in the guide's loop
            average()
    average()
    return flat(models[0]).tolist()


def test_observed_steps(run_ranks: RunRanks) -> None:
    ranks = run_ranks(3, trained, 4, 2)
    observed = per_rank(outputs("LocalSGD", P=3)[0], 3)
    ours = [
        {"rank weights equal rank0 after each step": rank["alike"], "num_steps": rank["num_steps"]} for rank in ranks
    ]
    assert ours == observed


@pytest.mark.parametrize(
    ("size", "steps", "every", "accumulation"), [(2, 7, 3, 1), (3, 4, 2, 1), (2, 12, 2, 3), (2, 12, 4, 2)]
)
def test_weights_are_those_of_training_by_hand(
    run_ranks: RunRanks, size: int, steps: int, every: int, accumulation: int
) -> None:
    expected = torch.tensor(by_hand(size, steps, every, accumulation), dtype=torch.float64)
    for rank in run_ranks(size, trained, steps, every, accumulation=accumulation):
        assert (torch.tensor(rank["weights"], dtype=torch.float64) - expected).abs().max() < 1e-12
        assert rank["alike at the end"]
        assert rank["num_steps"] == steps
        assert rank["syncs again"]


def test_disabled_it_is_plain_data_parallel_training(run_ranks: RunRanks) -> None:
    for rank in run_ranks(2, trained, 4, 2, enabled=False):
        assert all(rank["alike"])
        assert rank["num_steps"] == 4


class Counting(TorchCollectives):
    """Counts the collectives and their sizes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.reduced: list[int] = []

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        self.reduced.append(tensor.numel())
        return super().all_reduce(tensor, op)


class Mixed(nn.Module):
    """Two dtypes, a frozen and a transposed parameter, integers, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3, 2))
        self.low = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.zeros(100), requires_grad=False)
        self.turned = nn.Parameter(torch.zeros(2, 5).t())
        self.quantized = nn.Parameter(torch.zeros(9, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("statistics", torch.zeros(7))


def mixed_model() -> None:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    counting = Counting(torch.device("cpu"))
    world.set_current(replace(world.current(), collectives=counting))
    model = Mixed()
    with LocalSGD(accelerator, model, local_sgd_steps=2) as local:
        model.turned.requires_grad_(False)  # frozen on the way: it may have moved before
        for parameter in model.parameters():
            parameter.data += rank * 2
        model.statistics += rank
        local.step()
        assert not counting.reduced
        local.step()
        assert sorted(counting.reduced) == [4, 6 + 10]
        averaged = [model.a, model.low, model.turned]
        assert all(bool((parameter == 1).all()) for parameter in averaged)
        assert model.low.dtype is torch.bfloat16
        assert model.turned.stride() == (1, 5)
        assert all(
            bool((t == rank * k).all()) for t, k in ((model.frozen, 2), (model.quantized, 2), (model.statistics, 1))
        )
    assert len(counting.reduced) == 4  # once more at the end


def test_few_collectives_and_only_what_trains(run_ranks: RunRanks) -> None:
    run_ranks(2, mixed_model)


def test_buffers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_sgd, "_BUFFER_BYTES", 40)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (5, 5, 1, 30, 2)]
    parameters.insert(1, nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    groups = [[p.numel() for p in group] for group in local_sgd._flat_buffers(parameters)]
    assert sorted(map(sum, groups)) == [1, 2, 3, 10, 30]
    assert sorted(sum(groups, [])) == [1, 2, 3, 5, 5, 30]


def raises_inside() -> list[bool]:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(small_model())
    try:
        with LocalSGD(accelerator, model, local_sgd_steps=2) as local:
            assert not model.require_backward_grad_sync
            for parameter in model.parameters():
                parameter.data += accelerator.process_index
            own = flat(model)
            local.step()
            raise KeyError("on this rank only" if accelerator.process_index else "here too")
    except KeyError:
        pass
    return [model.require_backward_grad_sync, torch.equal(flat(model), own), bool(gather(torch.ones(1)).sum() == 2)]


def test_an_exception_inside_waits_for_nobody(run_ranks: RunRanks) -> None:
    assert run_ranks(2, raises_inside) == [[True, True, True]] * 2


def test_what_it_refuses() -> None:
    accelerator = Accelerator(cpu=True)
    model = small_model()
    for steps in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match="local_sgd_steps is a positive number of steps"):
            LocalSGD(accelerator, model, local_sgd_steps=steps)  # type: ignore[arg-type]

    class Sharding(type(accelerator.strategy)):  # type: ignore[misc]
        supports_local_sgd = False

    accelerator.strategy = Sharding.__new__(Sharding)
    with pytest.raises(NotImplementedError, match="needs a whole copy of the model on every process"):
        LocalSGD(accelerator, model, local_sgd_steps=2)
    assert not LocalSGD(accelerator, model, local_sgd_steps=2, enabled=False).enabled


def test_one_process_just_counts() -> None:
    accelerator = Accelerator(cpu=True)
    model = small_model()
    before = flat(model)
    with LocalSGD(accelerator, model, local_sgd_steps=1) as local:
        local.step()
    assert local.num_steps == 1
    assert torch.equal(flat(model), before)


def saved_on_the_way(folder: str, resume: bool) -> tuple[list[bool], list[float]]:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    model = small_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    if resume:
        accelerator.load_state(folder)
    alike: list[bool] = []
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=4) as local:
        for step in range(3 if resume else 0, 9):
            accelerator.backward(loss_of(model, rank, step))
            optimizer.step()
            optimizer.zero_grad()
            local.step()
            if step == 2 and not resume:
                accelerator.save_state(folder)
            everyone = gather(flat(model)[None])
            alike.append(torch.equal(everyone[rank], everyone[0]))
    assert not accelerator._checkpoints.sync_hooks
    return alike, flat(model).tolist()


def test_a_save_averages_and_the_count_begins_anew(run_ranks: RunRanks, tmp_path: Any) -> None:
    whole = run_ranks(2, saved_on_the_way, str(tmp_path / "c"), False)
    resumed = run_ranks(2, saved_on_the_way, str(tmp_path / "c"), True)
    for rank in (0, 1):
        assert whole[rank][0] == [rank == 0 or step in (2, 6) for step in range(9)]
        assert resumed[rank] == (whole[rank][0][3:], whole[rank][1])
