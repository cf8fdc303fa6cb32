"""The plugin of fully sharded training: what each field becomes, in both versions."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import disable_fsdp_ram_efficient_loading, enable_fsdp_ram_efficient_loading


class Layer(nn.Linear):
    pass


class Model(nn.Module):
    def __init__(self, no_split: list[str] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(2, 2), Layer(2, 2)])
        if no_split is not None:
            self._no_split_modules = no_split


def test_importing_it_leaves_torch_out():
    code = (
        "import sys, accelerate.settings.plugins.fsdp, accelerate.settings.resolve_args; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_version_1():
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 1
    assert plugin.sharding_strategy is plugin.reshard_after_forward is fsdp.ShardingStrategy.FULL_SHARD
    assert plugin.cpu_offload == fsdp.CPUOffload(False) and plugin.state_dict_type is fsdp.StateDictType.FULL_STATE_DICT
    assert plugin.state_dict_config == fsdp.FullStateDictConfig(offload_to_cpu=True, rank0_only=True)
    assert plugin.optim_state_dict_config == fsdp.FullOptimStateDictConfig(offload_to_cpu=True, rank0_only=True)
    off = ("use_orig_params", "sync_module_states", "forward_prefetch", "cpu_ram_efficient_loading")
    assert not any(getattr(plugin, name) for name in off)
    assert plugin.backward_prefetch is None and plugin.auto_wrap_policy is None


@pytest.mark.parametrize(
    ("given", "strategy"),
    [
        ({"sharding_strategy": "shard_grad_op"}, "SHARD_GRAD_OP"),
        ({"sharding_strategy": "HYBRID_SHARD_ZERO2"}, "_HYBRID_SHARD_ZERO2"),
        ({"sharding_strategy": 3}, "NO_SHARD"),
        ({"sharding_strategy": fsdp.ShardingStrategy.HYBRID_SHARD}, "HYBRID_SHARD"),
        ({"reshard_after_forward": "SHARD_GRAD_OP"}, "SHARD_GRAD_OP"),
        ({"reshard_after_forward": False}, "SHARD_GRAD_OP"),
        ({"sharding_strategy": "SHARD_GRAD_OP", "reshard_after_forward": True}, "SHARD_GRAD_OP"),
    ],
)
def test_the_strategy_of_version_1(given, strategy):
    plugin = FullyShardedDataParallelPlugin(**given)
    assert plugin.sharding_strategy is plugin.reshard_after_forward is fsdp.ShardingStrategy[strategy]


def test_two_strategies_contradict_each_other():
    with pytest.raises(ValueError, match="sharding_strategy='NO_SHARD' and reshard_after_forward=False contradict"):
        FullyShardedDataParallelPlugin(sharding_strategy="NO_SHARD", reshard_after_forward=False)


def test_an_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("FSDP_SHARDING_STRATEGY", "NO_SHARD")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP")
    monkeypatch.setenv("FSDP_MIN_NUM_PARAMS", "5")
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.sharding_strategy is fsdp.ShardingStrategy.NO_SHARD and plugin.cpu_offload.offload_params
    assert plugin.auto_wrap_policy is size_based_auto_wrap_policy and plugin.min_num_params == 5
    plugin = FullyShardedDataParallelPlugin(
        sharding_strategy="FULL_SHARD", cpu_offload=False, auto_wrap_policy="no_wrap", min_num_params=7
    )
    assert plugin.sharding_strategy is fsdp.ShardingStrategy.FULL_SHARD and not plugin.cpu_offload.offload_params
    assert plugin.auto_wrap_policy is None and plugin.min_num_params == 7


def test_a_file_of_version_1_may_name_the_strategy_in_the_other_key(monkeypatch):
    """As trl's configuration does; the launcher adds the default of the other."""
    monkeypatch.setenv("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "SHARD_GRAD_OP")
    assert FullyShardedDataParallelPlugin().sharding_strategy is fsdp.ShardingStrategy.SHARD_GRAD_OP


@pytest.mark.parametrize("name", ["sharding_strategy", "backward_prefetch", "forward_prefetch", "sync_module_states"])
def test_what_only_version_1_has(name, caplog):
    values = {"sharding_strategy": "FULL_SHARD", "backward_prefetch": "BACKWARD_PRE"}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **{name: values.get(name, True)})
    assert getattr(plugin, name) is None
    assert f"{name} belongs to version 1 of FSDP" in caplog.text


