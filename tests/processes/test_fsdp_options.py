"""Fields of `FullyShardedDataParallelPlugin` that results do not show: each test fails if its field is ignored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer
from tests.helpers.releases import FSDP2_ON_CPU


class Net(nn.Module):
    """A large layer, a small one and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.head = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.small(self.large(x)))


def prepared(device: str = "cpu", **options: Any) -> tuple[Accelerator, Any]:
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(**options))
    with torch.device(device):
        model = Net()
    return accelerator, accelerator.prepare(model)


def container(options: dict[str, Any]) -> dict[str, Any]:
    _, model = prepared(**options)
    assert isinstance(model, FullyShardedDataParallel)
    names = ("backward_prefetch", "forward_prefetch", "limit_all_gathers", "_use_orig_params", "sharding_strategy")
    return {name: getattr(getattr(model, name), "name", getattr(model, name)) for name in names}


def test_the_container_is_made_as_asked(run_ranks):
    options = {
        "backward_prefetch": "BACKWARD_POST",
        "forward_prefetch": True,
        "limit_all_gathers": False,
        "use_orig_params": True,
        "sharding_strategy": "SHARD_GRAD_OP",
    }
    expected = {name if name != "use_orig_params" else "_use_orig_params": value for name, value in options.items()}
    assert run_ranks(2, container, options) == [expected] * 2


def units(options: dict[str, Any]) -> list[str]:
    _, model = prepared(fsdp_version=2, **options)
    return [name for name, part in model.named_modules() if hasattr(part, "unshard")]


@FSDP2_ON_CPU
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"auto_wrap_policy": "size_based_wrap", "min_num_params": 70}, ["", "large"]),
        ({"auto_wrap_policy": "size_based_wrap", "min_num_params": 10}, ["", "large", "small"]),
        (
            {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["Linear"]},
            ["", "large", "small", "head"],
        ),
    ],
)
def test_units_are_those_that_are_asked_for(options, expected, run_ranks):
    assert run_ranks(2, units, options) == [expected] * 2


def whole(version: int) -> list[str]:
    from torch.distributed.tensor import DTensor

    accelerator, model = prepared(fsdp_version=version, ignored_modules="head", use_orig_params=None)
    shapes = {name: (type(p), tuple(p.shape)) for name, p in accelerator.unwrap_model(model).named_parameters()}
    return [name for name, (kind, shape) in shapes.items() if kind is not DTensor and shape == (1, 2)]


@FSDP2_ON_CPU
def test_modules_that_are_ignored_stay_whole(run_ranks):
    assert run_ranks(2, whole, 2) == [["head.weight"]] * 2


def initialized() -> float:
    def fill(module: nn.Module) -> None:
        module.to_empty(device="cpu", recurse=False)
        with torch.no_grad():
            for parameter in module.parameters(recurse=False):
                parameter.fill_(3)

    accelerator, model = prepared("meta", param_init_fn=fill)
    return float(sum(value.sum() for value in accelerator.get_state_dict(model).values()))


def test_a_model_without_values_is_initialized_by_the_users_function(run_ranks):
    count = sum(parameter.numel() for parameter in Net().parameters())
    assert run_ranks(2, initialized)[0] == 3 * count


def efficient() -> str | None:
    prepared(cpu_ram_efficient_loading=True)
    return os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")


def test_pretrained_weights_are_read_by_one_rank_if_asked(run_ranks):
    assert run_ranks(2, efficient) == ["true"] * 2


def saved(folder: Path, kind: str) -> None:
    accelerator, _ = prepared(fsdp_version=2, state_dict_type=kind)
    accelerator.save_state(folder)


@FSDP2_ON_CPU
@pytest.mark.parametrize(("kind", "file"), [("FULL_STATE_DICT", True), ("SHARDED_STATE_DICT", False)])
def test_checkpoints_are_whole_or_in_shards(kind, file, run_ranks, tmp_path):
    run_ranks(2, saved, tmp_path / "saved", kind)
    models = [path for path in (tmp_path / "saved").iterdir() if path.name.startswith(("model", "pytorch_model"))]
    assert [path.is_file() for path in models] == [file]


def numbered(folder: Path) -> list[Any]:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    accelerator, model = Accelerator(cpu=True, fsdp_plugin=plugin), Net()
    for parameter in (*model.large.parameters(), *model.small.parameters()):
        parameter.requires_grad_(False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9))
    accelerator.backward(model(torch.ones(1, 8)).sum())
    optimizer.step()
    bare = accelerator.unwrap_model(model)
    save_fsdp_model(plugin, accelerator, bare, folder, model_index=1, adapter_only=True)
    save_fsdp_optimizer(plugin, accelerator, optimizer.optimizer, bare, folder, optimizer_index=1)
    accelerator.wait_for_everyone()
    files = sorted(path.name for path in folder.iterdir())
    load_fsdp_optimizer(plugin, accelerator, optimizer.optimizer, bare, folder, optimizer_index=1)
    missing = load_fsdp_model(plugin, accelerator, bare, folder, model_index=1, adapter_only=True).missing_keys
    return [files, sorted(missing)]


@FSDP2_ON_CPU
def test_models_and_optimizers_are_numbered_and_adapters_saved_alone(run_ranks, tmp_path):
    files, missing = run_ranks(2, numbered, tmp_path)[0]
    assert len(files) == 2 and all("_1" in name for name in files), files
    assert missing == ["large.bias", "large.weight", "small.bias", "small.weight"]
