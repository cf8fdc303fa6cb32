"""Parameters that are frozen when their model is prepared, and trained later: their gradients are averaged, too."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from accelerate import Accelerator, ParallelismConfig
from accelerate.settings.handlers import DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import TorchTensorParallelConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.other = nn.Linear(2, 4), nn.Linear(2, 4)
        self.down = nn.Linear(4, 1)
        self.bytes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor, other: bool = False) -> torch.Tensor:
        return self.down((self.other if other else self.up)(x)).sum()


def _inputs(rank: int) -> torch.Tensor:
    return torch.tensor([[1.0, 2.0 + rank]]) ** (rank + 1)


def _gradients(model: nn.Module, ways: Sequence[bool], times: int = 1) -> list[torch.Tensor | None]:
    """What the mean over two ranks is, each of which goes its way."""
    alone = copy.deepcopy(model).requires_grad_(False)
    for name, param in alone.named_parameters():
        param.requires_grad_(name != "bytes")
    for rank, other in enumerate(ways):
        for _ in range(times):
            (alone(_inputs(rank), other) / 2).backward()
    return [param.grad for param in alone.parameters()]


def _same(model: nn.Module, expected: Sequence[torch.Tensor | None]) -> bool:
    found = [param.grad for param in model.parameters()]
    assert [grad is None for grad in found] == [grad is None for grad in expected]
    whole = [getattr(grad, "full_tensor", lambda grad=grad: grad)() for grad in found if grad is not None]
    wanted = [grad for grad in expected if grad is not None]
    return all(torch.allclose(one, other) for one, other in zip(whole, wanted, strict=True))


def _unfrozen(frozen: Sequence[str], unused: bool) -> list[bool]:
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)])
    plain, rank = Net(), accelerator.process_index
    for name in frozen:
        getattr(plain, name).requires_grad_(False)
    model = accelerator.prepare(plain)
    if len(frozen) < 3:
        accelerator.backward(model(_inputs(rank), rank == 1 and unused))
    answers = [all((param.grad is None) == (not param.requires_grad) for param in plain.parameters()) or unused]
    for name in frozen:
        getattr(plain, name).requires_grad_(True)
    ways = (False, unused)
    plain.zero_grad()
    accelerator.backward(model(_inputs(rank), ways[rank]))
    answers.append(_same(plain, _gradients(plain, ways)))
    plain.zero_grad()
    with accelerator.no_sync(model):
        accelerator.backward(model(_inputs(rank), ways[rank]))
    own = plain.down.weight.grad.clone()
    answers.append(not torch.allclose(own, _gradients(plain, ways)[-2]))
    accelerator.backward(model(_inputs(rank), ways[rank]))
    answers.append(_same(plain, _gradients(plain, ways, times=2)))
    if model is not plain:
        with pytest.raises(ValueError, match="unfreeze them before `prepare`"), accelerator.join_uneven_inputs([model]):
            pass
    return answers


def _on_two_ranks() -> list[list[bool]]:
    torch.set_num_threads(1)
    return [
        _unfrozen(frozen, unused)
        for frozen in (["up", "other"], ["down"], ["up", "other", "down"])
        for unused in (False, True)
        # torch's own container waits for parameters that it knows and nobody uses
        if unused or "other" in frozen
    ]


def _cut() -> list[bool]:
    torch.set_num_threads(1)
    handler = TorchTensorParallelConfig(plan={"up": "colwise", "other": "colwise", "down": "rowwise"})
    accelerator = Accelerator(
        cpu=True, parallelism_config=ParallelismConfig(tp_handler=handler, tp_size=2, dp_replicate_size=2)
    )
    plain = Net()
    expected = _gradients(plain, (False, False))
    plain.up.requires_grad_(False)
    model = accelerator.prepare(plain)
    replica = accelerator.process_index // 2
    accelerator.backward(model(_inputs(replica)))
    answers = [plain.up.weight.grad is None]
    plain.zero_grad()
    plain.requires_grad_(False)
    plain.up.requires_grad_(True)
    accelerator.backward(model(_inputs(replica)))
    answers.append(torch.allclose(plain.up.weight.grad.full_tensor(), expected[1]))
    return answers


def test_replicas(run_ranks):
    assert run_ranks(2, _on_two_ranks) == [[[True] * 4] * 5] * 2


def test_tensors_that_are_cut(run_ranks):
    assert run_ranks(4, _cut) == [[True] * 2] * 4
