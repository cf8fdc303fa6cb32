"""The device mesh on real ranks: who is whose neighbor, and the dimensions that are one for some purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.state import AcceleratorState


def _groups(**sizes: int) -> dict[str, list[int]]:
    """For each dimension of the mesh, common names included, the ranks of this rank's group."""
    PartialState(cpu=True)
    config = ParallelismConfig(**sizes)
    mesh = config.get_device_mesh("cpu")
    assert mesh is config.get_device_mesh() and mesh.mesh_dim_names == tuple(config.active_mesh_dims)
    names = list(config.active_mesh_dims)
    names += [
        common
        for common, parts in (
            ("dp", config.dp_dim_names),
            ("dp_shard_cp", config.dp_shard_cp_dim_names),
            ("dp_cp", config.dp_cp_dim_names),
        )
        if parts
    ]
    return {name: dist.get_process_group_ranks(mesh[name].get_group()) for name in names}


def test_neighbors_share_tensors_then_sequences_then_shards(run_ranks):
    found = run_ranks(4, _groups, dp_shard_size=2, tp_size=2)
    assert found[0] == {"dp_shard": [0, 2], "tp": [0, 1], "dp": [0, 2], "dp_shard_cp": [0, 2], "dp_cp": [0, 2]}
    assert found[3] == {"dp_shard": [1, 3], "tp": [2, 3], "dp": [1, 3], "dp_shard_cp": [1, 3], "dp_cp": [1, 3]}
    found = run_ranks(4, _groups, dp_replicate_size=2, cp_size=2)
    everyone = [0, 1, 2, 3]
    assert found[1] == {
        "dp_replicate": [1, 3],
        "cp": [0, 1],
        "dp": [1, 3],
        "dp_shard_cp": [0, 1],
        "dp_cp": everyone,
    }


def test_replicas_of_shards(run_ranks):
    for rank, found in enumerate(run_ranks(4, _groups, dp_replicate_size=2, dp_shard_size=2)):
        assert found["dp"] == [0, 1, 2, 3] and found["dp_shard_cp"] == found["dp_shard"]
        assert found["dp_shard"] == ([0, 1] if rank < 2 else [2, 3])


def _wrong_size() -> str:
    with pytest.raises(ValueError, match="but 2 processes take part") as caught:
        AcceleratorState(cpu=True, parallelism_config=ParallelismConfig(dp_shard_size=2, tp_size=2))
    return str(caught.value)


def test_the_arithmetic_is_shown(run_ranks):
    assert "dp_shard_size 2 x tp_size 2 = 4 ranks" in run_ranks(2, _wrong_size)[0]


def _as_data_parallelism() -> tuple[Any, ...]:
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(dp_replicate_size=2))
    names, rank = accelerator.torch_device_mesh.mesh_dim_names, accelerator.data_parallel_rank
    AcceleratorState._reset_state()
    with pytest.raises(ValueError, match="dp_shard_size=2: shards are what fully sharded"):
        Accelerator(cpu=True, parallelism_config=ParallelismConfig(dp_shard_size=2))
    return names, rank, type(accelerator.strategy).__name__


def test_replicas_alone_are_data_parallelism(run_ranks):
    assert run_ranks(2, _as_data_parallelism) == [(("dp_replicate",), rank, "DDPStrategy") for rank in (0, 1)]
