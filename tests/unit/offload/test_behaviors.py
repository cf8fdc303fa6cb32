"""The observed behaviors of sizes, device maps, hooks and offloading; where ours decides otherwise, the reason is here."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import accelerate
from accelerate import big_modeling, hooks
from accelerate.utils import CustomDtype, modeling
from tests.helpers.behaviors import DATA, encode
from tests.helpers.nets import Net, Tied

CASES: list[dict[str, Any]] = json.loads((DATA / "big_modeling_behaviors.json").read_text())


def cases(*names: str) -> list[Any]:
    found = [case for case in CASES if case["name"] in names]
    assert found
    return [pytest.param(case["input"], case["call"], case["output"], id=f"{i}") for i, case in enumerate(found)]


def observed(name: str) -> Any:
    (case,) = [case for case in CASES if case["name"] == name]
    return case["output"]["tuple"] if isinstance(case["output"], dict) and "tuple" in case["output"] else case["output"]


def raised(call: Callable[[], Any]) -> Any:
    try:
        return encode(call())
    except Exception as error:
        return {"raises": type(error).__name__}


def expected(output: Any) -> Any:
    return {"raises": output["raises"]} if isinstance(output, dict) and "raises" in output else output


VALUES: dict[str, Any] = {
    f"torch.{name}": getattr(torch, name) for name in ("float16", "bfloat16", "bool", "float8_e4m3fn")
}
VALUES |= {f"CustomDtype.{member.name}": member for member in CustomDtype} | {"x": "x"}


@pytest.mark.parametrize(("given", "call", "output"), cases("dtype_byte_size"))
def test_dtype_byte_size(given: Any, call: str, output: Any) -> None:
    value = VALUES[call.removeprefix("dtype_byte_size(").removesuffix(")")]
    assert raised(functools.partial(modeling.dtype_byte_size, value)) == expected(output)


@pytest.mark.parametrize(("given", "call", "output"), cases("convert_file_size_to_int"))
def test_file_sizes(given: Any, call: str, output: Any) -> None:
    text = call.removeprefix("convert_file_size_to_int(").removesuffix(")")
    if text == "'3TB'":  # decided: terabytes are a unit like the others
        output = 3 * 10**12
    value = text.strip("'") if text.startswith("'") else int(text)
    assert raised(functools.partial(modeling.convert_file_size_to_int, value)) == expected(output)


def test_module_sizes() -> None:
    net = Net()
    assert modeling.compute_module_sizes(net) == observed("compute_module_sizes")
    assert modeling.compute_module_sizes(net, buffers_only=True) == observed("compute_module_sizes.buffers_only")
    assert modeling.compute_module_total_buffer_size(net) == observed("compute_module_total_buffer_size")
    # Decided: a module's buffers come with its parameters, where the observed order has all buffers last.
    assert sorted(modeling.get_module_leaves(modeling.compute_module_sizes(net))) == sorted(
        observed("get_module_leaves")
    )
    special = {"head.weight": torch.float64}
    assert [
        modeling.compute_module_sizes(net, dtype=torch.float16)[""],
        modeling.compute_module_sizes(net, dtype="float16")[""],
        modeling.compute_module_sizes(net, special_dtypes=special)["head.weight"],
        modeling.compute_module_sizes(net, dtype=torch.float64)["head.weight"],
    ] == observed("compute_module_sizes.fp16")


def test_tensors_by_name() -> None:
    net = Net()
    names = [
        [name for name, _ in modeling.named_module_tensors(net.norm)],
        [name for name, _ in modeling.named_module_tensors(net.norm, include_buffers=False)],
        [name for name, _ in modeling.named_module_tensors(net, recurse=True, remove_non_persistent=True)][:4],
    ]
    assert names == observed("named_module_tensors")


def test_tied_parameters() -> None:
    assert [modeling.find_tied_parameters(Tied()), modeling.find_tied_parameters(Net())] == observed(
        "find_tied_parameters"
    )


# What ours decides otherwise, by max_memory and classes that are not split: weights are read ahead, so that device 0 keeps
# room for two modules where the observed map keeps room for one.
OURS: dict[tuple[str, str], str] = {
    # The CPU needs no room of its own for a layer that is on its way from the disk to device 0: it is filled up.
    ("{0: 2200, 'cpu': 2200, 'disk': 100000}", ""): """
        emb 0, layers.0 cpu, layers.1 disk, layers.2 disk, norm disk, head disk""",
    ("{0: 2200, 1: 2200, 'cpu': 10000}", ""): """
        emb 0, layers.0 1, layers.1 cpu, layers.2 cpu, norm cpu, head cpu""",
    # Everything fits on the two devices, so that nothing is offloaded and no room kept for it.
    ("{0: '3KB', 1: '3KB', 'cpu': '1MB'}", ""): """
        emb 0, layers.0 0, layers.1.a 0, layers.1.b 1, layers.2 1, norm 1, head 1""",
    ("{0: 2500, 1: 2500, 'cpu': 100000}", "tied"): """
        emb 0, head 0, layers.0 1, layers.1 cpu, layers.2 cpu, norm cpu""",
    # As in the first.
    ("{0: 2500, 'cpu': 2500, 'disk': 100000}", "tied"): """
        emb 0, head 0, layers.0 cpu, layers.1 disk, layers.2 disk, norm disk""",
    ("{0: 4000, 'cpu': 100000}", ""): """
        emb 0, layers.0 0, layers.1 cpu, layers.2 cpu, norm cpu, head cpu""",
}


def named_places(text: str) -> dict[str, Any]:
    words = (entry.split() for entry in text.split(","))
    return {name: int(device) if device.isdigit() else device for name, device in words}


def arguments(given: dict[str, str]) -> dict[str, Any]:
    plain = {key: text for key, text in given.items() if key != "net"}
    special: dict[str, Any] = {"Blk": "Blk", "torch.float16": torch.float16}
    return {key: special[text] if text in special else ast.literal_eval(text) for key, text in plain.items()}


@pytest.mark.parametrize(("given", "call", "output"), cases("infer_auto_device_map", "infer_auto_device_map.tied"))
def test_device_maps(given: Any, call: str, output: Any) -> None:
    tied = "tied" in call
    net = Tied() if tied else Net()
    found = modeling.infer_auto_device_map(net, **arguments(given))
    kind = "tied" if tied else given.get("no_split_module_classes", "").strip("[]'")
    ours = OURS.get((given["max_memory"], kind))
    assert found == (output if ours is None else named_places(ours))


@pytest.mark.parametrize(("given", "call", "output"), cases("get_balanced_memory"))
def test_balanced_memory(given: Any, call: str, output: Any) -> None:
    net, options = Net(), arguments(given)
    found = modeling.get_balanced_memory(net, **options)
    theirs = {int(key) if key.isdigit() else key: value for key, value in output.items()}
    # Decided: the smallest share with which everything fits in order, where the observed one adds a margin to the mean. So
    # no limit is larger, the last device keeps its own, and a map made with it still needs no other device.
    assert found.keys() == theirs.keys()
    assert all(found[device] <= theirs[device] for device in found)
    devices = [device for device in found if device != "cpu"]
    if devices:
        assert found[devices[-1]] == theirs[devices[-1]]
        options.pop("max_memory"), options.pop("low_zero", None)
        used = modeling.infer_auto_device_map(net, max_memory=found, **options).values()
        assert set(used) <= set(devices)
    else:
        assert found == theirs


def test_max_memory() -> None:
    limits = modeling.get_max_memory({"cpu": "1GB", 0: "2GiB"})
    assert [["cpu"], {str(key): value for key, value in limits.items()}] == observed("get_max_memory.keys_cpu_only")
    if not torch.cuda.is_available():
        assert list(modeling.get_max_memory()) == ["cpu"]
    given = {"cpu": "1GB", 0: "2GiB"}  # transformers compares what it passed with what it gets
    assert modeling.get_max_memory(given) == given == {"cpu": 10**9, 0: 2 << 30}
    with pytest.raises(ValueError, match="abc"):
        modeling.get_max_memory({0: "abc"})


def test_checks_of_a_map() -> None:
    given: Any = {"a.x": 0, "a.y": 0, "b": 1, "c.p": 1, "c.q": 2}
    assert modeling.clean_device_map(given) == observed("clean_device_map")
    assert modeling.check_device_map(Net(), {"": 0}) is observed("check_device_map.ok")
    with pytest.raises(ValueError, match=r"norm\.weight.*head\.bias"):
        modeling.check_device_map(Net(), {"emb": 0, "layers": 0})


def test_a_tensor_moved() -> None:
    net = Net()
    move = modeling.set_module_tensor_to_device
    seen: list[Any] = []
    move(net, "emb.weight", "meta")
    seen.append(net.emb.weight.device.type)
    move(net, "emb.weight", "cpu", value=torch.ones(10, 4))
    seen += [net.emb.weight.device.type, net.emb.weight.sum().item(), type(net.emb.weight).__name__]
    move(net, "emb.weight", "cpu", value=torch.ones(10, 4, dtype=torch.float16))
    seen.append(str(net.emb.weight.dtype))
    move(net, "emb.weight", "cpu", value=torch.ones(10, 4), dtype=torch.float16)
    seen.append(str(net.emb.weight.dtype))
    assert seen == observed("set_module_tensor_to_device")
    with pytest.raises(AttributeError, match="nope"):
        move(net, "nope.weight", "cpu")


def test_empty_weights() -> None:
    with big_modeling.init_empty_weights():
        norm = nn.BatchNorm1d(3)
    seen: dict[str, Any] = {"default": [norm.weight.device.type, norm.running_mean.device.type]}
    seen["requires_grad"] = norm.weight.requires_grad
    with big_modeling.init_empty_weights(include_buffers=True):
        norm = nn.BatchNorm1d(3)
        made = torch.zeros(2)
    seen["include_buffers"] = [t.device.type for t in (norm.weight, norm.running_mean, made)]
    with big_modeling.init_on_device(torch.device("cpu")):
        seen["init_on_device cpu"] = nn.Linear(2, 2).weight.device.type
    assert seen == observed("init_empty_weights")


def test_a_hook_leaves_gradients_on() -> None:
    assert hooks.ModelHook.no_grad is observed("ModelHook.no_grad")


def test_every_observed_behavior_is_compared() -> None:
    source = Path(__file__).read_text()
    assert [case["name"] for case in CASES if case["name"].split(".")[0] not in source] == []


def hooked(net: nn.Module) -> dict[str, str]:
    return {name: type(part._hf_hook).__name__ for name, part in net.named_modules() if hasattr(part, "_hf_hook")}


def test_dispatch_with_forced_hooks() -> None:
    net = accelerate.dispatch_model(Net(), {"": "cpu"}, force_hooks=True)
    assert {"hf_device_map": net.hf_device_map, "hook": hooked(net)[""]} == observed("dispatch_model.force_hooks")


def test_dispatch_of_everything_to_disk(tmp_path: Path) -> None:
    # Decided: the observed one refuses it, although load_checkpoint_and_dispatch takes such a map.
    for where in ({"": "disk"}, {name: "disk" for name, _ in Net().named_children()}):
        net, x = Net().eval(), torch.randn(3, 4)
        before = net(x)
        accelerate.dispatch_model(net, where, offload_dir=tmp_path / str(len(where)))
        assert all(parameter.is_meta for parameter in net.parameters()) and torch.equal(net(x), before)


def test_keys_of_a_map_that_name_nothing(caplog: pytest.LogCaptureFixture) -> None:
    modeling.check_device_map(Net(), {"": "cpu", "layer": 0, "layers.1.a": 0, "head.weight": 0})
    assert [record.getMessage() for record in caplog.records] == [
        "the device_map has an entry for 'layer', but Net has no such part; the nearest name is 'layers'."
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_map_for_a_device_that_is_not_there(tmp_path: Path) -> None:
    net = Net()
    accelerate.Accelerator(cpu=True).save_model(net, tmp_path)
    for call in (
        accelerate.dispatch_model,
        functools.partial(accelerate.load_checkpoint_and_dispatch, checkpoint=tmp_path),
    ):
        for where in ({"": 0}, {"": "cuda:0"}, {**{name: "cpu" for name, _ in net.named_children()}, "head": 0}):
            with pytest.raises(RuntimeError, match=r"device_map assigns .* to .*this process sees no"):
                call(net, device_map=where)
    assert all(parameter.device.type == "cpu" for parameter in net.parameters()) and not hooked(net)


@pytest.mark.parametrize("name", ["cpu_offload", "disk_offload"])
def test_offloading_everything(name: str, tmp_path: Path) -> None:
    net, x = Net().eval(), torch.randn(5, 4)
    before = net(x)
    if name == "cpu_offload":
        accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(net, tmp_path, execution_device=torch.device("cpu"))
    seen: dict[str, Any] = {
        "devices": sorted({parameter.device.type for parameter in net.parameters()}),
        "same": torch.equal(net(x), before),
    }
    if name == "disk_offload":
        seen["files"] = sorted(path.name for path in tmp_path.glob("*.dat") if path.name.startswith(("emb", "head")))
        assert seen == observed(name)
        return
    seen["buffers"] = sorted({buffer.device.type for buffer in net.buffers()})
    seen["hooks"], seen["_old_forward"] = hooked(net), hasattr(net.emb, "_old_forward")
    hooks.remove_hook_from_submodules(net)
    left = sorted({parameter.device.type for parameter in net.parameters()})
    seen["after_remove"] = [hasattr(net, "_hf_hook"), hasattr(net.emb, "_old_forward"), left]
    assert seen == observed(name)
    assert torch.equal(net(x), before)


def test_offloading_by_hand() -> None:
    net, hook = accelerate.cpu_offload_with_hook(Net(), execution_device="cpu")
    seen: dict[str, Any] = {
        "hook type": type(hook).__name__,
        "attrs": sorted(vars(hook)),
        "module hook": hooked(net)[""],
    }
    hook.remove()
    seen["after remove"] = hasattr(net, "_hf_hook")
    assert seen == observed("cpu_offload_with_hook")


def test_saved_and_loaded(tmp_path: Path) -> None:
    net = Net()
    accelerate.Accelerator(cpu=True).save_model(net, tmp_path, max_shard_size="1KB")
    other, empty = Net(), Net()
    result = accelerate.load_checkpoint_in_model(other, tmp_path)
    with accelerate.init_empty_weights():
        empty = Net()
    dispatched = accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"})
    assert {
        "files": sorted(path.name for path in tmp_path.iterdir()),
        "loaded_nonzero": bool(other.emb.weight.abs().sum() > 0),
        "return": result,
        "m2.hf_device_map": dispatched.hf_device_map,
    } == observed("save_model+load_checkpoint_in_model")
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
        assert torch.equal(dispatched.state_dict()[name], value)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    load = accelerate.load_checkpoint_in_model
    assert raised(lambda: load(Net(), tmp_path)) == expected(observed("load_checkpoint_in_model.not_found"))
    missing = expected(observed("load_checkpoint_in_model.bad_path"))
    assert raised(lambda: load(Net(), "/does/not/exist")) == missing
    accelerate.Accelerator(cpu=True).save_model(Net(), tmp_path)
    no_folder = expected(observed("load_checkpoint_in_model.disk_no_folder"))
    assert raised(lambda: load(Net(), tmp_path, device_map={"": "disk"})) == no_folder


def test_empty_weights_keep_what_is_trained() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trained = nn.Parameter(torch.ones(2))
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
            self.packed = nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)

    with accelerate.init_empty_weights():
        model = Parts()
    assert {name: (p.is_meta, p.requires_grad, p.dtype) for name, p in model.named_parameters()} == {
        "trained": (True, True, torch.float32),
        "frozen": (True, False, torch.float32),
        "packed": (True, False, torch.uint8),
    }