def test_the_launchers_defaults_are_no_reason_to_complain(monkeypatch, caplog):
    from accelerate.launch.plan import plan

    for name, value in plan(["--use_fsdp", "--fsdp_version", "2", "s.py"]).environment.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and plugin.cpu_ram_efficient_loading
    assert not caplog.text
    monkeypatch.setenv("FSDP_SHARDING_STRATEGY", "SHARD_GRAD_OP")  # this one was chosen
    FullyShardedDataParallelPlugin()
    assert "sharding_strategy belongs to version 1" in caplog.text


def test_version_2_does_not_take_a_strategy():
    with pytest.raises(ValueError, match="'FULL_SHARD' is a sharding strategy of version 1.*to-fsdp2"):
        FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward="FULL_SHARD")


def test_only_rank_0_loads_so_the_others_must_receive(caplog):
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=True)
    assert plugin.sync_module_states and not caplog.text
    assert FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=True, sync_module_states=False).sync_module_states
    assert "sync_module_states=False is overridden" in caplog.text


def test_offloading_activations_needs_checkpointing():
    with pytest.raises(ValueError, match="needs activation_checkpointing=True"):
        FullyShardedDataParallelPlugin(activation_checkpointing_offload=True)


def test_prefetching():
    assert FullyShardedDataParallelPlugin(backward_prefetch="BACKWARD_POST").backward_prefetch.name == "BACKWARD_POST"
    assert FullyShardedDataParallelPlugin(backward_prefetch="NO_PREFETCH").backward_prefetch is None
    member = fsdp.BackwardPrefetch.BACKWARD_PRE
    assert FullyShardedDataParallelPlugin(backward_prefetch=member).backward_prefetch is member


# State dictionaries --------------------------------------------------------------------------------------------------


def test_a_configuration_decides_the_type(monkeypatch):
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    assert FullyShardedDataParallelPlugin().state_dict_type is fsdp.StateDictType.SHARDED_STATE_DICT
    config = fsdp.FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
    plugin = FullyShardedDataParallelPlugin(state_dict_config=config)
    assert plugin.state_dict_type is fsdp.StateDictType.FULL_STATE_DICT and plugin.state_dict_config is config


def test_changing_the_type_changes_what_belongs_to_it():
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_state_dict_type("SHARDED_STATE_DICT")
    assert isinstance(plugin.state_dict_config, fsdp.ShardedStateDictConfig)
    assert isinstance(plugin.optim_state_dict_config, fsdp.ShardedOptimStateDictConfig)
    plugin.set_state_dict_type()
    assert plugin.state_dict_type is fsdp.StateDictType.SHARDED_STATE_DICT


# Units ---------------------------------------------------------------------------------------------------------------


def wrapped(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> functools.partial:
    plugin.set_auto_wrap_policy(model)
    assert isinstance(plugin.auto_wrap_policy, functools.partial)
    return plugin.auto_wrap_policy


@pytest.mark.parametrize("names", ["Layer", ["Layer"]])
def test_layers_by_name(names):
    plugin = FullyShardedDataParallelPlugin(
        auto_wrap_policy="TRANSFORMER_BASED_WRAP", transformer_cls_names_to_wrap=names
    )
    policy = wrapped(plugin, Model())
    assert policy.func is transformer_auto_wrap_policy and policy.keywords == {"transformer_layer_cls": {Layer}}


def test_layers_as_the_model_says():
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    assert wrapped(plugin, Model(["Layer", "OnlyInOtherModels"])).keywords == {"transformer_layer_cls": {Layer}}


@pytest.mark.parametrize(
    ("names", "no_split", "message"),
    [
        (
            ["Layer", "Other"],
            None,
            "Model has no Other: name the classes to wrap.*It is built of Layer, Model, ModuleList",
        ),
        (None, None, "has no _no_split_modules"),
        (None, ["Other"], "Model has no Other"),
    ],
)
def test_layers_that_are_not_there(names, no_split, message):
    plugin = FullyShardedDataParallelPlugin(
        auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=names
    )
    with pytest.raises(ValueError, match=message):
        plugin.set_auto_wrap_policy(Model(no_split))


def test_units_by_size():
    policy = wrapped(FullyShardedDataParallelPlugin(auto_wrap_policy="size_based_wrap", min_num_params=3), Model())
    assert policy.func is size_based_auto_wrap_policy and policy.keywords == {"min_num_params": 3}
    assert FullyShardedDataParallelPlugin(auto_wrap_policy="size_based_wrap").min_num_params == 100_000_000


def test_a_policy_of_ones_own_is_kept():
    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return False

    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy=policy)
    plugin.set_auto_wrap_policy(Model())
    assert plugin.auto_wrap_policy is policy


