"""The sizes of a device mesh: where they come from, what follows from them, what cannot be. The mesh itself is in
tests/processes/test_device_mesh.py.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from accelerate import ParallelismConfig
from accelerate.parallelism_config import resolve_parallelism_config
from accelerate.settings.parallel import (
    DeepSpeedSequenceParallelConfig,
    TorchContextParallelConfig,
    TorchTensorParallelConfig,
    TorchTensorParallelPlugin,
)


def test_importing_it_leaves_torch_out():
    code = (
        "import sys, accelerate.parallelism_config as p; p.ParallelismConfig(tp_size=2); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("sizes", "total", "dims", "fsdp", "loss"),
    [
        ({}, 1, [], [], []),
        ({"dp_replicate": 2}, 2, ["dp_replicate"], ["dp_replicate"], ["dp_replicate"]),
        ({"dp_shard": 4}, 4, ["dp_shard"], ["dp_shard_cp"], ["dp_shard"]),
        (
            {"dp_replicate": 2, "dp_shard": 4},
            8,
            ["dp_replicate", "dp_shard"],
            ["dp_replicate", "dp_shard_cp"],
            ["dp_replicate", "dp_shard"],
        ),
        ({"dp_shard": 2, "cp": 3}, 6, ["dp_shard", "cp"], ["dp_shard_cp"], ["dp_shard", "cp"]),
        ({"cp": 2, "tp": 2}, 4, ["cp", "tp"], ["dp_shard_cp"], ["cp"]),
        ({"tp": 8}, 8, ["tp"], [], []),
        ({"dp_shard": 2, "sp": 2}, 4, ["dp_shard", "sp"], ["dp_shard_cp"], ["dp_shard"]),
    ],
)
def test_what_follows_from_the_sizes(sizes, total, dims, fsdp, loss):
    config = ParallelismConfig(**{f"{name}_size": size for name, size in sizes.items()})
    assert config.total_size == total == config.data_parallel_size * config.non_data_parallel_size
    assert config.active_mesh_dims == dims
    assert config.fsdp_dim_names == fsdp and config.dp_cp_dim_names == loss
    assert sorted([*config.dp_dim_names, *config.non_dp_dim_names]) == sorted(dims)
    for name in ("dp_replicate", "dp_shard", "tp", "cp", "sp"):
        assert getattr(config, f"{name}_enabled") is (name in sizes)


def test_an_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "4")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "2")
    assert ParallelismConfig(tp_size=2)._get_mesh() == (("dp_shard", "tp"), (2, 2))
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "two")
    with pytest.raises(ValueError, match="PARALLELISM_CONFIG_TP_SIZE: expected a whole number, found 'two'"):
        ParallelismConfig()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dp_shard_size": -1}, "dp_shard_size: expected at least 1, found -1"),
        ({"tp_size": 1.5}, "tp_size: expected a whole number, found 1.5"),
        ({"sp_backend": "zz"}, "sp_backend: expected one of deepspeed"),
        ({"cp_size": 2, "sp_size": 2}, "cp_size=2 and sp_size=2 would both shard the sequence"),
        (
            {"tp_size": 2, "tp_handler": TorchContextParallelConfig()},
            "expected an instance of TorchTensorParallelConfig",
        ),
    ],
)
def test_what_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        ParallelismConfig(**given)


def test_details_come_with_their_dimension(caplog):
    config = ParallelismConfig(tp_size=2, cp_size=2)
    assert config.tp_handler == TorchTensorParallelConfig() and config.cp_handler == TorchContextParallelConfig()
    assert config.sp_handler is None
    ParallelismConfig(cp_handler=TorchContextParallelConfig())
    assert "cp_handler has no effect: cp_size is 1" in caplog.text


def test_the_sizes_must_multiply_to_the_processes():
    config = ParallelismConfig(dp_shard_size=2, tp_size=3)
    config.check_world_size(6)
    with pytest.raises(ValueError, match=r"dp_shard_size 2 x tp_size 3 = 6 ranks, but 4 processes take part"):
        config.check_world_size(4)
    with pytest.raises(ValueError, match="every size 1 = 1 ranks, but 2 processes"):
        ParallelismConfig().check_world_size(2)


def test_a_mesh_is_asked_for_with_its_device():
    config = ParallelismConfig()
    with pytest.raises(ValueError, match="the device mesh is not built yet"):
        config.get_device_mesh()
    assert config.get_device_mesh("cpu") is None  # one process needs none


def test_json():
    values = ParallelismConfig(dp_shard_size=2, sp_size=2).to_json()
    assert json.loads(json.dumps(values)) == values
    assert values["dp_shard_size"] == 2 and values["sp_handler"]["sp_seq_length_is_variable"] is True
    assert "device_mesh" not in values


def test_the_details_of_a_dimension():
    assert TorchContextParallelConfig("alltoall").cp_comm_strategy == "alltoall"
    with pytest.raises(ValueError, match="cp_comm_strategy: expected one of allgather, alltoall"):
        TorchContextParallelConfig("ring")
    fixed = DeepSpeedSequenceParallelConfig(sp_seq_length=64, sp_seq_length_is_variable=False)
    assert (fixed.sp_seq_length, fixed.sp_seq_length_is_variable) == (64, False)
    with pytest.raises(ValueError, match="set sp_seq_length"):
        DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=False)
    with pytest.raises(ValueError, match="'eager' does not support sequence parallelism"):
        DeepSpeedSequenceParallelConfig(sp_attn_implementation="eager")


def test_a_length_that_nobody_gave_is_a_word(monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SEQ_LENGTH", "None")
    assert DeepSpeedSequenceParallelConfig().sp_seq_length is None


def test_what_has_no_effect_is_said(caplog):
    TorchTensorParallelConfig(enable_async_tp=True)
    assert "enable_async_tp=True has no effect" in caplog.text


@pytest.mark.parametrize("size", [0, True, "2"])
def test_the_older_plugin(size):
    with pytest.raises(ValueError, match="expected a number of ranks"):
        TorchTensorParallelPlugin(tp_size=size)


def test_who_asks_for_a_mesh(monkeypatch):
    assert (
        resolve_parallelism_config() is None and resolve_parallelism_config(None, TorchTensorParallelPlugin()) is None
    )
    assert resolve_parallelism_config(None, TorchTensorParallelPlugin(tp_size=2)).tp_size == 2
    given = ParallelismConfig(tp_size=2)
    assert resolve_parallelism_config(given, TorchTensorParallelPlugin(tp_size=2)) is given
    with pytest.raises(ValueError, match="torch_tp_plugin has tp_size=3, but parallelism_config has tp_size=2"):
        resolve_parallelism_config(given, TorchTensorParallelPlugin(tp_size=3))
    with pytest.raises(TypeError, match="must be an instance of ParallelismConfig"):
        resolve_parallelism_config({"tp_size": 2})
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    assert resolve_parallelism_config().tp_size == 2
