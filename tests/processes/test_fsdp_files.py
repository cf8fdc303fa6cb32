"""Files of fully sharded models: whole or in shards, weights and optimizer come back as they were."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from accelerate.utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer
from tests.helpers.releases import FSDP2_ON_CPU

pytestmark = FSDP2_ON_CPU


def sharded(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model[1].bias.requires_grad_(False)
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model: nn.Module) -> dict[str, list[float]]:
    return {name: value.full_tensor().flatten().tolist() for name, value in model.state_dict().items()}  # type: ignore[operator]


def there_and_back(folder: str, kind: str) -> Any:
    plugin = SimpleNamespace(state_dict_type=kind)
    model, optimizer = sharded(0)
    step(model, optimizer)
    save_fsdp_model(plugin, None, model, folder)
    save_fsdp_optimizer(plugin, None, optimizer, model, folder)
    other, fresh = sharded(1)
    load_fsdp_model(plugin, None, other, folder)
    load_fsdp_optimizer(plugin, None, fresh, other, folder)
    same_weights = whole(other) == whole(model)
    step(model, optimizer)
    step(other, fresh)  # equal only with the moments of the optimizer
    return same_weights, whole(other) == whole(model)


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT", "LOCAL_STATE_DICT"])
def test_sharded_models_come_back(run_ranks: Any, tmp_path: Path, kind: str) -> None:
    assert run_ranks(2, there_and_back, str(tmp_path), kind) == [(True, True)] * 2
    names = {path.name for path in tmp_path.iterdir()}
    whole_files = {"pytorch_model_fsdp.bin", "optimizer.bin"}
    assert names == (whole_files if kind.startswith("FULL") else {"pytorch_model_fsdp_0", "optimizer_0"})
