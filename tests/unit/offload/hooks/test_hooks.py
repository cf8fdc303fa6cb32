"""Hooks go on, act, and come off; several act in order; weights come and go whatever the forward does."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import accelerate
from accelerate.hooks import (
    AlignDevicesHook,
    CpuOffload,
    ModelHook,
    SequentialHook,
    UserCpuOffloadHook,
    add_hook_to_module,
    align_module_device,
    attach_align_device_hook,
    attach_align_device_hook_on_blocks,
    attach_execution_device_hook,
    attach_layerwise_casting_hooks,
    get_state_dict_offloaded_model,
    has_offloaded_params,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from accelerate.offload.hooks.align import fill_offloaded
from accelerate.runtime.tensors.forward import ForwardWrapper, unwrap_forward, wrap_forward
from tests.helpers.nets import Blk, Net, Tied

CPU = torch.device("cpu")


class Add(ModelHook):
    """Adds to the input and multiplies the output."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls: list[str] = []

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.calls.append("init")
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("pre")
        return (args[0] + self.number, *args[1:]), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.calls.append("post")
        return output * (self.number + 1)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        self.calls.append("detach")
        return module


def test_a_hook_acts_and_comes_off() -> None:
    net, x = nn.Linear(3, 3), torch.randn(2, 3)
    plain, hook = net(x + 1) * 2, Add(1)
    assert add_hook_to_module(net, hook) is net
    assert net._hf_hook is hook
    assert torch.equal(net(x), plain)
    assert inspect.signature(net.forward) == inspect.signature(nn.Linear(3, 3).forward)
    assert remove_hook_from_module(net) is net
    assert not {"_hf_hook", "_old_forward", "forward"} & set(vars(net))
    assert torch.equal(net(x + 1) * 2, plain)
    assert hook.calls == ["init", "pre", "post", "detach"]


def test_a_second_hook_replaces_or_follows() -> None:
    x = torch.zeros(1)
    first, second, third = Add(1), Add(2), Add(4)
    net = add_hook_to_module(nn.Identity(), first)
    add_hook_to_module(net, second)
    assert net(x).item() == 2 * 3
    assert first.calls == ["init", "detach"]
    add_hook_to_module(net, third, append=True)
    assert isinstance(net._hf_hook, SequentialHook) and net._hf_hook.hooks == (second, third)
    assert net(x).item() == (2 + 4) * 3 * 5
    add_hook_to_module(net, first, append=True)
    assert net._hf_hook.hooks == (second, third, first)  # flat
    remove_hook_from_module(net)
    assert net(x).item() == 0
    assert all(hook.calls[-1] == "detach" for hook in (first, second, third))


def test_no_grad_of_a_hook() -> None:
    hook = ModelHook()
    net = add_hook_to_module(nn.Linear(2, 2), hook)
    assert net(torch.ones(2)).requires_grad
    hook.no_grad = True
    assert not net(torch.ones(2)).requires_grad


class Twice(ForwardWrapper):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.__wrapped__(*args, **kwargs)


@pytest.mark.parametrize("hook_first", [True, False])
@pytest.mark.parametrize("remove_first", [True, False])
def test_hooks_and_wrappers_do_not_take_each_other_off(hook_first: bool, remove_first: bool) -> None:
    net, x = nn.Identity(), torch.ones(1)
    steps = [lambda: add_hook_to_module(net, Add(0)), lambda: wrap_forward(net, Twice())]
    for step in steps if hook_first else steps[::-1]:
        step()
    assert net(x).item() == 2
    if remove_first:
        remove_hook_from_module(net)
        assert net(x).item() == 2
        unwrap_forward(net)
    else:
        unwrap_forward(net)
        assert net(x).item() == 1
        assert hasattr(net, "_hf_hook")
        remove_hook_from_module(net)
    assert net(x).item() == 1
    assert "forward" not in vars(net)


