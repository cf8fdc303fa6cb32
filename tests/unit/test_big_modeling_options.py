"""Options of the functions for big models: each test fails if its option is ignored."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accelerate import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    init_on_device,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    attach_align_device_hook,
    attach_align_device_hook_on_blocks,
    attach_execution_device_hook,
    attach_layerwise_casting_hooks,
)
from accelerate.utils import (
    OffloadedWeightsLoader,
    compute_module_sizes,
    get_balanced_memory,
    named_module_tensors,
    offload_weight,
    save_offload_index,
    set_module_tensor_to_device,
)
from accelerate.utils.modeling import clean_device_map
from tests.helpers.simulated_devices import simulated_cuda


class Block(nn.Module):
    """A layer and a buffer; its forward uses the layer's weight without calling it, and keeps the arguments' devices."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.direct = nn.Linear(2, 2)
        self.register_buffer("shift", torch.ones(2))
        self.seen: dict[str, str] = {}

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        self.seen = {"x": x.device.type, "cache": "" if cache is None else cache.device.type}
        self.weight = self.direct.weight.device.type
        return x @ self.direct.weight + self.shift


class Net(nn.Module):
    """A block and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.block(x, cache=cache))


Spread = Callable[..., nn.Module]


def _cpu(folder: Path, **options: Any) -> nn.Module:
    return cpu_offload(Net(), "cuda", **options)


def _disk(folder: Path, **options: Any) -> nn.Module:
    return disk_offload(Net(), folder, "cuda", **options)


def _dispatch(folder: Path, **options: Any) -> nn.Module:
    return dispatch_model(Net(), {"": "cpu"}, main_device="cuda", force_hooks=True, **options)


def _load(folder: Path, **options: Any) -> nn.Module:
    save_file(Net().state_dict(), folder / "model.safetensors")
    return load_checkpoint_and_dispatch(Net(), folder, {"block": "cpu", "head": 0}, **options)


def _attach(folder: Path, **options: Any) -> nn.Module:
    model = Net()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    attach_align_device_hook(model, "cuda", offload=True, weights_map=weights, **options)
    return model


def _attach_blocks(folder: Path, **options: Any) -> nn.Module:
    model = Net()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    devices, offload = {"block": "cuda", "head": "cuda"}, {"block": True, "head": False}
    attach_align_device_hook_on_blocks(model, devices, offload, weights_map=weights, **options)
    return model


SPREAD = [_cpu, _disk, _dispatch, _load, _attach, _attach_blocks]


@pytest.fixture(autouse=True)
def two_devices():
    with simulated_cuda(2):
        yield


@pytest.mark.parametrize("spread", SPREAD)
def test_buffers_are_offloaded_or_stay(spread: Spread, tmp_path):
    assert spread(tmp_path, offload_buffers=True, preload_module_classes=["Block"]).block.shift.is_meta
    assert not spread(tmp_path, preload_module_classes=["Block"]).block.shift.is_meta


@pytest.mark.parametrize("spread", SPREAD)
def test_a_class_fetches_all_at_once(spread: Spread, tmp_path):
    """Or its forward finds a layer's weight, which it uses without calling the layer, on the meta device."""
    for classes, device in ((["Block"], "cuda"), (None, "meta")):
        model = spread(tmp_path, preload_module_classes=classes)
        model(torch.ones(1, 2, device="cuda"))
        assert model.block.weight == device


@pytest.mark.parametrize("spread", [_dispatch, _load, _attach, _attach_blocks])
def test_arguments_that_are_skipped_stay(spread: Spread, tmp_path):
    for skipped, device in ((None, "cuda"), ("cache", "cpu")):
        model = spread(tmp_path, skip_keys=skipped, preload_module_classes=["Block"])
        model(torch.ones(1, 2), cache=torch.ones(1))
        assert model.block.seen == {"x": "cuda", "cache": device}


