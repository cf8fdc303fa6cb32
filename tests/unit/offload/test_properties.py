"""Random trees of modules: a map covers each tensor once and keeps its limits; an offloaded forward is the resident one."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_model
from torch import nn

import accelerate
from accelerate.hooks import get_state_dict_offloaded_model, remove_hook_from_submodules
from accelerate.offload.device_map import assign_devices, device_of, infer_auto_device_map
from accelerate.offload.max_memory import get_balanced_memory
from accelerate.offload.module_groups import group_modules
from accelerate.offload.sizes import compute_module_sizes
from accelerate.offload.tensors import set_module_tensor_to_device
from accelerate.offload.tied_weights import find_tied_parameters, retie_parameters

WIDTH = 6


class Leaf(nn.Module):
    """A layer with a weight of odd size, a scalar, a buffer, and one that is in no state."""

    def __init__(self, size: int, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, WIDTH))
        if kind != "plain":
            self.scale = nn.Parameter(torch.randn(()))
        if kind == "buffers":
            self.register_buffer("shift", torch.randn(WIDTH))
            self.register_buffer("step", torch.tensor(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x + (x @ self.weight.T) @ self.weight / len(self.weight))
        if hasattr(self, "scale"):
            x = x * self.scale
        return x + self.shift * self.step if hasattr(self, "shift") else x


class Branch(nn.Module):
    """Layers one after the other, and a parameter that lies directly on it."""

    def __init__(self, parts: list[nn.Module], own: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.drop = nn.Dropout(0.5)
        self.own = nn.Parameter(torch.randn(WIDTH)) if own else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.own is None else x + self.own
        for part in self.parts:
            x = self.drop(part(x))
        return x


class Whole(Branch):
    """A branch that is not split."""


leaves = st.builds(Leaf, st.integers(1, 9), st.sampled_from(["plain", "scalar", "buffers"]))
trees = st.recursive(
    leaves,
    lambda inner: st.builds(
        lambda kind, parts, own: kind(parts, own),
        st.sampled_from([Branch, Whole]),
        st.lists(inner, min_size=1, max_size=3),
        st.booleans(),
    ),
    max_leaves=8,
)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 99)))
    model = Branch([draw(trees) for _ in range(draw(st.integers(1, 3)))], draw(st.booleans()))
    same: dict[int, list[Leaf]] = {}
    for module in model.modules():
        if isinstance(module, Leaf):
            same.setdefault(len(module.weight), []).append(module)
    for group in same.values():
        if len(group) > 1 and draw(st.booleans()):
            group[-1].weight = group[0].weight
    return model.eval()


def emptied(model: nn.Module) -> nn.Module:
    """A copy without the values of parameters, tied as the model is."""
    empty, groups = copy.deepcopy(model), find_tied_parameters(model)
    for name, _ in model.named_parameters(remove_duplicate=False):
        set_module_tensor_to_device(empty, name, "meta")
    retie_parameters(empty, groups)
    return empty


def on_each(model: nn.Module, device_map: dict[str, Any]) -> dict[Any, int]:
    taken: dict[Any, int] = {}
    seen: set[int] = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            device = device_of(name, device_map)
            assert device is not None, name
            taken[device] = taken.get(device, 0) + tensor.numel() * tensor.itemsize
    return taken


@settings(max_examples=120, deadline=None)
@given(models(), st.lists(st.integers(0, 900), max_size=3), st.one_of(st.none(), st.integers(0, 2000)), st.booleans())
def test_a_map_covers_everything_and_keeps_to_its_limits(
    model: nn.Module, fast: list[int], memory: int | None, offload_buffers: bool
) -> None:
    limits: dict[Any, Any] = dict(enumerate(fast)) | ({} if memory is None else {"cpu": memory})
    found = infer_auto_device_map(
        model, max_memory=limits, no_split_module_classes=["Whole"], offload_buffers=offload_buffers
    )
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    for name in names:  # by one entry each
        assert sum(name == key or not key or name.startswith(f"{key}.") for key in found) == 1
    for device, taken in on_each(model, found).items():
        assert device == "disk" or taken <= limits[device]
    for group in find_tied_parameters(model):
        assert len({device_of(name, found) for name in group}) == 1
    for name, module in model.named_modules():
        if isinstance(module, Whole):
            inside = [other for other in names if other.startswith(f"{name}.")]
            assert len({device_of(other, found) for other in inside}) == 1
    total = compute_module_sizes(model)[""]
    if fast and fast[0] >= total:
        assert found == {"": 0}


@settings(max_examples=60, deadline=None)
@given(models(), st.integers(2, 4))
def test_a_balanced_map_needs_no_other_device(model: nn.Module, count: int) -> None:
    total = compute_module_sizes(model)[""]
    limits = get_balanced_memory(
        model, max_memory=dict.fromkeys(range(count), total), no_split_module_classes=["Whole"]
    )
    found = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=["Whole"])
    taken = on_each(model, found)
    assert "disk" not in taken
    # No share is larger than the limit that the balance came to, and that is never more than the whole.
    assert max(taken.values()) <= max(limits[0], *(limits[device] for device in range(count - 1)))


@settings(max_examples=40, deadline=None)
@given(models(), st.integers(0, 1200), st.booleans(), st.booleans(), st.sampled_from(["memory", "folder", "file"]))
def test_an_offloaded_forward_is_the_resident_one(
    model: nn.Module, memory: int, buffers: bool, split: bool, how: str
) -> None:
    x = torch.randn(3, WIDTH)
    before, state = model(x), copy.deepcopy(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        device_map = infer_auto_device_map(model, {"cpu": memory}, no_split_module_classes=["Whole"] if split else None)
        if how == "memory":
            accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=buffers)
        elif how == "file":
            save_model(model, f"{folder}/model.safetensors")
            model = emptied(model)
            accelerate.load_checkpoint_and_dispatch(model, folder, device_map=device_map, offload_buffers=buffers)
        elif set(device_map.values()) == {"disk"}:
            accelerate.disk_offload(model, folder, torch.device("cpu"), offload_buffers=buffers)
        else:
            accelerate.dispatch_model(model, device_map, offload_dir=folder, offload_buffers=buffers)
        with torch.no_grad():
            assert torch.equal(model(x), before)
            assert torch.equal(model(x), before)
        whole = get_state_dict_offloaded_model(model)
        assert whole.keys() == state.keys()
        assert all(torch.equal(whole[name], value) for name, value in state.items())
        remove_hook_from_submodules(model)
        if how != "file":
            with torch.no_grad():
                assert torch.equal(model(x), before)


def test_what_fits_nowhere_is_named_with_what_each_device_has() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(40, 40), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"(?s)1 needs 6\.41 KB.*0: 500 bytes.*disk: 1000 bytes"):
        infer_auto_device_map(model, max_memory={0: 500, "disk": 1000})


def test_an_oversized_layer_ends_the_fast_device_unless_a_fallback_is_wanted() -> None:
    model = nn.Sequential(nn.Linear(100, 100), *[nn.Linear(8, 8) for _ in range(4)])
    limits: dict[Any, Any] = {0: 1000, "cpu": 10**6}
    assert infer_auto_device_map(model, max_memory=limits) == {"": "cpu"}
    found = infer_auto_device_map(model, max_memory=limits, clean_result=False, fallback_allocation=True)
    assert found == {"0": "cpu", "1": 0, "2": "cpu", "3": "cpu", "4": "cpu"}  # and room is left to run two of them


def test_room_is_kept_for_the_layer_that_computes_and_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Linear(10, 10, bias=False) for _ in range(6)])
    limits: dict[Any, Any] = {0: 5 * 400, "cpu": 10**6}
    on_0 = lambda: list(infer_auto_device_map(model, limits, clean_result=False).values()).count(0)  # noqa: E731
    assert on_0() == 3
    monkeypatch.setenv("ACCELERATE_OFFLOAD_PREFETCH", "0")
    assert on_0() == 4


def test_buffers_without_room_do_not_send_the_model_away(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*[nn.Linear(10, 10, bias=False) for _ in range(6)])
    model[5].register_buffer("table", torch.zeros(10_000))
    found = infer_auto_device_map(model, max_memory={0: 5 * 400, "cpu": 10**6}, clean_result=False)
    assert list(found.values()) == [0, 0, 0, "cpu", "cpu", "cpu"]
    assert "offload_buffers=True" in caplog.text


@settings(max_examples=150, deadline=None)
@given(models(), st.lists(st.integers(0, 900), max_size=3), st.one_of(st.none(), st.integers(0, 2000)), st.booleans())
def test_devices_are_filled_in_order_and_nothing_moves_on_that_fits(
    model: nn.Module, fast: list[int], memory: int | None, ahead: bool
) -> None:
    limits: dict[Any, int] = dict(enumerate(fast)) | ({} if memory is None else {"cpu": memory}) | {"disk": 2**63}
    groups = group_modules(model, ["Whole"])
    found = assign_devices(groups, limits, ahead=ahead)
    order = list(limits)
    steps = [(order.index(device), size) for device, size in zip(found, groups.sizes, strict=True) if size]
    ranks = [rank for rank, _ in steps]
    assert ranks == sorted(ranks)  # never back to an earlier device
    waits = ("cpu", "disk") if fast else ("disk",)
    waiting = [number for number, device in enumerate(found) if device in waits]
    largest = max((groups.sizes[number] for number in waiting), default=0)
    kept = max(largest, 2 * max((groups.units[number] for number in waiting), default=0) if ahead else 0)
    main = next(
        (device for device in order if limits[device] > 0 and (device not in ("cpu", "disk") or not fast)), None
    )
    for rank, device in enumerate(order):
        after = next((size for other, size in steps if other > rank), None)
        if after is not None:
            taken = sum(size for other, size in steps if other == rank)
            assert taken + after > limits[device] - (kept if device == main else 0)
