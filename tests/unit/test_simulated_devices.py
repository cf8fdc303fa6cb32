"""Every entry point of a newcomer, on a machine with 0, 1, 2 and 8 simulated CUDA devices.

`ENTRY_POINTS` is the list. torch's own checks of arguments run; see `tests.helpers.simulated_devices` for what is simulated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import accelerate.launch.host
import accelerate.launchers
from accelerate import (
    Accelerator,
    PartialState,
    cpu_offload,
    debug_launcher,
    dispatch_model,
    infer_auto_device_map,
    load_checkpoint_and_dispatch,
    notebook_launcher,
)
from accelerate.commands import accelerate_cli
from accelerate.state import AcceleratorState
from accelerate.utils import (
    find_executable_batch_size,
    get_max_memory,
    release_memory,
    send_to_device,
    set_module_tensor_to_device,
    set_seed,
)
from accelerate.utils.memory import clear_device_cache
from tests.helpers.simulated_devices import GIB, SimulatedMachine, simulated_cuda

COUNTS = (0, 1, 2, 8)


class Place:
    """One case: the simulated machine, a folder, and pytest's patches."""

    def __init__(self, machine: SimulatedMachine, folder: Path, monkeypatch: pytest.MonkeyPatch, out: Any) -> None:
        self.machine = machine
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.out = out

    @property
    def device(self) -> torch.device:
        """Where a lone process computes."""
        return torch.device("cuda", self.machine.current) if self.machine.count else torch.device("cpu")


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def _loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(8, 8)), batch_size=4, **options)


def _train(accelerator: Accelerator, place: Place, **options: Any) -> tuple[Any, Any]:
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    pinned = place.machine.count > 0  # torch warns where there is nothing to pin for
    model, optimizer, loader = accelerator.prepare(model, optimizer, _loader(pin_memory=pinned))
    before = model[0].weight.detach().clone()
    for (batch,) in loader:
        assert batch.device == accelerator.device == model[0].weight.device
        with accelerator.accumulate(model):
            loss = model(batch).square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.equal(model[0].weight, before)
    assert (("pin_memory",) in place.machine.calls) == pinned
    return model, optimizer


# Who and where --------------------------------------------------------------------------------------------------------


def accelerator(place: Place) -> None:
    made = Accelerator()
    assert made.device == place.device == torch.ones(1, device=made.device).device


def current_device_is_kept(place: Place) -> None:
    if place.machine.count:
        torch.cuda.set_device(place.machine.count - 1)
    assert Accelerator().device == place.device
    assert not place.machine.count or torch.cuda.current_device() == place.machine.count - 1


def device_named_by_variable(place: Place) -> None:
    name = f"cuda:{place.machine.count - 1}" if place.machine.count else "cpu"
    place.monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", name)
    assert PartialState().device == torch.device(name) == place.device
    PartialState().set_device()
    assert PartialState().device == torch.device(name)


def kind_named_by_variable(place: Place) -> None:
    place.monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda" if place.machine.count else "cpu")
    assert PartialState().device == place.device


def states(place: Place) -> None:
    assert PartialState().device == AcceleratorState().device == place.device
    assert PartialState().default_device.type == place.device.type
    PartialState().wait_for_everyone()


def set_device(place: Place) -> None:
    state = PartialState()
    state.set_device()
    assert state.device == place.device


def cpu_is_asked_for(place: Place) -> None:
    assert Accelerator(cpu=True).device == torch.device("cpu")
    assert place.machine.calls == []


# Training -------------------------------------------------------------------------------------------------------------


def train(place: Place) -> None:
    _train(Accelerator(), place)


def compile_in_fp32(place: Place) -> None:
    try:
        Accelerator(dynamo_backend="eager").prepare(nn.Linear(2, 2))
        assert torch.get_float32_matmul_precision() == ("high" if place.machine.count else "highest")
    finally:
        torch.set_float32_matmul_precision("highest")


