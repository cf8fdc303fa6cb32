"""Offloaded weights on the way to a device, on simulated CUDA devices that record what streams do in which order."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import accelerate
from accelerate.hooks import attach_align_device_hook
from accelerate.offload.hooks import device_transfer
from accelerate.offload.hooks.device_transfer import PinnedRingBuffer
from accelerate.offload.io.mmap_reader import ReadInterruptedError
from tests.helpers import streams

SPELLINGS = ["cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda:0")]
CPU = torch.device("cpu")


class Layer(nn.Module):
    """A weight of several pinned buffers, and a small one; its forward reads both."""

    machine: streams.Machine

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 10))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.machine.read(self.weight, self.bias)
        return x


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> streams.Machine:
    monkeypatch.setattr(device_transfer, "_BUFFER", 256)
    found = streams.install(monkeypatch, 2)
    monkeypatch.setattr(Layer, "machine", found, raising=False)
    return found


def layers() -> nn.Module:
    return nn.Sequential(*[Layer() for _ in range(5)])


def run(model: nn.Module, machine: streams.Machine, times: int = 3) -> None:
    before = machine.reads
    for _ in range(times):
        model(torch.zeros(2))
    assert machine.problems == []
    assert machine.reads - before == times * 10


@pytest.mark.parametrize("place", SPELLINGS, ids=repr)
@pytest.mark.parametrize("how", ["memory", "pinned", "disk", "map", "attached", "main"])
def test_every_weight_is_waited_for_and_kept_until_it_was_read(
    tmp_path: Path, machine: streams.Machine, place: Any, how: str
) -> None:
    model = layers()
    if how == "memory":
        accelerate.cpu_offload(model, place)
    elif how == "pinned":
        state = {name: machine.pin(value.clone()) for name, value in model.state_dict().items()}
        accelerate.cpu_offload(model, place, state_dict=state)
    elif how == "disk":
        accelerate.disk_offload(model, tmp_path, place)
    elif how == "map":
        accelerate.dispatch_model(
            model, {"0": place, "1": "cpu", "2": "cpu", "3": "disk", "4": place}, offload_dir=tmp_path
        )
    elif how == "main":
        where = dict.fromkeys("0123", "cpu") | {"4": "disk"}
        accelerate.dispatch_model(model, where, main_device=place, offload_dir=tmp_path)
    else:
        attach_align_device_hook(model, place, offload=True, weights_map=dict(model.state_dict()))
    run(model, machine)


def test_the_stream_that_counts_is_the_one_of_the_forward(machine: streams.Machine) -> None:
    model = accelerate.cpu_offload(layers(), torch.device("cuda"))
    with machine.stream(machine.Stream()):
        run(model, machine)
    run(model, machine)


def test_layers_of_several_devices(machine: streams.Machine) -> None:
    model = layers()
    for index, layer in enumerate(model):
        accelerate.cpu_offload(layer, torch.device("cuda", index % 2))
    run(model, machine)
    assert {layer.weight.device.type for layer in model} == {"meta"}


def test_a_forward_that_fails_leaves_the_next_one_right(machine: streams.Machine) -> None:
    model = accelerate.cpu_offload(layers(), torch.device("cuda"))
    with contextlib.suppress(ValueError):
        model.register_module("5", Failing())
        model(torch.zeros(2))
    del model[5]
    run(model, machine)


class Failing(nn.Module):
    """Raises."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError


def test_pinned_weights_do_not_make_the_caller_wait(machine: streams.Machine) -> None:
    model = layers()
    state = {name: machine.pin(value.clone()) for name, value in model.state_dict().items()}
    accelerate.cpu_offload(model, torch.device("cuda"), state_dict=state)
    machine.host_waits.clear()
    model(torch.zeros(2))
    # Copies of inputs from memory that is not pinned, and of outputs to it, wait.
    assert machine.host_waits.count("MainThread") == 2


# Pinned buffers --------------------------------------------------------------------------------------------------------


class Waited:
    """An event that counts how often it was waited for."""

    count = 0

    def record(self, stream: Any) -> None:
        """Does nothing."""

    def synchronize(self) -> None:
        """Counts."""
        Waited.count += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_ring_of_buffers_waits_before_it_uses_one_again(dtype: torch.dtype) -> None:
    Waited.count = 0
    ring = PinnedRingBuffer([torch.empty(64, dtype=torch.uint8) for _ in range(2)], Waited)
    source = torch.arange(100).reshape(10, 10).to(dtype)
    target = torch.empty_like(source)
    ring.copy(source, target, None, lambda: False)
    assert torch.equal(source, target)
    assert Waited.count == -(-source.nbytes // 64) - 1
    with pytest.raises(ReadInterruptedError):
        ring.copy(source, target, None, lambda: True)


def test_small_tensors_share_a_buffer() -> None:
    Waited.count = 0
    ring = PinnedRingBuffer([torch.empty(64, dtype=torch.uint8) for _ in range(2)], Waited)
    sources = [torch.full((3,), number, dtype=torch.float32) for number in range(5)]
    for source in sources:
        target = torch.empty_like(source)
        ring.copy(source, target, None, lambda: False)
        assert torch.equal(source, target)
    assert Waited.count == 0  # 60 bytes
