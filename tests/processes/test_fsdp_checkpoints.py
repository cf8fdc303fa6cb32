"""Sharded checkpoints: saved with one strategy and world size, loaded with another, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from accelerate import Accelerator
from accelerate.checkpointing import LoadError, SaveError
from accelerate.state import AcceleratorState
from tests.helpers.llama import groups
from tests.helpers.releases import FSDP2_ON_CPU, FSDP_VERSIONS
from tests.helpers.sharding import Block, Tiny, plugin

SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
Kind = tuple[int | None, dict[str, Any]]
KINDS: dict[str, Kind] = {
    "whole": (None, {}),
    "1 sharded": (1, {"use_orig_params": True, "state_dict_type": SHARDED}),
    "1 full": (1, {"use_orig_params": True, "state_dict_type": FULL}),
    "2 sharded": (2, {"state_dict_type": SHARDED}),
    "2 full": (2, {"state_dict_type": FULL}),
}
RUN = [name for name, (version, _) in KINDS.items() if version in (None, *FSDP_VERSIONS)]
SHARDED_RUNS = ["1 sharded", pytest.param("2 sharded", marks=FSDP2_ON_CPU)]


def _accelerator(kind: Kind, **more: Any) -> Accelerator:
    AcceleratorState._reset_state()
    torch.set_num_threads(1)
    version, fields = kind
    return Accelerator(cpu=True, fsdp_plugin=None if version is None else plugin(version, **fields), **more)


def _run(kind: Kind, steps: int, seed: int = 0, **more: Any) -> tuple[Accelerator, Any, Any]:
    """Trains the small model: tied embeddings, frozen parameters, two groups, sizes that no world size divides."""
    accelerator = _accelerator(kind, **more)
    torch.manual_seed(seed)
    model = Tiny()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    _train(accelerator, model, optimizer, steps)
    return accelerator, model, optimizer


def _train(accelerator: Accelerator, model: nn.Module, optimizer: Any, steps: int) -> None:
    for number in range(steps):
        tokens = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(number))
        accelerator.backward(model(tokens).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()


def _state(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Returns weights and optimizer states by FQN, as torch's own state-dict API returns them."""
    options = StateDictOptions(full_state_dict=True)
    bare = accelerator.unwrap_model(model) if accelerator.distributed_type != "FSDP" else model
    return {
        "weights": {name: value.clone() for name, value in get_model_state_dict(bare, options=options).items()},
        "optimizer": get_optimizer_state_dict(bare, optimizer.optimizer, options=options),
    }


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        names = {str(name): name for name in (*one, *other)}
        found = (_differences(one.get(name), other.get(name), f"{path}/{key}") for key, name in names.items())
        return [difference for differences in found for difference in differences]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in _differences(*pair, f"{path}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = one == other
    return [] if same else [f"{path}: {one} != {other}"[:200]]


# Saved on N, loaded on M -------------------------------------------------------------------------------------------------


def _save_all(folder: str) -> list[str]:
    """Saves a run of each kind, and the state that torch's API returns for it."""
    there = []
    for number, name in enumerate(RUN):
        accelerator, model, optimizer = _run(KINDS[name], steps=3)
        size = accelerator.num_processes
        target = f"{folder}/{name} on {size}"
        accelerator.save_state(target, asynchronous=number % 2 == 0)
        _train(accelerator, model, optimizer, 0)
        state = _state(accelerator, model, optimizer)
        accelerator.wait_for_checkpoint()
        if accelerator.is_main_process:
            torch.save(state, f"{target}.torch")
        there.append(target)
    return there


def _load_all(folders: list[str]) -> list[str]:
    """Loads each checkpoint into a run with another state, of all kinds in turn; those of two ranks into every kind."""
    found = []
    for index, folder in enumerate(folders):
        expected = torch.load(f"{folder}.torch", weights_only=True)
        on_two = dist.get_world_size() == 2 and folder.endswith("on 2")
        for name in RUN if on_two else [RUN[(index + index // len(RUN)) % len(RUN)]]:
            accelerator, model, optimizer = _run(KINDS[name], steps=index % 2, seed=1)
            accelerator.load_state(folder)
            differences = _differences(expected, _state(accelerator, model, optimizer))
            found += [f"{Path(folder).name} into {name} on {accelerator.num_processes}: {text}" for text in differences]
    return found


@pytest.mark.slow
def test_reshard_on_load_across_world_sizes_and_strategies(run_ranks: Any, tmp_path: Path) -> None:
    folders = [folder for ranks in (1, 2, 3) for folder in run_ranks(ranks, _save_all, str(tmp_path))[0]]
    assert len(folders) == 3 * len(RUN)
    for ranks in (1, 2, 3):
        for differences in run_ranks(ranks, _load_all, folders):
            assert differences == []


# Refusals ----------------------------------------------------------------------------------------------------------------


def _said(kind: type[Exception], act: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        act()
    dist.barrier()
    return str(caught.value)


def _damaged(folder: str, name: str) -> list[str]:
    """Returns the errors for damaged files, for another model, and for a save within an accumulation window."""
    accelerator, model, optimizer = _run(KINDS[name], steps=1, gradient_accumulation_steps=2)
    accelerator.save_state(folder)
    before = _state(accelerator, model, optimizer)
    said = []
    for file, damage in (
        ("optimizer_0/__1_0.distcp", _flip),
        ("pytorch_model_fsdp_0/__0_0.distcp", _cut),
        ("pytorch_model_fsdp_0/.metadata", Path.unlink),
    ):
        path = Path(folder, file)
        content = path.read_bytes()
        dist.barrier()
        if accelerator.is_main_process:
            damage(path)
        dist.barrier()
        said.append(_said(LoadError, lambda: accelerator.load_state(folder)))
        if accelerator.is_main_process:
            path.write_bytes(content)
    dist.barrier()
    with accelerator.accumulate(model):
        assert not accelerator.sync_gradients
        said.append(_said(SaveError, lambda: accelerator.save_state(folder)))
        said.append(_said(LoadError, lambda: accelerator.load_state(folder)))
    accelerator.gradient_state._set_sync_gradients(True)
    assert _differences(before, _state(accelerator, model, optimizer)) == []
    return said


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize("name", SHARDED_RUNS)
def test_damaged_files_are_named_on_every_rank(run_ranks: Any, tmp_path: Path, name: str) -> None:
    wanted = [
        "optimizer_0/__1_0.distcp: corrupt: its content differs from what was saved",
        "pytorch_model_fsdp_0/__0_0.distcp: corrupt: it has",
        "pytorch_model_fsdp_0/.metadata: missing",
        "save_state was called during gradient accumulation",
        "load_state was called during gradient accumulation",
    ]
    for said in run_ranks(2, _damaged, str(tmp_path / "it"), name):
        for message, expected in zip(said, wanted, strict=True):
            assert expected in message


class Other(nn.Module):
    """Variant of the small model: one layer missing, one wider, one added."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(6), Block(7)])
        self.more = nn.Linear(2, 2)


def _misfit(folder: str, names: list[str]) -> list[list[str]]:
    found = []
    for name in names:
        accelerator, *_ = _run(KINDS[name], steps=1)
        accelerator.save_state(folder)
        accelerator = _accelerator(KINDS[name])
        model = Other()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        before = _state(accelerator, model, optimizer)
        with pytest.raises(LoadError) as caught:
            accelerator.load_state(folder)
        assert _differences(before, _state(accelerator, model, optimizer)) == []
        report = accelerator.load_state(folder, strict=False)
        assert list(map(str, report.problems)) == list(map(str, caught.value.problems))
        weights = _state(accelerator, model, optimizer)["weights"]
        assert not torch.equal(weights["layers.0.up.weight"], before["weights"]["layers.0.up.weight"])
        found.append([str(problem) for problem in caught.value.problems])
    return found


def test_mismatches_are_listed(run_ranks: Any, tmp_path: Path) -> None:
    files = {
        "1 sharded": ("pytorch_model_fsdp_0", "optimizer_0"),
        "2 full": ("pytorch_model_fsdp.bin", "optimizer.bin"),
    }
    names = [name for name in files if name in RUN]
    for results in run_ranks(2, _misfit, str(tmp_path / "it"), names):
        for found, name in zip(results, names, strict=True):
            model, optimizer = files[name]
            told = "\n".join(found)
            assert f"{model}: missing: no 'more.weight' of shape [2, 2]" in told
            assert (
                f"{model}: extra: 'head.weight' of shape [11, 6]" in told
                or f"{model}: extra: 'embedding.weight'" in told
            )
            assert f"{model}: shape: 'layers.1.norm.weight' is of shape [6], and of shape [7]" in told
            assert f"{optimizer}: missing: no state of 'more.bias', a parameter of AdamW" in told


# Other runs ---------------------------------------------------------------------------------------------------------------

_FLAT: Kind = (1, {"use_orig_params": False, "state_dict_type": SHARDED})


def _several(kind: Kind, seed: int, steps: int) -> tuple[Accelerator, list[Any], list[Any]]:
    """Trains two models with an optimizer each, one with frozen parameters; bf16 with float32 master weights."""
    accelerator = _accelerator(kind, mixed_precision="bf16")
    torch.manual_seed(seed)
    models: list[Any] = [nn.Sequential(Block(5), Block(5)), nn.Sequential(Block(3))]
    models[0][1].requires_grad_(False)
    optimizers: list[Any] = [
        torch.optim.AdamW(models[0].parameters()),
        torch.optim.SGD(models[1].parameters(), momentum=0.9),
    ]
    models[0], models[1], *optimizers = accelerator.prepare(*models, *optimizers)
    for _ in range(steps):
        accelerator.backward(models[0](torch.ones(2, 5)).sum() + models[1](torch.ones(2, 3)).sum())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return accelerator, models, optimizers


def _several_there_and_back(folder: str) -> list[str]:
    found = []
    kinds = {"whole": KINDS["whole"], "flat": _FLAT, **{name: KINDS[name] for name in RUN if name.startswith("2")}}
    for name, kind in kinds.items():
        accelerator, models, optimizers = _several(kind, seed=0, steps=2)
        accelerator.save_state(f"{folder}/{name}")
        expected = [_state(accelerator, *pair) for pair in zip(models, optimizers, strict=True)]
        for other, into in kinds.items():
            accelerator, models, optimizers = _several(into, seed=1, steps=1)
            accelerator.load_state(f"{folder}/{name}")
            found += [
                f"{name} into {other}: {difference}"
                for state, pair in zip(expected, zip(models, optimizers, strict=True), strict=True)
                for difference in _differences(state, _state(accelerator, *pair))
            ]
    return found


def test_several_models_and_flat_parameters(run_ranks: Any, tmp_path: Path) -> None:
    assert run_ranks(2, _several_there_and_back, str(tmp_path)) == [[], []]
    sharded = tmp_path / ("2 sharded" if "2 sharded" in RUN else "flat")
    there = {path.relative_to(sharded).as_posix() for path in sharded.rglob("*.distcp")}
    folders = ("pytorch_model_fsdp_0", "pytorch_model_fsdp_1", "optimizer_0", "optimizer_1")
    assert there == {f"{folder}/__{rank}_0.distcp" for folder in folders for rank in range(2)}
    if "2 full" in RUN:
        there = {path.name for path in (tmp_path / "2 full").glob("*.bin")}
        assert there == {"pytorch_model_fsdp.bin", "pytorch_model_fsdp_1.bin", "optimizer.bin", "optimizer_1.bin"}


def _hooked(folder: str) -> list[Any]:
    accelerator, model, optimizer = _run(KINDS["2 sharded"], steps=1)
    seen: list[Any] = []

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        seen.append((models == [model], sorted(weights.pop())[0]))
        if accelerator.is_main_process:
            Path(output_dir, "mine.txt").write_text("mine")

    def load(models: list[Any], input_dir: str) -> None:
        models.pop()
        seen.append(Path(input_dir, "mine.txt").read_text())

    handles = accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)
    accelerator.save_state(folder)
    _train(accelerator, model, optimizer, 1)
    before = _state(accelerator, model, optimizer)
    accelerator.load_state(folder)
    after = _state(accelerator, model, optimizer)
    seen.append(_differences(before["weights"], after["weights"]))
    seen.append(bool(_differences(before["optimizer"], after["optimizer"])))
    for handle in handles:
        handle.remove()

    def fail(*_: Any) -> None:
        if not accelerator.is_main_process:
            raise OSError("a hook of one rank")

    accelerator.register_save_state_pre_hook(fail)
    seen.append("a hook of one rank" in _said(SaveError, lambda: accelerator.save_state(folder)))
    return seen


@FSDP2_ON_CPU
def test_hooks_remove_models(run_ranks: Any, tmp_path: Path) -> None:
    expected = [(True, "embedding.weight"), "mine", [], True, True]
    assert run_ranks(2, _hooked, str(tmp_path / "it")) == [expected] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"it"}
    assert not (tmp_path / "it" / "pytorch_model_fsdp_0").exists() and (tmp_path / "it" / "mine.txt").exists()


# What others read ---------------------------------------------------------------------------------------------------------


def _saved_for_others(folder: str, name: str) -> dict[str, torch.Tensor]:
    accelerator, model, _ = _run(KINDS[name], steps=1)
    accelerator.save_state(f"{folder}/{name}")
    accelerator.save_model(model, f"{folder}/{name} model")
    state = accelerator.get_state_dict(model)
    assert bool(state) == accelerator.is_main_process
    assert all(value.device.type == "cpu" and type(value) is torch.Tensor for value in state.values())
    return state


def _read_by_torch(folder: str) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp

    state = {"model": Tiny().state_dict()}
    dcp.load(state, checkpoint_id=folder)
    return state["model"]


@pytest.mark.parametrize("name", SHARDED_RUNS)
def test_all_readers_return_the_same_weights(run_ranks: Any, tmp_path: Path, name: str, capsys: Any) -> None:
    from safetensors.torch import load_file

    from accelerate.commands.accelerate_cli import main

    expected = run_ranks(2, _saved_for_others, str(tmp_path), name)[0]
    shards, merged = str(tmp_path / name / "pytorch_model_fsdp_0"), str(tmp_path / "merged")
    assert _differences(expected, run_ranks(1, _read_by_torch, shards)[0]) == []
    assert main(["checkpoint", "verify", str(tmp_path / name)]) == 0
    told = capsys.readouterr().out
    assert "pytorch_model_fsdp_0/__1_0.distcp  weights, shards of a process" in told and "whole" in told
    assert main(["merge-weights", shards, merged, "--remove_checkpoint_dir"]) in (None, 0)
    assert (
        _differences(expected, {"head.weight": expected["head.weight"], **load_file(f"{merged}/model.safetensors")})
        == []
    )
    saved = load_file(tmp_path / f"{name} model" / "model.safetensors")
    assert _differences({**expected, "head.weight": None}, {"head.weight": None, **saved}) == []