def train_in_bf16(place: Place) -> None:
    _train(Accelerator(mixed_precision="bf16"), place)


def train_in_fp16_with_a_scaler(place: Place) -> None:
    made = Accelerator(mixed_precision="fp16")
    assert made.scaler is not None
    assert made.scaler.is_enabled()
    _train(made, place)


def train_with_a_fused_optimizer(place: Place) -> None:
    _train(Accelerator(mixed_precision="fp16"), place, fused=True)


def autocast(place: Place) -> None:
    with Accelerator(mixed_precision="bf16").autocast():
        assert torch.is_autocast_enabled(place.device.type)


def gather_and_reduce(place: Place) -> None:
    made = Accelerator()
    value = torch.ones(2, device=made.device)
    for result in (
        made.gather(value),
        made.reduce(value),
        made.pad_across_processes(value),
        made.gather_for_metrics(value),
    ):
        assert result.device == place.device
    made.set_trigger()
    assert made.check_trigger()


def save_and_load(place: Place) -> None:
    made = Accelerator(mixed_precision="fp16")
    model, _ = _train(made, place)
    made.save_state(str(place.folder / "state"))
    drawn = torch.rand(2, device=made.device)
    want = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.zero_()
    made.load_state(str(place.folder / "state"))
    assert model[0].weight.device == made.device
    assert torch.equal(model[0].weight, want)
    if not place.machine.count:  # random numbers of simulated devices are the CPU's
        assert torch.equal(torch.rand(2), drawn)


def save_model_and_load_on_a_device(place: Place) -> None:
    made = Accelerator()
    model = made.prepare(_net())
    made.save_model(model, place.folder / "weights")
    loaded = load_checkpoint_and_dispatch(_net(), place.folder / "weights", device_map={"": _first(place)})
    assert loaded[0].weight.device == place.device


def seed(place: Place) -> None:
    set_seed(3)
    first = torch.rand(2, device=place.device)
    set_seed(3)
    assert place.machine.count or torch.equal(first, torch.rand(2))
    assert all(each.initial_seed() == 3 for each in place.machine.generators) or not torch.cuda.is_initialized()


def move_a_batch(place: Place) -> None:
    made = Accelerator()
    batch = {"a": torch.ones(2), "b": [torch.ones(1)]}
    moved = send_to_device(batch, made.device)
    assert moved["a"].device == moved["b"][0].device == place.device
    assert send_to_device(moved, made.device)["a"] is moved["a"]


def free_memory(place: Place) -> None:
    made = Accelerator()
    model, optimizer = made.prepare(*_with_optimizer())
    clear_device_cache(garbage_collection=True)
    model, optimizer = release_memory(model, optimizer)
    made.free_memory()
    assert model is optimizer is None
    assert (("empty_cache",) in place.machine.calls) == (place.machine.count > 0)


def find_a_batch_size(place: Place) -> None:
    sizes = []

    @find_executable_batch_size(starting_batch_size=8)
    def attempt(batch_size: int) -> int:
        sizes.append(batch_size)
        if batch_size > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return batch_size

    assert attempt() == 2
    assert sizes == [8, 4, 2]


def _with_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = _net()
    return model, torch.optim.SGD(model.parameters(), 0.1)


# Large models ---------------------------------------------------------------------------------------------------------


def _first(place: Place) -> Any:
    return 0 if place.machine.count else "cpu"


def max_memory(place: Place) -> None:
    limits = get_max_memory()
    assert list(limits) == [*range(place.machine.count), "cpu"]
    assert [limits[index] for index in range(place.machine.count)] == place.machine.free


def infer_a_map(place: Place) -> None:
    found = infer_auto_device_map(_net(), {**dict.fromkeys(range(place.machine.count), 600), "cpu": GIB})
    assert set(found.values()) <= {*range(place.machine.count), "cpu"}
    assert next(iter(found.values())) == _first(place)


