"""The staging buffer: asynchronous copies, their synchronization, and the reuse of memory.

No device with streams is needed: recorders simulate one where a copy starts and where it is synchronized.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from accelerate import Accelerator
from accelerate.checkpointing.items.state_item import TORCH
from accelerate.checkpointing.storage.staging import StagingBuffer, is_dense_cpu


class Streams(StagingBuffer):
    """Simulates a device with streams by tensors on "meta", which have no values to copy."""

    pinned_device_types = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.started: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.synchronized: list[torch.device] = []
        self.allocated: list[tuple[int, bool]] = []

    def _allocate(self, size: int, pinned: bool) -> torch.Tensor:
        self.allocated.append((size, pinned))
        return super()._allocate(size, pinned=False)

    def _start_copy(self, target: torch.Tensor, source: torch.Tensor, streams: bool) -> None:
        assert streams
        self.started.append((target, source))

    def _synchronize(self, device: torch.device) -> None:
        self.synchronized.append(device)


def test_device_tensors_are_staged_in_pinned_memory_with_one_synchronization() -> None:
    sources = [
        torch.empty(3, 4, device="meta"),
        torch.nn.Parameter(torch.empty(5, dtype=torch.bfloat16, device="meta")),
        torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last),
        torch.empty((), dtype=torch.int64, device="meta"),
    ]
    on_the_cpu = torch.arange(6.0)
    buffer = Streams()
    buffer.clear()
    copies = [buffer.copy(tensor) for tensor in (*sources, on_the_cpu)]
    buffer.copy_cpu_tensors()
    assert torch.equal(copies[-1], on_the_cpu) and buffer.synchronized == []
    buffer.wait()
    assert buffer.synchronized == [torch.device("meta")]
    assert buffer.allocated == [
        (48, True), (10, True), (480, True), (8, True), (24, False)
    ]  # fmt: skip
    for (target, source), copy, wanted in zip(buffer.started, copies[:-1], sources, strict=True):
        assert target is copy and source.dtype == wanted.dtype
        assert (copy.shape, copy.dtype, copy.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
        assert copy.device.type == "cpu"


def test_memory_is_reused_and_unused_memory_is_released() -> None:
    buffer = Streams()
    for _ in range(3):
        buffer.clear()
        buffer.copy(torch.empty(3, device="meta"))
        buffer.copy(torch.empty(3))
        buffer.copy(torch.empty(3))
        buffer.wait()
    assert buffer.allocated == [(12, True), (12, False), (12, False)]
    buffer.clear()  # the following copies leave two of them unused
    buffer.copy(torch.empty(3))
    buffer.clear()
    for device in ("meta", "cpu", "cpu"):
        buffer.copy(torch.empty(3, device=device))
    assert buffer.allocated[3:] == [(12, True), (12, False)]


def test_pageable_memory_replaces_pinned_memory_that_cannot_be_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refuse(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    assert len(StagingBuffer()._allocate(7, pinned=True)) == 7


class Delayed(StagingBuffer):
    """Simulates a device by CPU tensors whose copies complete at the synchronization only."""

    pinned_device_types = ("cpu",)

    def __init__(self, busy: Any, gate: Any) -> None:
        super().__init__()
        self.busy, self.gate = busy, gate
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.synchronized = 0
        self.allocated = 0

    def clear(self) -> None:
        assert not self.busy(), "the memory is still being written to disk"
        self.gate.clear()
        super().clear()

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if not is_dense_cpu(tensor):
            return super().copy(tensor)
        target = self._allocate_like(tensor, pinned=True)
        self.waiting.append((target, tensor.detach()))
        self._devices.add(tensor.device)
        return target

    def _allocate(self, size: int, pinned: bool) -> torch.Tensor:
        self.allocated += 1
        return torch.zeros(size, dtype=torch.uint8)

    def _synchronize(self, device: torch.device) -> None:
        for target, source in self.waiting:
            target.copy_(source)
        self.waiting.clear()
        self.synchronized += 1


class Gate(threading.Event):
    """Blocks all background writes until it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        write = TORCH.write

        def held_back(state: Any, writer: Any) -> Any:
            assert self.wait(60)
            return write(state, writer)

        monkeypatch.setitem(TORCH.__dict__, "write", held_back)

    def set_soon(self) -> None:
        """Sets the event during the caller's next call."""
        threading.Timer(0.2, self.set).start()


def trained(accelerator: Accelerator) -> tuple[Any, Any]:
    model = torch.nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    step(accelerator, model, optimizer)
    return model, optimizer


def step(accelerator: Accelerator, model: Any, optimizer: Any) -> None:
    accelerator.backward(model(torch.ones(2, 4)).pow(2).mean())
    optimizer.step()
    optimizer.zero_grad()


def values(model: Any, optimizer: Any) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *moments)]


def test_async_saves_contain_the_state_of_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer = trained(accelerator)
    saver = accelerator._checkpoints._saver
    gate = Gate(monkeypatch)
    buffer = accelerator._checkpoints._buffer = Delayed(lambda: saver.busy, gate)
    wanted = []
    for number in range(3):
        wanted.append(values(model, optimizer))
        accelerator.save_state(tmp_path / str(number), asynchronous=True)
        assert saver.busy
        assert buffer.synchronized == number + 1
        step(accelerator, model, optimizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(-1)
        gate.set_soon()
        if number == 0:
            allocated = buffer.allocated
    assert allocated and buffer.allocated == allocated
    accelerator.wait_for_checkpoint()
    for number, before in enumerate(wanted):
        accelerator.load_state(tmp_path / str(number))
        assert all(torch.equal(a, b) for a, b in zip(values(model, optimizer), before, strict=True))


@pytest.mark.parametrize("call", ["save_state", "load_state", "end_training", "wait_for_checkpoint"])
def test_calls_wait_for_a_pending_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    accelerator = Accelerator(cpu=True)
    trained(accelerator)
    accelerator.save_state(tmp_path / "before")
    gate = Gate(monkeypatch)
    accelerator.save_state(tmp_path / "first", asynchronous=True)
    assert not (tmp_path / "first").exists()
    there: list[bool] = []

    def look(*_: Any) -> None:
        there.append((tmp_path / "first" / "manifest.json").is_file())

    accelerator.register_save_state_pre_hook(look)
    accelerator.register_load_state_pre_hook(look)
    gate.set_soon()
    if call == "save_state":
        accelerator.save_state(tmp_path / "second")
    elif call == "load_state":
        accelerator.load_state(tmp_path / "before")
    else:
        getattr(accelerator, call)()
        look()
    assert there == [True]
