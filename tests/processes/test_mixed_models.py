"""Models of which ranks hold some parameters whole, or in parts of their own, beside those that are shared out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import TorchTensorParallelConfig
from tests.helpers.releases import FSDP_VERSIONS


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert = nn.Linear(2, 2, bias=False), Expert()
        nn.init.eye_(self.first.weight)

    def forward(self, x: torch.Tensor, routed: bool = True) -> torch.Tensor:
        x = self.first(x)
        return self.expert(x) if routed else x


def _fsdp(version: int) -> Accelerator:
    AcceleratorState._reset_state()
    more = {"use_orig_params": True} if version == 1 else {}
    return Accelerator(
        cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=version, ignored_modules="expert", **more)
    )


def _averaged(version: int) -> list[Any]:
    """Gradients of a part that rank 0 alone uses, and after a backward that failed."""
    accelerator = _fsdp(version)
    model = accelerator.prepare(Routed())
    weight: Any = accelerator.unwrap_model(model).expert.weight
    ones, rank = torch.ones(1, 2), accelerator.process_index
    accelerator.backward(model(ones, routed=rank == 0).sum())
    found = [weight.grad.tolist()]
    weight.grad = None
    out = model(ones)
    out.register_hook(_fail)
    with pytest.raises(ArithmeticError):
        out.sum().backward()
    # What FSDP keeps of a backward that was cut short is its own affair: only the whole part is looked at from here on.
    accelerator.backward(weight.sum() * (rank + 1))
    return [*found, weight.grad.tolist()]


def _fail(_: torch.Tensor) -> None:
    raise ArithmeticError


def _own_experts(version: int) -> tuple[float, float]:
    """The sum of a rank's own expert after a step, and the norm of all gradients."""
    accelerator = _fsdp(version)
    rank, model = accelerator.process_index, Routed()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("experts",))
    own = DTensor.from_local(torch.full((2, 2), float(rank + 1)), mesh, [Shard(0)])
    model.expert.weight = nn.Parameter(own)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.full((1, 2), float(rank + 1))).sum())
    norm = float(accelerator.clip_grad_norm_(model.parameters(), 1e9))
    optimizer.step()
    weight: Any = accelerator.unwrap_model(model).expert.weight
    return float(weight.to_local().detach().sum()), norm


def _fsdp_cases() -> list[Any]:
    return [(_averaged(version), _own_experts(version)) for version in reversed(FSDP_VERSIONS)]


def test_whole_parts_are_averaged_and_parts_of_ones_own_are_not(run_ranks):
    for cases in run_ranks(2, _fsdp_cases):
        for averaged, (own, norm) in cases:
            assert averaged == [[[0.5, 0.5], [0.5, 0.5]], [[1.5, 1.5], [1.5, 1.5]]]
            assert own == 0  # rank 0 had ones, and a gradient of ones; rank 1 had twos, and a gradient of twos
            # The experts' gradients: four ones and four twos; the others' average is 5 everywhere.
            assert norm == pytest.approx((4 * 1 + 4 * 4 + 4 * 5**2) ** 0.5)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(8, 4), nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.norm(self.embedding(tokens))))

    def save_pretrained(self, folder: Any, is_main_process: bool = True, state_dict: Any = None) -> Any:
        return state_dict


def _tensors(folder: Path) -> tuple[Any, ...]:
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": "sequence_parallel",
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": "rowwise",
    }
    AcceleratorState._reset_state()
    handler = TorchTensorParallelConfig(plan=plan)
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(tp_size=2, tp_handler=handler))
    torch.manual_seed(0)
    plain, whole = Normed(), Normed()
    whole.load_state_dict(plain.state_dict())
    model = accelerator.prepare(plain)
    tokens = torch.arange(8).view(2, 4)
    accelerator.backward(model(tokens).pow(2).sum())
    whole(tokens).pow(2).sum().backward()
    accelerator.clip_grad_value_(model.parameters(), 0.1)
    nn.utils.clip_grad_value_(whole.parameters(), 0.1)
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    gap = max(float((mine.grad.full_tensor() - theirs.grad).abs().max()) for mine, theirs in pairs)
    with pytest.raises(ValueError, match="pass state_dict=accelerator.get_state_dict"):
        model.save_pretrained(folder)
    given = {"a": 1}
    handed_on = [model.save_pretrained(folder, True, given), model.save_pretrained(folder, state_dict=given)]
    torch.manual_seed(accelerator.process_index)  # as states of ranks that shared nothing would be
    accelerator.save_state(folder / "checkpoint")
    accelerator.load_state(folder / "checkpoint")
    return gap, handed_on == [given, given], torch.rand(2).tolist()


def test_parts_are_clipped_saved_and_drawn_for_as_one(run_ranks, tmp_path):
    results = run_ranks(2, _tensors, tmp_path)
    assert results[0][2] == results[1][2]
    for gap, handed_on, _ in results:
        assert gap < 1e-6 and handed_on