def _dispatched(place: Place, where: dict[str, Any], **options: Any) -> None:
    model = _net()
    inputs = torch.randn(2, 8)
    with torch.no_grad():
        want = model(inputs)
        model = dispatch_model(model, where, **options)
        got = model(inputs.to(model.hf_device_map["0"]))
    assert torch.equal(got.cpu(), want)


def dispatch_over_devices(place: Place) -> None:
    _dispatched(place, {"0": _first(place), "1": max(0, place.machine.count - 1) if place.machine.count else "cpu"})


def dispatch_to_one_device(place: Place) -> None:
    model = dispatch_model(_net(), {"": _first(place)})
    assert model[0].weight.device == place.device


def dispatch_with_offload(place: Place) -> None:
    _dispatched(place, {"0": _first(place), "1": "cpu"}, force_hooks=True)


def device_map_auto(place: Place) -> None:
    save_file(_net().state_dict(), place.folder / "model.safetensors")
    model = load_checkpoint_and_dispatch(_net(), place.folder, device_map="auto")
    assert {_spelled(device) for device in model.hf_device_map.values()} <= {*range(place.machine.count), "cpu"}
    with torch.no_grad():
        got = model(torch.ones(2, 8, device=place.device))
        assert torch.equal(got.cpu(), _net()(torch.ones(2, 8)))


def _spelled(device: Any) -> Any:
    return device.index if isinstance(device, torch.device) and device.type == "cuda" else device


def offload(place: Place) -> None:
    kind = place.device.type
    spellings = [kind, torch.device(kind), place.device, str(place.device), *([0] if place.machine.count else [])]
    for device in spellings:
        place.machine.calls.clear()
        model = _net()
        inputs = torch.randn(2, 8)
        with torch.no_grad():
            want = model(inputs)
            cpu_offload(model, device)
            for _ in range(3):
                got = model(inputs.to(place.device))
                assert got.device == place.device
                assert torch.equal(got.cpu(), want)
        recorded = {call[1] for call in place.machine.calls if call[0] == "record_stream"}
        # Which layers are prefetched depends on timing; offload/hooks/test_device_transfer.py looks at each weight.
        assert recorded <= {place.device}, device


def set_a_tensor(place: Place) -> None:
    model = _net()
    kind = place.device.type
    set_module_tensor_to_device(model, "0.weight", kind)
    moved = model[0].weight
    assert moved.device == place.device
    set_module_tensor_to_device(model, "0.weight", kind)
    assert model[0].weight is moved


# Launching ------------------------------------------------------------------------------------------------------------


def launch_from_a_notebook(place: Place) -> None:
    seen: list[Any] = []
    forked: list[int] = []
    place.monkeypatch.setattr(
        accelerate.launchers, "_fork_ranks", lambda function, args, count, *more: forked.append(count)
    )
    if not place.machine.count:
        with pytest.raises(ValueError, match="give num_processes"):
            notebook_launcher(lambda: None)
        notebook_launcher(lambda: seen.append(Accelerator().device), num_processes=1)
        assert seen == [place.device]
        return
    notebook_launcher(lambda: seen.append(Accelerator().device))
    if place.machine.count == 1:
        assert (seen, forked) == ([place.device], [])
    else:
        assert (seen, forked) == ([], [place.machine.count])
        assert not torch.cuda.is_initialized()


def launch_for_debugging(place: Place) -> None:
    debug_launcher(_on_cpu_rank, num_processes=2)
    assert not torch.cuda.is_initialized()


def _on_cpu_rank() -> None:
    state = PartialState()
    assert (state.device, state.num_processes) == (torch.device("cpu"), 2)


def launch_plan(place: Place) -> None:
    # The launcher looks for the driver's files, which a simulation in Python does not bring.
    place.monkeypatch.setattr(accelerate.launch.host, "_has_cuda_driver", lambda: place.machine.count > 0)
    (place.folder / "train.py").write_text("")
    assert accelerate_cli.main(["launch", "--dry_run", str(place.folder / "train.py")]) == 0
    shown = place.out.readouterr().out
    assert ("--nproc_per_node" in shown or "nproc" in shown) == (place.machine.count > 1), shown
    assert place.machine.count < 2 or str(place.machine.count) in shown


