"""Options of the small public functions: each test fails if its option is ignored."""

from __future__ import annotations

import argparse
import logging
import sys
import types
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accelerate import PartialState
from accelerate.checkpointing.model_files import load
from accelerate.commands.launch import launch_command_parser
from accelerate.launch.compat import PrepareForLaunch, prepare_tpu
from accelerate.offload.checkpoints import load_state_dict
from accelerate.offload.disk_weights import OffloadedWeightsLoader
from accelerate.runtime import devices
from accelerate.runtime.system import availability, system_info, xla_install
from accelerate.settings.env import parse_choice_from_env, str_to_bool
from accelerate.strategies.fsdp2_functions import get_fsdp2_grad_scaler
from accelerate.strategies.parallel import compile as compiling
from accelerate.utils import GatheredParameters, tqdm, write_basic_config
from tests.helpers.simulated_devices import simulated_cuda


class Driver:
    """A kind of device whose driver is there, and no device."""

    def is_available(self) -> bool:
        return True

    def count(self) -> int:
        return 0


@pytest.mark.parametrize("name", ["mlu", "musa", "npu", "sdaa", "neuron", "xpu"])
def test_devices_are_counted_if_asked(name, monkeypatch):
    monkeypatch.setitem(devices.DEVICES, name, Driver())
    is_available = getattr(availability, f"is_{name}_available")
    is_available.cache_clear()
    try:
        assert is_available() is True
        assert is_available(check_device=True) is False
    finally:
        is_available.cache_clear()


def test_the_communication_library_of_gaudi_is_loaded_if_asked(monkeypatch):
    monkeypatch.setitem(devices.DEVICES, "hpu", Driver())
    availability.is_hpu_available.cache_clear()
    try:
        assert availability.is_hpu_available()
        with pytest.raises(ImportError):
            availability.is_hpu_available(init_hccl=True)
    finally:
        availability.is_hpu_available.cache_clear()


def test_an_old_torch_does_not_drive_apples_gpu(monkeypatch):
    monkeypatch.setitem(devices.DEVICES, "mps", Driver())
    assert availability.is_mps_available() and not availability.is_mps_available(min_version="99")


def test_torch_is_upgraded_with_torch_xla_if_asked(monkeypatch):
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> types.SimpleNamespace:
        commands.append(command)
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(xla_install.subprocess, "run", run)
    xla_install.install_xla()
    xla_install.install_xla(upgrade=True)
    assert ["--upgrade" in command for command in commands] == [False, True]


@pytest.mark.parametrize("bind", ["override_numa_affinity", "set_numa_affinity"])
@pytest.mark.parametrize("wanted", [True, False])
def test_binding_a_process_is_logged_or_not(bind, wanted, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_DEBUG_MODE", str(int(not wanted)))
    monkeypatch.setattr(system_info.os, "sched_setaffinity", lambda *_: None)
    system_info.set_numa_affinity.cache_clear()
    with caplog.at_level(logging.INFO, logger="accelerate"):
        getattr(system_info, bind)(0, verbose=wanted)
    system_info.set_numa_affinity.cache_clear()
    assert bool(caplog.records) == wanted


def test_words_that_are_missing_have_a_default():
    assert parse_choice_from_env("ACCELERATE_NO_SUCH_WORD", default="eager") == "eager"
    assert str_to_bool("yes", to_bool=True) is True
    assert str_to_bool("yes") == 1 and str_to_bool("yes") is not True


def test_a_bar_takes_its_arguments(capsys):
    bar = tqdm([1, 2], desc="training", file=sys.stdout)
    assert list(bar) == [1, 2]
    assert "training" in capsys.readouterr().out


def test_a_configuration_file_holds_what_is_asked_for(tmp_path):
    path = tmp_path / "config.yaml"
    assert write_basic_config(mixed_precision="bf16", save_location=path) == path
    assert "mixed_precision: bf16" in path.read_text()


def test_the_parser_is_added_to_others():
    subparsers = argparse.ArgumentParser().add_subparsers()
    launch_command_parser(subparsers=subparsers)
    assert "launch" in subparsers.choices


def test_a_pods_hosts_get_the_environment():
    args = launch_command_parser().parse_args(["--tpu", "--main_training_function", "main", "train.py"])
    assert prepare_tpu(args, {"A": "1"}, pod=True)[0].env[0] == "A=1"
    args = launch_command_parser().parse_args(["--tpu", "--main_training_function", "main", "train.py"])
    assert not prepare_tpu(args, {"A": "1"})[0].env


def test_a_forked_rank_is_told_how():
    assert PrepareForLaunch(print, distributed_type="MULTI_CPU").distributed_type == "MULTI_CPU"


def test_a_forked_rank_meets_the_others_at_a_file_if_asked(monkeypatch):
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("accelerate.runtime.world.join", lambda **options: seen.append(options))
    monkeypatch.setenv("ACCELERATE_DEBUG_RDV_FILE", "/tmp/meet")
    PrepareForLaunch(lambda: None)(0)
    assert not seen
    PrepareForLaunch(lambda: None, debug=True)(0)
    assert seen == [{"cpu": True, "init_method": "file:///tmp/meet"}]


@pytest.mark.parametrize("name", ["compile_regions", "compile_regions_fsdp2", "compile_regions_deepspeed"])
def test_regions_are_compiled_as_asked(name, monkeypatch):
    class Block(nn.Linear):
        seen: list[dict[str, Any]] = []

        def compile(self, **options: Any) -> None:
            self.seen.append(options)

    getattr(compiling, name)(nn.ModuleList([Block(1, 1), Block(1, 1)]), backend="eager", fullgraph=True)
    assert Block.seen == [{"backend": "eager", "fullgraph": True}] * 2


def test_a_scaler_takes_its_arguments():
    PartialState(cpu=True)
    assert get_fsdp2_grad_scaler(init_scale=8.0).get_scale() == 8


def test_tensors_go_where_they_are_sent(tmp_path):
    save_file({"a.x": torch.ones(1), "b.x": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "model.bin")
    index = {"a.x": {"safetensors_file": str(tmp_path / "model.safetensors")}}
    with simulated_cuda(1):
        state = load_state_dict(tmp_path / "model.safetensors", device_map={"a": 0, "b": "cpu"})
        assert [state[name].device.type for name in ("a.x", "b.x")] == ["cuda", "cpu"]
        assert OffloadedWeightsLoader(index=index, device="cuda")["a.x"].device.type == "cuda"
    for name in ("model.safetensors", "model.bin"):
        assert {tensor.device.type for tensor in load(tmp_path / name, map_location="meta").values()} == {"meta"}


def test_loading_takes_the_arguments_of_torch_load(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "model.bin")
    with pytest.raises(TypeError, match="no_such_option"):
        load(tmp_path / "model.bin", no_such_option=1)


def test_divided_parameters_stay_so_if_asked():
    """Or deepspeed, which is not installed, would be imported."""
    parameter = nn.Parameter(torch.ones(1))
    parameter.ds_id = 0
    with GatheredParameters([parameter], enabled=False):
        pass