@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize("ahead", [True, False])
def test_weights_are_read_ahead_or_not(spread: Spread, ahead: bool, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_OFFLOAD_PREFETCH", str(int(not ahead)))
    model = spread(tmp_path, prefetch=ahead)
    hooks = [getattr(part, "_hf_hook", None) for part in model.modules()]
    flat = [each for hook in hooks for each in getattr(hook, "hooks", [hook])]
    assert any(getattr(hook, "prefetcher", None) is not None for hook in flat) == ahead


@pytest.mark.parametrize("spread", [_cpu, _dispatch])
def test_weights_that_are_kept_already_are_used(spread: Spread, tmp_path):
    kept = {name: torch.zeros_like(value) for name, value in Net().state_dict().items()}
    model = spread(tmp_path, state_dict=kept, preload_module_classes=["Block"])
    assert model(torch.ones(1, 2, device="cuda")).tolist() == [[0, 0]]


def test_a_map_is_made_with_what_must_not_be_split(tmp_path):
    model = nn.Sequential(*(Block() for _ in range(4)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    options = {"max_memory": {0: 180, "cpu": "1GiB"}}
    for classes, split in ((["Block"], False), (None, True)):
        load_checkpoint_and_dispatch(model, tmp_path, "sequential", no_split_module_classes=classes, **options)
        assert any("." in name for name in model.hf_device_map) == split


def test_hooks_are_forced(tmp_path):
    save_file(Net().state_dict(), tmp_path / "model.safetensors")
    plain = load_checkpoint_and_dispatch(Net(), tmp_path, {"": 0})
    hooked = load_checkpoint_and_dispatch(Net(), tmp_path, {"": 0}, force_hooks=True)
    assert hasattr(hooked, "_hf_hook") and not hasattr(plain, "_hf_hook")


@pytest.mark.parametrize("load", [load_checkpoint_in_model, load_checkpoint_and_dispatch])
@pytest.mark.parametrize("device_map", [None, {"": "cpu"}])
def test_a_checkpoint_that_lacks_a_name_is_refused_if_asked(load, device_map, tmp_path):
    state = Net().state_dict()
    del state["block.shift"]
    save_file(state, tmp_path / "model.safetensors")
    load(Net(), tmp_path, device_map)
    with pytest.raises(ValueError, match="shift"):
        load(Net(), tmp_path, device_map, strict=True)


def test_buffers_of_offloaded_layers_go_to_disk(tmp_path):
    save_file(Net().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "offload").mkdir()
    for offloaded in (False, True):
        model = Net()
        load_checkpoint_in_model(
            model, tmp_path, {"": "disk"}, offload_folder=tmp_path / "offload", offload_buffers=offloaded
        )
        assert model.block.shift.is_meta == offloaded
        assert (tmp_path / "offload" / "index.json").is_file()


def test_a_model_runs_where_it_is_told():
    model, _ = cpu_offload_with_hook(nn.Linear(1, 1), "cpu")
    assert model(torch.ones(1, 1)).device.type == "cpu"
    model, _ = cpu_offload_with_hook(nn.Linear(1, 1))
    assert model(torch.ones(1, 1)).device.type == "cuda"


def test_buffers_are_empty_only_if_asked():
    with init_empty_weights(include_buffers=True):
        assert Block().shift.is_meta
    with init_empty_weights():
        assert not Block().shift.is_meta
    with init_on_device("cuda", include_buffers=True):
        assert Block().shift.device.type == "cuda"
    with init_on_device("cuda"):
        assert Block().shift.device.type == "cpu"


def test_a_map_is_logged_if_asked(caplog):
    with caplog.at_level(logging.INFO, logger="accelerate"):
        infer_auto_device_map(Net(), max_memory={0: "1GiB"})
        assert not caplog.records
        infer_auto_device_map(Net(), max_memory={0: "1GiB"}, verbose=True)
    assert "block.inner (24 bytes) is assigned to 0" in caplog.text


def test_a_map_names_parts_or_the_whole():
    assert infer_auto_device_map(Net(), max_memory={0: "1GiB"}) == {"": 0}
    assert set(infer_auto_device_map(Net(), max_memory={0: "1GiB"}, clean_result=False)) == {"block", "head"}


def test_room_is_kept_for_buffers_that_stay():
    class Buffered(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8, bias=False)
            self.register_buffer("large", torch.ones(200))

    model = nn.Sequential(*(Buffered() for _ in range(6)))
    limits = {0: 5_000, "cpu": "1GiB"}
    kept, moved = (infer_auto_device_map(model, limits, offload_buffers=offloaded) for offloaded in (False, True))
    assert [list(places.values()).count(0) for places in (kept, moved)] == [4, 2]  # what is fetched needs room as well


def test_weights_on_disk_are_noted_and_found(tmp_path):
    assert offload_weight(torch.ones(2), "a", tmp_path, index={}) == {"a": {"dtype": "float32", "shape": [2]}}
    save_offload_index({"a": {"dtype": "float32", "shape": [2]}}, tmp_path)
    assert OffloadedWeightsLoader({"b": torch.ones(1)}, save_folder=tmp_path)["a"].tolist() == [1, 1]


def test_some_tensors_are_counted_in_another_dtype():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    special = {"0.weight": torch.float16}
    assert compute_module_sizes(model, special_dtypes=special)[""] == 8 + 16
    limits = {0: 24, "cpu": "1GiB"}
    assert infer_auto_device_map(model, limits, special_dtypes=special) == {"": 0}
    assert infer_auto_device_map(model, limits) != {"": 0}
    small = {f"{index}.weight": torch.float16 for index in range(2)}
    plain, halved = (get_balanced_memory(model, special_dtypes=dtypes) for dtypes in (None, small))
    assert halved[0] < plain[0]


def test_only_a_modules_part_of_a_map_is_cleaned():
    full = {"a.x": 0, "a.y": 0, "b.x": 1, "b.y": 1}
    assert clean_device_map(dict(full), module_name="a") == {"a": 0, "b.x": 1, "b.y": 1}


# Hooks ----------------------------------------------------------------------------------------------------------------


class Keeping(ModelHook):
    """A hook that keeps what a forward was called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls.append((args, kwargs))
        return super().pre_forward(module, *args, **kwargs)


@pytest.mark.parametrize("hook", ["sequential", "cpu offload", "casting", "align"])
def test_hooks_hand_arguments_on(hook):
    from accelerate.hooks import CpuOffload, LayerwiseCastingHook

    kept = Keeping()
    made = {
        "sequential": lambda: SequentialHook(kept),
        "cpu offload": lambda: CpuOffload("cpu"),
        "align": lambda: AlignDevicesHook(None),
        "casting": lambda: LayerwiseCastingHook(torch.bfloat16, torch.float32, False),
    }[hook]()
    module = nn.Linear(1, 1)
    assert made.pre_forward(module, 1, x=2) == ((1,), {"x": 2})
    assert hook != "sequential" or kept.calls == [((1,), {"x": 2})]


def test_hooks_run_one_after_the_other():
    first, second, model = Keeping(), Keeping(), nn.Identity()
    add_hook_to_module(model, first)
    add_hook_to_module(model, second, append=True)
    model(1)
    assert len(first.calls) == len(second.calls) == 1


def test_weights_are_found_under_a_modules_full_name():
    for attach, options in (
        (attach_align_device_hook, {"execution_device": "cpu", "offload": True}),
        (attach_align_device_hook_on_blocks, {"execution_device": {"part": "cpu"}, "offload": {"part": True}}),
    ):
        model = nn.Linear(1, 1, bias=False)
        attach(model, weights_map={"part.weight": torch.ones(1, 1)}, module_name="part", **options)
        assert model(torch.ones(1, 1)).item() == 1


@pytest.mark.parametrize("attach", ["all", "blocks", "execution", "hook"])
def test_weights_that_are_tied_are_brought_once(attach):
    first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    second.weight = first.weight
    tied: dict[int, dict[torch.device, torch.Tensor]] = {first.weight.data_ptr(): {}}
    model = nn.Sequential(first, second)
    if attach == "all":
        attach_align_device_hook(model, "cuda", tied_params_map=tied)
    elif attach == "blocks":
        attach_align_device_hook_on_blocks(model, {"0": "cuda", "1": "cuda"}, tied_params_map=tied)
    elif attach == "execution":
        attach_execution_device_hook(model, "cuda", tied_params_map=tied)
    else:
        for layer in model:
            add_hook_to_module(layer, AlignDevicesHook("cuda", tied_params_map=tied))
    model(torch.ones(1, 1, device="cuda"))
    assert first.weight is second.weight or first.weight.data_ptr() == second.weight.data_ptr()
    assert len(next(iter(tied.values()))) == 1


def test_an_execution_device_hook_skips_arguments():
    for skipped, device in ((None, "cuda"), ("cache", "cpu")):
        model = Net()
        attach_execution_device_hook(model, "cuda", skip_keys=skipped)
        model(torch.ones(1, 2), cache=torch.ones(1))
        assert model.block.seen["cache"] == device


def test_layers_are_left_in_their_dtype():
    def dtypes(**options: Any) -> list[torch.dtype]:
        model = nn.Sequential(nn.Linear(1, 1), nn.Conv1d(1, 1, 1))
        attach_layerwise_casting_hooks(model, torch.bfloat16, torch.float32, **options)
        return [layer.weight.dtype for layer in model]

    assert dtypes() == [torch.bfloat16, torch.bfloat16]
    assert dtypes(skip_modules_pattern="^0") == [torch.float32, torch.bfloat16]
    assert dtypes(skip_modules_classes=(nn.Conv1d,)) == [torch.bfloat16, torch.float32]


def test_casts_run_beside_the_cpu_if_asked(monkeypatch):
    model = nn.Linear(1, 1)
    attach_layerwise_casting_hooks(model, torch.bfloat16, torch.float32, non_blocking=True)
    assert model._hf_hook.non_blocking is True


# Tensors --------------------------------------------------------------------------------------------------------------


def test_statistics_of_an_8_bit_weight_are_kept():
    model, statistics = nn.Linear(1, 1), torch.ones(1)
    set_module_tensor_to_device(model, "weight", "cpu", torch.zeros(1, 1), fp16_statistics=statistics)
    assert torch.equal(model.weight.SCB, statistics)


def test_a_copy_that_is_there_is_used():
    model, there = nn.Linear(1, 1), nn.Parameter(torch.ones(1, 1, device="cuda"))
    tied = {model.weight.data_ptr(): {torch.device("cuda", 0): there}}
    set_module_tensor_to_device(model, "weight", "cuda", tied_params_map=tied)
    assert model.weight is there


def test_memory_goes_back_to_the_driver_if_asked(monkeypatch):
    cleared: list[int] = []
    monkeypatch.setattr("accelerate.offload.tensors.clear_device_cache", lambda: cleared.append(1))
    model = nn.Linear(1, 1).to("cuda")
    set_module_tensor_to_device(model, "weight", "cpu", clear_cache=False)
    assert not cleared
    set_module_tensor_to_device(model, "bias", "cpu")
    assert cleared


def test_tensors_of_a_module_are_chosen():
    model = Net()
    model.block.register_buffer("passing", torch.ones(1), persistent=False)

    def names(**options: Any) -> set[str]:
        return {name.rpartition(".")[2] for name, _ in named_module_tensors(model.block, **options)}

    assert names() == {"shift", "passing"}
    assert names(remove_non_persistent=True) == {"shift"}
    assert names(include_buffers=False) == set()
    assert names(recurse=True) == {"shift", "passing", "weight", "bias"}


def test_a_tensor_is_copied_beside_the_cpu_if_asked(monkeypatch):
    plain, seen = torch.Tensor.to, []

    def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(options.get("non_blocking"))
        return plain(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    for wanted in (False, True):
        set_module_tensor_to_device(nn.Linear(1, 1), "weight", "cpu", torch.ones(1, 1), non_blocking=wanted)
        assert set(seen) == {wanted}
        seen.clear()