def test_a_copy_has_hooks_of_its_own() -> None:
    net, x = accelerate.cpu_offload(Net().eval(), CPU), torch.randn(2, 4)
    before = net(x)
    other = copy.deepcopy(net)
    remove_hook_from_submodules(net)
    with torch.no_grad():
        net.emb.weight.zero_()
    assert torch.equal(other(x), before)
    assert all(parameter.is_meta for parameter in other.parameters())


def test_a_list_of_modules_has_no_forward_to_hook() -> None:
    layers, hook = nn.ModuleList([nn.Linear(4, 4)]), AlignDevicesHook(CPU)
    add_hook_to_module(layers, hook)
    assert layers._hf_hook is hook and not {"forward", "_old_forward"} & vars(layers).keys()
    assert len(pickle.loads(pickle.dumps(layers))) == len(copy.deepcopy(layers)) == 1
    remove_hook_from_module(layers)
    assert not hasattr(layers, "_hf_hook")


def test_a_model_is_dispatched_again(tmp_path: Path) -> None:
    net, x = Net().eval(), torch.randn(2, 4)
    before = net(x)
    accelerate.Accelerator(cpu=True).save_model(net, tmp_path)
    with accelerate.init_empty_weights():
        again = Net().eval()
    parts = [name for name, _ in again.named_children()]
    again = accelerate.load_checkpoint_and_dispatch(again, tmp_path, dict.fromkeys(parts, "disk"))
    for disk in (parts[:1], parts[1:], []):  # with parts on disk that never were in memory
        where = {name: "disk" if name in disk else "cpu" for name in parts}
        accelerate.dispatch_model(again, where, offload_dir=tmp_path / "offload")
        assert torch.equal(again(x), before)
    assert not any(parameter.is_meta for parameter in again.parameters()) and not hasattr(again, "_hf_hook")


