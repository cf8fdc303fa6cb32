"""Weights from files: every layout is found, what is wrong is told at once before anything changed, maps are kept to."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import accelerate
from accelerate.hooks import get_state_dict_offloaded_model
from accelerate.offload.checkpoints import WeightsError
from accelerate.utils import load_offloaded_weights, load_state_dict, offload_state_dict
from tests.helpers.nets import Net, Tied

load = accelerate.load_checkpoint_in_model


def saved(folder: Path, net: nn.Module, safe: bool = True, size: str = "1KB") -> Path:
    accelerate.Accelerator(cpu=True).save_model(net, folder, max_shard_size=size, safe_serialization=safe)
    return folder


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["1KB", "1GB"])
@pytest.mark.parametrize("empty", [True, False])
def test_files_shards_indexes_and_folders(tmp_path: Path, safe: bool, size: str, empty: bool) -> None:
    net = Net()
    saved(tmp_path, net, safe, size)
    (index,) = list(tmp_path.glob("*index.json")) or list(tmp_path.iterdir())
    for named in (tmp_path, str(index)):
        if empty:
            with accelerate.init_empty_weights():
                other = Net()
        else:
            other = Net()
        weight = other.emb.weight
        load(other, named, strict=True)
        assert same(other, net)
        assert empty or other.emb.weight is weight  # an optimizer that holds it goes on working


def test_an_index_as_the_guide_writes_it(tmp_path: Path) -> None:
    net = Net()
    halves: dict[str, dict[str, torch.Tensor]] = {"first_state_dict.bin": {}, "second_state_dict.bin": {}}
    for number, (name, value) in enumerate(net.state_dict().items()):
        halves["first_state_dict.bin" if number % 2 else "second_state_dict.bin"][name] = value
    for file, half in halves.items():
        torch.save(half, tmp_path / file)
    (tmp_path / "index.json").write_text(json.dumps({name: file for file, half in halves.items() for name in half}))
    other = Net()
    load(other, tmp_path)
    assert same(other, net)


def test_a_pickled_file_of_old(tmp_path: Path) -> None:
    net, other = Net(), Net()
    torch.save(net.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    load(other, tmp_path / "old.pt")
    assert same(other, net)


def lose_a_shard(folder: Path) -> None:
    (folder / "model-00003-of-00007.safetensors").unlink()


def cut_a_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00007.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def misplace_a_name(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["emb.weight"] = "model-00007-of-00007.safetensors"
    path.write_text(json.dumps(index))


def another_shape(folder: Path) -> None:
    from safetensors import safe_open

    path = next(p for p in folder.glob("*.safetensors") if "head.weight" in load_state_dict(p))
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    state["head.weight"] = state["head.weight"].T.contiguous()
    save_file(state, path)


DAMAGES = {
    lose_a_shard: r"model-00003-of-00007\.safetensors does not exist",
    cut_a_shard: r"model-00002-of-00007\.safetensors is damaged or truncated",
    misplace_a_name: r"emb\.weight is not in model-00007-of-00007\.safetensors, where the index lists it",
    another_shape: r"head\.weight has shape \(10, 4\) in .*, and \(4, 10\) in the model",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("strict", [True, False])
def test_damage_is_told_before_anything_changed(tmp_path: Path, damage: Callable[[Path], None], strict: bool) -> None:
    saved(tmp_path, Net())
    damage(tmp_path)
    other = Net()
    before = copy.deepcopy(other)
    with pytest.raises(WeightsError, match=DAMAGES[damage]):
        load(other, tmp_path, strict=strict)
    assert same(other, before)


def test_all_damages_are_told_together(tmp_path: Path) -> None:
    saved(tmp_path, Net())
    another_shape(tmp_path)
    cut_a_shard(tmp_path)
    lose_a_shard(tmp_path)
    with pytest.raises(WeightsError) as caught:
        load(Net(), tmp_path)
    assert len(caught.value.problems) == 3
    assert isinstance(caught.value, ValueError)


def test_names_too_few_or_too_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    state = {name: value for name, value in net.state_dict().items() if name != "emb.bias"}
    save_file({**state, "other": torch.zeros(1)}, tmp_path / "model.safetensors")
    other = Net()
    bias = other.emb.bias.detach().clone()
    with pytest.raises(WeightsError, match=r"(?s)emb\.bias is missing.*other is in the files, but not in the model"):
        load(other, tmp_path, strict=True)
    load(other, tmp_path)
    assert "emb.bias is missing; other is in the files" in caplog.text
    assert torch.equal(other.emb.bias, bias) and torch.equal(other.head.weight, net.head.weight)


def test_a_file_of_another_model_is_refused_as_such(tmp_path: Path) -> None:
    save_file({"module.emb.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"none of its names is in the model: it has 'module.emb.weight'"):
        load(Net(), tmp_path)


class Bomb:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_code_in_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"emb.weight": Bomb()}, protocol=2))
    with pytest.raises(WeightsError, match="could run code"):
        load(Net(), tmp_path)
    assert capsys.readouterr().out == ""


def test_tied_weights_need_one_name_in_the_file(tmp_path: Path) -> None:
    net = Tied()
    saved(tmp_path, net)
    with accelerate.init_empty_weights():
        other = Tied()
    load(other, tmp_path, strict=True)
    assert other.head.weight is other.emb.weight and same(other, net)


def test_formats(tmp_path: Path) -> None:
    saved(tmp_path, Net())
    with accelerate.init_empty_weights():
        other = Net()
    load(other, tmp_path, dtype="bfloat16", keep_in_fp32_modules=["head"])
    assert other.emb.weight.dtype == torch.bfloat16 and other.head.weight.dtype == torch.float32
    assert other.norm.num_batches_tracked.dtype == torch.int64
    offloaded = Net()
    where = {"emb": "cpu", "layers": "disk", "norm": "cpu", "head": "cpu"}
    accelerate.load_checkpoint_and_dispatch(offloaded, tmp_path, device_map=where, dtype=torch.bfloat16)
    assert offloaded(torch.randn(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("safe", [True, False])
def test_weights_on_disk_are_read_where_they_are(tmp_path: Path, safe: bool) -> None:
    net, x = Net().eval(), torch.randn(3, 4)
    checkpoint, folder = saved(tmp_path / "model", net, safe), tmp_path / "offloaded"
    with accelerate.init_empty_weights():
        other = Net().eval()
    where = {"emb": "cpu", "layers.0": "disk", "layers.1": "cpu", "layers.2": "disk", "norm": "disk", "head": "disk"}
    accelerate.load_checkpoint_and_dispatch(other, checkpoint, device_map=where, offload_folder=folder)
    assert torch.equal(other(x), net(x))
    assert other.hf_device_map == where
    # Nothing is written anew of what can be read in parts.
    assert bool(list(folder.glob("*.dat"))) is not safe
    accelerate.Accelerator(cpu=True).save_model(other, tmp_path / "again")
    again = Net()
    load(again, tmp_path / "again", strict=True)
    assert same(again, net)


@pytest.mark.parametrize("kind", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_maps_that_are_made(tmp_path: Path, kind: str) -> None:
    net, x = Net().eval(), torch.randn(3, 4)
    saved(tmp_path, net)
    with accelerate.init_empty_weights():
        other = Net().eval()
    accelerate.load_checkpoint_and_dispatch(other, tmp_path, device_map=kind, max_memory={"cpu": 3000})
    assert set(other.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(other(x), net(x))


def test_a_map_of_no_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'auto', 'balanced'"):
        accelerate.load_checkpoint_and_dispatch(Net(), saved(tmp_path, Net()), device_map="fastest")
    with pytest.raises(ValueError, match="norm"):
        accelerate.load_checkpoint_and_dispatch(Net(), saved(tmp_path, Net()), device_map={"emb": "cpu"})


def test_a_folder_of_offloaded_weights(tmp_path: Path) -> None:
    net, other = Net(), Net()
    state = {**net.state_dict(), "half": torch.randn(3).bfloat16(), "none": torch.zeros(0, 2), "one": torch.tensor(2.5)}
    offload_state_dict(tmp_path, state)
    weights = accelerate.utils.OffloadedWeightsLoader(save_folder=tmp_path)
    assert list(weights) == list(state) and len(weights) == len(state)
    for name, value in state.items():
        assert torch.equal(weights[name], value) and weights[name].dtype == value.dtype
    index = {name: info for name, info in weights.index.items() if name in net.state_dict()}
    load_offloaded_weights(other, index, tmp_path)
    assert same(other, net)
    inside = accelerate.utils.PrefixedDataset(weights, "layers.0.a.")
    assert sorted(inside) == ["bias", "weight"] and len(inside) == 2
    assert torch.equal(inside["bias"], net.layers[0].a.bias)
    with pytest.raises(ValueError, match="state_dict"):
        accelerate.utils.OffloadedWeightsLoader()


class Pretrained(nn.Sequential):
    """A model that loads itself, as those of transformers do."""

    def from_pretrained(self) -> None:
        """Is there."""


def test_another_layout_in_the_files_is_named_with_what_converts_it(tmp_path: Path) -> None:
    save_file({"0.weight": torch.ones(4, 4), "0.part.bias": torch.ones(4)}, tmp_path / "model.safetensors")
    with accelerate.init_empty_weights():
        empty = Pretrained(nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"(?s)nothing was changed.*0\.bias are not.*0\.part\.bias are not.*from_pretrained"
    ):
        accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"})
    assert empty[0].weight.is_meta


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_weights_left_on_disk_have_the_dtype_that_was_asked_for(
    tmp_path: Path, safe: bool, dtype: torch.dtype | None
) -> None:
    weight = torch.rand(4, 4, dtype=torch.bfloat16)
    (tmp_path / "saved").mkdir()
    if safe:
        save_file({"weight": weight}, tmp_path / "saved" / "model.safetensors")
    else:
        torch.save({"weight": weight}, tmp_path / "saved" / "pytorch_model.bin")
    with accelerate.init_empty_weights():
        model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    accelerate.load_checkpoint_and_dispatch(
        model, tmp_path / "saved", {"": "disk"}, offload_folder=tmp_path / "offload", dtype=dtype
    )
    wanted = dtype or torch.bfloat16
    found = get_state_dict_offloaded_model(model)["weight"]
    assert found.dtype is wanted and torch.equal(found, weight.to(wanted))
    assert model.weight.dtype is wanted and model(torch.ones(1, 4, dtype=wanted)).dtype is wanted


def test_transformers_spreads_a_model_within_a_limit_in_words(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'accelerate[clients]'")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 100,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)).eval()
    model.save_pretrained(tmp_path)
    spread = transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "1GB"})
    x = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(spread(x).logits, model(x).logits)


def test_an_index_keeps_what_was_there(tmp_path: Path) -> None:
    offload_state_dict(tmp_path, {"first": torch.ones(1)})
    offload_state_dict(tmp_path, {"second": torch.zeros(2)})
    offload_state_dict(tmp_path, {"first": torch.full((3,), 7.0)})
    assert json.loads((tmp_path / "index.json").read_text()) == {
        "first": {"dtype": "float32", "shape": [3]},
        "second": {"dtype": "float32", "shape": [2]},
    }
