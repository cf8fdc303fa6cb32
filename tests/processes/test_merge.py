"""Weights that two ranks saved in shards, merged: bit for bit those of the model, in either format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from accelerate.checkpointing.merge import merge_fsdp_weights


class Net(nn.Module):
    """Odd sizes, a scalar parameter, a buffer, two number formats, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 33), nn.Linear(33, 7)])
        self.small = nn.Linear(7, 3, bias=False, dtype=torch.bfloat16)
        self.head = nn.Linear(7, 33, bias=False)
        self.head.weight = self.layers[0].weight
        self.gain = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("count", torch.tensor(3))


def model() -> Net:
    torch.manual_seed(0)
    return Net()


def save_shards(folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = model()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(sharded.small, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    dcp.save({"model": sharded.state_dict()}, checkpoint_id=folder)


def merge(*arguments: Any, **options: Any) -> None:
    merge_fsdp_weights(*arguments, **options)


def same(found: dict[str, torch.Tensor]) -> bool:
    wanted = model().state_dict()
    return found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


def test_merged_weights_are_the_models(run_ranks: Any, tmp_path: Path) -> None:
    shards = tmp_path / "pytorch_model_fsdp_0"
    run_ranks(2, save_shards, str(shards))
    assert {path.name for path in shards.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    merge_fsdp_weights(str(shards), str(tmp_path / "safe"))
    merge_fsdp_weights(str(shards), str(tmp_path / "bin"), safe_serialization=False)
    assert same(load_file(tmp_path / "safe" / "model.safetensors"))
    assert same(torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True))


def test_every_rank_may_ask_for_it(run_ranks: Any, tmp_path: Path) -> None:
    shards = tmp_path / "pytorch_model_fsdp_0"
    run_ranks(2, save_shards, str(shards))
    run_ranks(2, merge, str(shards), str(tmp_path / "out"), remove_checkpoint_dir=True)
    assert same(load_file(tmp_path / "out" / "model.safetensors")) and not shards.exists()
    failures = run_ranks(2, merge, str(shards), str(tmp_path / "out"), raises=True)
    assert [failure.kind for failure in failures] == ["SaveError", "SaveError"]
    assert all("no such folder" in failure.text for failure in failures)