def test_a_part_without_values_takes_them_from_the_index(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    accelerate.Accelerator(cpu=True).save_model(net, tmp_path)
    index = {name: {"safetensors_file": str(tmp_path / "model.safetensors")} for name in net.state_dict()}
    with accelerate.init_empty_weights():
        empty = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    accelerate.dispatch_model(empty, {"": "cpu"}, offload_index=index)
    assert all(torch.equal(empty.state_dict()[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_module_in_two_places(tmp_path: Path, place: str) -> None:
    def made() -> nn.Module:
        shared = nn.Linear(4, 4)
        return nn.Sequential(nn.Sequential(shared), nn.Sequential(shared), nn.Linear(4, 2))

    net, x = made(), torch.randn(2, 4)
    accelerate.Accelerator(cpu=True).save_model(net, tmp_path)
    with accelerate.init_empty_weights():
        spread = made()
    accelerate.load_checkpoint_and_dispatch(spread, tmp_path, {"0": place, "1": "disk", "2": "cpu"})
    assert torch.equal(spread(x), net(x))
    assert all(torch.equal(value, net.state_dict()[n]) for n, value in get_state_dict_offloaded_model(spread).items())
    accelerate.dispatch_model(spread, {"": "cpu"})
    assert torch.equal(spread(x), net(x)) and spread[0][0] is spread[1][0]


def test_what_is_added_without_values_is_an_error() -> None:
    net = accelerate.cpu_offload(nn.Sequential(nn.Linear(4, 4)), CPU)
    net.add_module("late", nn.Linear(4, 4, device="meta"))
    with pytest.raises(RuntimeError, match=r"late\.weight has no values"):
        net(torch.randn(2, 4))


def test_a_forward_that_fails_leaves_no_weights_behind() -> None:
    net = accelerate.cpu_offload(Net(), CPU)
    with pytest.raises(RuntimeError, match="mat1"):
        net(torch.randn(2, 5))
    assert all(parameter.is_meta for parameter in net.parameters())


def test_an_offloaded_weight_is_one_placeholder_and_gets_no_gradient() -> None:
    net = accelerate.cpu_offload(Net().eval(), CPU)
    weight, x = net.emb.weight, torch.randn(2, 4, requires_grad=True)
    net(x).sum().backward()
    assert net.emb.weight is weight and weight.requires_grad and weight.grad is None
    assert x.grad is not None  # what lies below it can still be trained


def test_offloaded_or_not() -> None:
    net = Net()
    assert not has_offloaded_params(net.emb)
    add_hook_to_module(net.emb, AlignDevicesHook(CPU))
    assert not has_offloaded_params(net.emb)
    accelerate.cpu_offload(net, CPU)
    assert has_offloaded_params(net.emb) and not has_offloaded_params(net)


def test_aligned_for_a_while() -> None:
    net = Net()
    values = net.emb.weight.detach().clone()
    with align_module_device(net.emb, "meta"):
        assert net.emb.weight.is_meta
    assert torch.equal(net.emb.weight, values)
    attach_align_device_hook(net, CPU, offload=True)
    assert net.emb.weight.is_meta
    with align_module_device(net.emb):
        assert torch.equal(net.emb.weight, values)
    assert net.emb.weight.is_meta
    with pytest.raises(KeyError), align_module_device(net.emb, CPU):
        raise KeyError
    assert net.emb.weight.is_meta


def test_buffers_are_offloaded_when_asked() -> None:
    net, x = Net().eval(), torch.randn(3, 4)
    before = net(x)
    accelerate.cpu_offload(net, CPU, offload_buffers=True)
    assert all(buffer.is_meta for buffer in net.buffers())
    assert torch.equal(net(x), before)
    remove_hook_from_submodules(net)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("preload", [None, ["Tied"]])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_tied_weights_stay_tied(tmp_path: Path, where: str, preload: list[str] | None) -> None:
    net, x = Tied().eval(), torch.randn(3, 4)
    before = net(x)
    if where == "memory":
        accelerate.cpu_offload(net, CPU, preload_module_classes=preload)
    else:
        accelerate.disk_offload(net, tmp_path, CPU, preload_module_classes=preload)
    assert net.emb.weight.is_meta and net.head.weight is net.emb.weight
    assert torch.equal(net(x), before)
    remove_hook_from_submodules(net)
    assert net.head.weight is net.emb.weight and not net.emb.weight.is_meta
    assert torch.equal(net(x), before)


def test_a_tied_weight_that_a_pickled_file_has_once(tmp_path: Path) -> None:
    net, x = Tied().eval(), torch.randn(3, 4)
    state = net.state_dict()
    del state["head.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with accelerate.init_empty_weights():
        spread = Tied().eval()
    spread.head.weight = spread.emb.weight
    accelerate.load_checkpoint_and_dispatch(spread, tmp_path, {"": "disk"}, offload_folder=tmp_path / "offload")
    assert torch.equal(spread(x), net(x))


class Indirect(nn.Module):
    """Uses a weight of a module that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.linear.weight)


def test_preloaded_classes_fetch_what_is_inside_them() -> None:
    net, x = nn.Sequential(Indirect(), nn.Linear(4, 4)), torch.randn(2, 4)
    before = net(x)
    accelerate.cpu_offload(net, CPU, preload_module_classes=["Indirect"])
    assert torch.equal(net(x), before)
    assert not hasattr(net[0].linear, "_hf_hook")


def test_hooks_on_blocks_with_one_device_or_several() -> None:
    x = torch.randn(2, 4)
    for device, offload in [(CPU, False), (CPU, True), ({"emb": CPU, "layers": CPU, "norm": CPU, "head": CPU}, False)]:
        net = Net().eval()
        before = net(x)
        attach_align_device_hook_on_blocks(net, device, offload=offload)
        assert torch.equal(net(x), before)
        assert net._hf_hook.io_same_device or net._hf_hook.hooks[-1].io_same_device
    net = Net().eval()
    offloads = {"emb": True, "layers": False, "norm": True, "head": True}
    attach_align_device_hook_on_blocks(net, dict.fromkeys(offloads, CPU), offload=offloads)
    assert [net.emb.weight.is_meta, net.layers[0].a.weight.is_meta, net.head.weight.is_meta] == [True, False, True]


def test_execution_device_hooks_keep_those_that_are_there() -> None:
    net, hook = Net(), Add(0)
    add_hook_to_module(net.emb, hook)
    attach_execution_device_hook(net, CPU, preload_module_classes=["Blk"])
    assert net.emb._hf_hook is hook
    assert hasattr(net.layers[0], "_hf_hook") and not hasattr(net.layers[0].a, "_hf_hook")


def test_keys_that_stay_where_they_are() -> None:
    seen = {}

    class Seen(nn.Module):
        def forward(self, moved: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
            seen.update(moved=moved.device.type, kept=kept.device.type)
            return moved

    net = add_hook_to_module(Seen(), AlignDevicesHook("meta", skip_keys="kept"))
    net(moved=torch.ones(1), kept=torch.ones(1))
    assert seen == {"moved": "meta", "kept": "cpu"}


def test_keys_of_outputs_that_stay_where_they_are() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"moved": x.new_ones(1), "kept": torch.ones(1, device="meta")}

    net = add_hook_to_module(Two(), AlignDevicesHook(CPU, io_same_device=True, skip_keys=["kept"]))
    found = net(torch.ones(1))
    assert (found["moved"].device.type, found["kept"].device.type) == ("cpu", "meta")
    there = add_hook_to_module(nn.Identity(), AlignDevicesHook("meta", io_same_device=False))
    assert there(torch.ones(1)).is_meta


def test_models_in_turn() -> None:
    first, hook_1 = accelerate.cpu_offload_with_hook(Net(), "cpu")
    second, hook_2 = accelerate.cpu_offload_with_hook(Net(), "cpu", prev_module_hook=hook_1)
    assert second(torch.randn(3, 4)).shape == (3, 4)
    assert isinstance(hook_2, UserCpuOffloadHook) and isinstance(second._hf_hook, CpuOffload)
    assert second._hf_hook.prev_module_hook is hook_1
    hook_2.offload()
    hook_2.remove()
    assert not hasattr(second, "_hf_hook")


def test_layers_in_a_small_format() -> None:
    net = Net().eval()
    attach_layerwise_casting_hooks(
        net, torch.float8_e4m3fn, torch.float32, skip_modules_pattern="head", skip_modules_classes=(nn.BatchNorm1d,)
    )
    kinds = {name: parameter.dtype for name, parameter in net.named_parameters()}
    assert kinds["emb.weight"] == kinds["layers.0.a.bias"] == torch.float8_e4m3fn
    assert kinds["head.weight"] == kinds["norm.weight"] == torch.float32
    assert net(torch.randn(3, 4)).dtype == torch.float32
    assert net.emb.weight.dtype == torch.float8_e4m3fn


def test_layers_inside_skipped_classes_keep_their_format() -> None:
    net = Net().eval()
    attach_layerwise_casting_hooks(net, torch.float8_e4m3fn, torch.float32, skip_modules_classes=(Blk,))
    small = {name for name, parameter in net.named_parameters() if parameter.dtype is torch.float8_e4m3fn}
    assert small == {"emb.weight", "emb.bias", "head.weight", "head.bias"}


def test_the_state_of_an_offloaded_model() -> None:
    net = Tied().eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    accelerate.cpu_offload(net, CPU, offload_buffers=True)
    whole = get_state_dict_offloaded_model(net)
    assert whole.keys() == state.keys() and all(torch.equal(whole[name], state[name]) for name in state)
    with torch.device("meta"), pytest.raises(RuntimeError, match="no hook that loads them"):
        get_state_dict_offloaded_model(Blk())


def test_a_loader_of_offloaded_weights_travels_without_its_open_files(tmp_path: Any) -> None:
    net = Net()
    accelerate.Accelerator(cpu=True).save_model(net, tmp_path)
    index = {"emb.bias": {"safetensors_file": str(tmp_path / "model.safetensors"), "dtype": "float16"}}
    weights = accelerate.utils.OffloadedWeightsLoader(index=index)
    assert weights["emb.bias"].dtype == torch.float16
    assert torch.equal(pickle.loads(pickle.dumps(weights))["emb.bias"], weights["emb.bias"])
    assert torch.equal(copy.deepcopy(weights)["emb.bias"], weights["emb.bias"])


# Without a device, on meta ---------------------------------------------------------------------------------------------

META = torch.device("meta")


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("place", ["meta", META])
@pytest.mark.parametrize("how", ["memory", "disk", "map", "attached", "blocks", "tied", "preload"])
def test_what_moves_to_a_device_moves_to_meta(tmp_path: Path, how: str, place: Any, buffers: bool) -> None:
    net = (Tied() if how == "tied" else Net()).eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    parts = [name for name, _ in net.named_children()]
    if how in ("memory", "tied"):
        accelerate.cpu_offload(net, place, offload_buffers=buffers)
    elif how == "preload":
        accelerate.cpu_offload(net, place, offload_buffers=buffers, preload_module_classes=["Blk"])
    elif how == "disk":
        accelerate.disk_offload(net, tmp_path, place, offload_buffers=buffers)
    elif how == "map":
        where = {name: "disk" if name == "layers" else "cpu" for name in parts}
        accelerate.dispatch_model(net, where, main_device=place, offload_dir=tmp_path, offload_buffers=buffers)
    elif how == "attached":
        attach_align_device_hook(net, place, offload=True, weights_map=dict(state), offload_buffers=buffers)
    else:
        offload = {name: name != "head" for name in parts}
        attach_align_device_hook_on_blocks(
            net, dict.fromkeys(parts, place), offload=offload, weights_map=dict(state), offload_buffers=buffers
        )
    for grad in (torch.enable_grad, torch.inference_mode):
        with grad():
            assert net(torch.zeros(3, 4, device="meta")).is_meta
    if how == "attached":  # nothing is around the whole: inputs are moved all the same
        assert net(torch.zeros(3, 4)).is_meta
    offloaded = [name for name, _ in net.named_parameters() if how != "blocks" or not name.startswith("head")]
    assert all(net.get_parameter(name).is_meta for name in offloaded)
    seen = {name: value for name, value in fill_offloaded(net, net.state_dict()).items() if name in offloaded}
    assert all(torch.equal(value, state[name]) for name, value in seen.items())


def test_an_execution_device_has_one_form() -> None:
    hook = AlignDevicesHook("cpu")
    assert hook.execution_device == CPU
    hook.execution_device = "meta"
    assert hook.execution_device == META and hook.device == META


# Moving the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cpu_offload", "dispatch"])
@pytest.mark.parametrize(
    "move", [lambda m: m.to("meta"), lambda m: m.to(device=CPU), lambda m: m.cuda(), lambda m: m.cpu()]
)
def test_an_offloaded_model_cannot_be_moved(tmp_path: Path, how: str, move: Any) -> None:
    net, x = Net().eval(), torch.randn(3, 4)
    before = net(x)
    if how == "dispatch":
        accelerate.dispatch_model(net, {"": "disk"}, offload_dir=tmp_path)
    else:
        accelerate.cpu_offload(net, CPU)
    for one in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with pytest.raises(RuntimeError, match=r"Net has parts that are offloaded .*remove_hook_from_submodules"):
            move(one)
        assert torch.equal(one(x), before)
    assert net.to(torch.float64)(x.double()).dtype == torch.float64  # that is no move
    remove_hook_from_submodules(net)
    assert net.to("meta").emb.weight.is_meta and not {"to", "cuda", "cpu"} & vars(net).keys()


def test_a_spread_model_is_moved_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    net = accelerate.dispatch_model(Net(), {"": "cpu"}, force_hooks=True)
    net.to("cpu")
    assert "remove_hook_from_submodules" in caplog.text


def test_the_root_names_the_device_where_parts_run(tmp_path: Path) -> None:
    net = accelerate.dispatch_model(
        Net().eval(), dict.fromkeys(dict(Net().named_children()), "disk"), offload_dir=tmp_path
    )
    assert net._hf_hook.execution_device == CPU
    net = accelerate.dispatch_model(Net().eval(), {"": "cpu"}, main_device="meta", force_hooks=True)
    assert net._hf_hook.execution_device == META