def default_configuration(place: Place) -> None:
    place.monkeypatch.setattr(accelerate.launch.host, "_has_cuda_driver", lambda: place.machine.count > 0)
    file = place.folder / "config.yaml"
    assert accelerate_cli.main(["config", "default", "--config_file", str(file)]) == 0
    text = file.read_text().replace("'", "")
    assert f"num_processes: {max(1, place.machine.count)}" in text
    assert f"distributed_type: {'MULTI_GPU' if place.machine.count > 1 else 'NO'}" in text
    assert f"use_cpu: {str(not place.machine.count).lower()}" in text


def report(place: Place) -> None:
    assert accelerate_cli.main(["env", "--json"]) == 0
    shown = json.loads(place.out.readouterr().out)
    assert shown["pytorch_accelerator"] == (f"CUDA ({place.machine.count})" if place.machine.count else "N/A")
    assert len(shown.get("devices", {})) == place.machine.count


def estimate(place: Place) -> None:
    pytest.importorskip("transformers", reason="estimate-memory reads its configurations")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    (place.folder / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"], **sizes})
    )
    assert accelerate_cli.main(["estimate-memory", str(place.folder), "--dtypes", "float32", "--json"]) == 0
    assert json.loads(place.out.readouterr().out)


ENTRY_POINTS: dict[str, Callable[[Place], None]] = {
    "Accelerator()": accelerator,
    "Accelerator(), another device is the current one": current_device_is_kept,
    "ACCELERATE_TORCH_DEVICE=cuda:N": device_named_by_variable,
    "ACCELERATE_TORCH_DEVICE=cuda": kind_named_by_variable,
    "PartialState(), AcceleratorState()": states,
    "PartialState.set_device()": set_device,
    "Accelerator(cpu=True)": cpu_is_asked_for,
    "prepare, pin_memory, accumulate, clip, step": train,
    "dynamo_backend, fp32": compile_in_fp32,
    "bf16": train_in_bf16,
    "fp16 with GradScaler": train_in_fp16_with_a_scaler,
    "fp16 with a fused optimizer": train_with_a_fused_optimizer,
    "autocast": autocast,
    "gather, reduce, pad_across_processes, triggers": gather_and_reduce,
    "save_state, load_state": save_and_load,
    "save_model, load_checkpoint_and_dispatch": save_model_and_load_on_a_device,
    "set_seed": seed,
    "send_to_device": move_a_batch,
    "clear_device_cache, release_memory, free_memory": free_memory,
    "find_executable_batch_size": find_a_batch_size,
    "get_max_memory": max_memory,
    "infer_auto_device_map": infer_a_map,
    "dispatch_model over devices": dispatch_over_devices,
    "dispatch_model to one device": dispatch_to_one_device,
    "dispatch_model with a part on the CPU": dispatch_with_offload,
    'device_map="auto"': device_map_auto,
    "cpu_offload": offload,
    "set_module_tensor_to_device": set_a_tensor,
    "notebook_launcher": launch_from_a_notebook,
    "debug_launcher": launch_for_debugging,
    "accelerate launch --dry_run": launch_plan,
    "accelerate config default": default_configuration,
    "accelerate env": report,
    "accelerate estimate-memory": estimate,
}


@pytest.fixture(params=COUNTS, ids=lambda count: f"{count} devices")
def place(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Place]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # no configuration file of the person who runs the tests
    with simulated_cuda(request.param) as machine:
        yield Place(machine, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_entry_point(place: Place, entry_point: str) -> None:
    ENTRY_POINTS[entry_point](place)


def test_bf16_on_a_device_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_cuda(1, capability=(6, 0)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)  # torch would emulate it here
        with pytest.raises(ValueError, match=r"cuda:0 does not support bfloat16: use 'fp16' or 'no'"):
            Accelerator(mixed_precision="bf16")