def test_ignored_modules():
    assert FullyShardedDataParallelPlugin(ignored_modules="head.*").ignored_modules == "head.*"
    layers = [nn.Linear(1, 1), nn.Linear(1, 1)]
    once = FullyShardedDataParallelPlugin(ignored_modules=iter(layers))
    assert (
        once.ignored_modules == layers
        and FullyShardedDataParallelPlugin(ignored_modules=layers[0]).ignored_modules == layers[:1]
    )
    with pytest.raises(ValueError, match="ignored_modules holds str 'head'"):
        FullyShardedDataParallelPlugin(ignored_modules=["head"])
    with pytest.raises(ValueError, match="is not a regular expression"):
        FullyShardedDataParallelPlugin(ignored_modules="(")


# Number formats ------------------------------------------------------------------------------------------------------


def test_mixed_precision_of_version_1():
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_mixed_precision("no")
    assert plugin.mixed_precision_policy is None
    plugin.set_mixed_precision("bf16")
    half, full = torch.bfloat16, torch.float32
    assert plugin.mixed_precision_policy == fsdp.MixedPrecision(half, half, full)
    plugin.set_mixed_precision("fp16")
    assert plugin.mixed_precision_policy.param_dtype is half  # what was given is kept
    plugin.set_mixed_precision(torch.float16, buffer_autocast=True, override=True)
    assert plugin.mixed_precision_policy == fsdp.MixedPrecision(torch.float16, torch.float16, torch.float16)


def test_mixed_precision_of_version_2():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="fp8")
    assert plugin.mixed_precision_policy == fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, mixed_precision_policy={"param_dtype": "bf16", "reduce_dtype": torch.float32}
    )
    assert plugin.mixed_precision_policy == fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mixed_precision_policy": "fp64x"}, "'fp64x' is not a dtype"),
        (
            {"mixed_precision_policy": fsdp.MixedPrecisionPolicy()},
            "fsdp_version=1 this is an instance of MixedPrecision",
        ),
        ({"fsdp_version": 2, "mixed_precision_policy": fsdp.MixedPrecision()}, "instance of MixedPrecisionPolicy"),
        (
            {"fsdp_version": 2, "cpu_offload": fsdp.CPUOffload(True)},
            "fsdp_version=2 this is an instance of OffloadPolicy",
        ),
        ({"cpu_offload": fsdp.CPUOffloadPolicy()}, "instance of CPUOffload"),
    ],
)
def test_policies_of_the_other_version(given, message):
    with pytest.raises(ValueError, match=message):
        FullyShardedDataParallelPlugin(**given)


def test_how_transformers_is_told_who_loads():
    enable_fsdp_ram_efficient_loading()
    assert (os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]) == ("True", "True")
    disable_fsdp_ram_efficient_loading()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "False"


def test_what_offloads():
    from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, OffloadPolicy

    def offloads(version: int, value: Any) -> bool:
        return FullyShardedDataParallelPlugin(fsdp_version=version, cpu_offload=value).offloads

    assert offloads(1, True) and offloads(2, True) and offloads(1, CPUOffload(True)) and offloads(2, CPUOffloadPolicy())
    assert not (
        offloads(1, None) or offloads(2, False) or offloads(1, CPUOffload(False)) or offloads(2, OffloadPolicy())
    )


@pytest.mark.parametrize(
    ("given", "frees"), [(None, True), (True, True), (False, False), ("true", True), ("false", False)]
)
def test_whether_version_2_frees_after_the_forward(given, frees, monkeypatch):
    assert FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=given).reshard_after_forward is frees
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", str(not frees).lower())
    chosen = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=given).reshard_after_forward
    assert chosen is (frees if given is not None else not frees)
