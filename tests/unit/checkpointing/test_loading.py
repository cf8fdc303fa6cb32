"""A refused load leaves everything as it was, or lists what has changed: objects that raise, values of other types."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from accelerate import Accelerator
from accelerate.checkpointing import LoadError
from tests.helpers import hostile
from tests.unit.checkpointing.test_saving_and_loading import Counter, Net


class Grown:
    """A class that got a field since; it changes before it raises, as such code does."""

    def __init__(self) -> None:
        self.values = {"seen": [0], "best": 0.5}
        self.table = torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {**self.values, "table": self.table}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values["seen"].clear()
        self.values["seen"].extend(state["seen"])
        self.table.copy_(state["table"])
        self.values["best"] = state["best"]


def training() -> tuple[Accelerator, nn.Module, list[Any], Grown, Counter]:
    accelerator = Accelerator(cpu=True)
    model = Net(8)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2))
    counter, grown = Counter(a=1), Grown()
    accelerator.register_for_checkpointing(counter, grown)
    step(accelerator, model, optimizer, scheduler)
    return accelerator, model, [optimizer, scheduler], grown, counter


def step(accelerator: Accelerator, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
    accelerator.backward(model(torch.randn(3, 4)).square().mean())
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def everything(run: Any) -> bytes:
    accelerator, model, (optimizer, scheduler), grown, counter = run
    state = [
        model.state_dict(),
        optimizer.state_dict(),
        scheduler.state_dict(),
        grown.state_dict(),
        counter.state_dict(),
    ]
    generators = [random.getstate(), np.random.get_state(), torch.get_rng_state(), accelerator.step]
    return pickle.dumps(copy.deepcopy([_plain(state), _plain(generators)]))


def _plain(tree: Any) -> Any:
    if isinstance(tree, (torch.Tensor, np.ndarray)):
        return tree.tolist()
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def saved_and_gone_on(folder: Path) -> tuple[Any, Path]:
    run = training()
    accelerator, model, rest, grown, counter = run
    grown.values["seen"].append(1)
    target = Path(accelerator.save_state(folder / "ckpt"))
    step(accelerator, model, *rest)
    grown.values.update(best=0.7)
    grown.values["seen"].extend([2, 3])
    grown.table.fill_(3)
    counter.state["a"] = 9
    return run, target


def changed(target: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Changes what a file holds, and has the manifest say that it was saved so."""
    path = target / name
    if name.endswith(".json"):
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        torch.save(change(torch.load(path, weights_only=False)), path)
    body = json.loads((target / "manifest.json").read_text())
    del body["files"][name]
    hostile.write_manifest(target, files=body["files"])
    hostile.name_in_manifest(target, name, path.read_bytes())


def refused(run: Any, target: Path, name: str) -> LoadError:
    before = everything(run)
    with pytest.raises(LoadError) as caught:
        run[0].load_state(target)
    assert everything(run) == before, caught.value
    assert caught.value.changed == [] and "othing was changed" in str(caught.value).replace("nothing", "Nothing")
    assert any(problem.file == name for problem in caught.value.problems), caught.value
    return caught.value


def without(*keys: str) -> Callable[[Any], Any]:
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def test_a_registered_object_that_raises(tmp_path: Path) -> None:
    run, target = saved_and_gone_on(tmp_path)
    changed(target, "custom_checkpoint_1.pkl", without("best"))
    error = refused(run, target, "custom_checkpoint_1.pkl")
    assert "KeyError: 'best'" in str(error)
    assert run[3].values == {"seen": [0, 1, 2, 3], "best": 0.7}


def test_an_object_that_takes_no_state_back_is_listed(tmp_path: Path) -> None:
    run, target = saved_and_gone_on(tmp_path)
    run[3].load_state_dict = lambda state: 1 / 0
    with pytest.raises(LoadError, match="changed already.*custom_checkpoint_1") as caught:
        run[0].load_state(target)
    assert caught.value.changed == ["custom_checkpoint_1.pkl"] and run[4].state == {"a": 9}


def test_a_scheduler_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, target = saved_and_gone_on(tmp_path)
    kind = torch.optim.lr_scheduler.StepLR
    original = kind.load_state_dict

    def load(self: Any, state: dict[str, Any]) -> None:
        original(self, state)
        if state["last_epoch"] == 1:
            raise RuntimeError("not this one")

    monkeypatch.setattr(kind, "load_state_dict", load)
    refused(run, target, "scheduler.bin")


def test_an_optimizer_that_raises_has_what_changed_listed(tmp_path: Path) -> None:
    run, target = saved_and_gone_on(tmp_path)
    run[2][0].optimizer.load_state_dict = lambda state: 1 / 0
    with pytest.raises(LoadError, match="have changed already") as caught:
        run[0].load_state(target)
    assert "model.safetensors" in caught.value.changed and caught.value.changed[-1] == "optimizer.bin"
    assert caught.value.problems[0].file == "optimizer.bin" and "random_states_0.pkl" not in caught.value.changed


def test_what_hooks_did_is_listed(tmp_path: Path) -> None:
    run, target = saved_and_gone_on(tmp_path)
    run[0].register_load_state_pre_hook(lambda models, folder: models.clear() or 1 / 0)
    with pytest.raises(LoadError, match="ZeroDivisionError") as caught:
        run[0].load_state(target)
    assert "register_load_state_pre_hook" in caught.value.changed[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "random_state": (3, [1, 2], None)},
        lambda state: {**state, "random_state": "text"},
        lambda state: {**state, "numpy_random_seed": ("MT19937", [1, 2, 3], 0, 0, 0.0)},
        lambda state: {**state, "numpy_random_seed": 3},
        lambda state: {**state, "torch_manual_seed": torch.zeros(3)},
        lambda state: {**state, "torch_manual_seed": torch.zeros(3, dtype=torch.uint8)},
        lambda state: {**state, "torch_manual_seed": 7},
        lambda state: {**state, "step": "three"},
        lambda state: {**state, "step": -1},
        lambda state: {**state, "torch_cuda_manual_seed": ["a"]},
        lambda state: [],
        without("torch_manual_seed"),
    ],
)
def test_random_states_of_other_types(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    run, target = saved_and_gone_on(tmp_path)
    changed(target, "random_states_0.pkl", change)
    refused(run, target, "random_states_0.pkl")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [],
        lambda state: {**state, "loaders": 3},
        lambda state: {**state, "loaders": [{"iteration": "1", "seed": None}]},
        lambda state: {**state, "loaders": [{"iteration": 1}]},
        lambda state: {**state, "loaders": [{"iteration": 1, "seed": [1]}]},
        lambda state: {**state, "sync_gradients": "no"},
        lambda state: {**state, "step": None},
        without("sync_gradients"),
    ],
)
def test_progress_of_other_types(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    run, target = saved_and_gone_on(tmp_path)
    changed(target, "progress.json", change)
    refused(run, target, "progress.json")


def group_with(**options: Any) -> Callable[[Any], Any]:
    return lambda state: {**state, "param_groups": [{**state["param_groups"][0], **options}]}


def value_with(**values: Any) -> Callable[[Any], Any]:
    return lambda state: {**state, "state": {**state["state"], 0: {**state["state"][0], **values}}}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "state": []},
        lambda state: {**state, "state": {0: [1]}},
        lambda state: {**state, "param_groups": 3},
        lambda state: {**state, "param_groups": [3]},
        lambda state: {**state, "param_groups": [{}]},
        group_with(lr="fast"),
        group_with(betas=(0.9,)),
        group_with(betas="both"),
        group_with(maximize=[1]),
        group_with(params=[[0], [1], [2], [3]]),
        value_with(exp_avg="text"),
        value_with(exp_avg=3.0),
        value_with(exp_avg=torch.zeros(1)),
        value_with(exp_avg=torch.zeros(8, 4, dtype=torch.int64)),
        value_with(step="one"),
        value_with(step=[1]),
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_optimizers_of_other_types(tmp_path: Path, change: Callable[[Any], Any], fresh: bool) -> None:
    run, target = saved_and_gone_on(tmp_path)
    if fresh:
        run[2][0].state.clear()
    changed(target, "optimizer.bin", change)
    refused(run, target, "optimizer.bin")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "last_epoch": "five"},
        lambda state: {**state, "base_lrs": 0.1},
        lambda state: {**state, "base_lrs": ["a"]},
        lambda state: {**state, "step_size": [2]},
        lambda state: 3,
    ],
)
def test_schedulers_of_other_types(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    run, target = saved_and_gone_on(tmp_path)
    changed(target, "scheduler.bin", change)
    refused(run, target, "scheduler.bin")


@pytest.mark.parametrize(
    "change", [lambda s: {}, lambda s: {**s, "scale": "big"}, lambda s: 3, without("growth_factor")]
)
def test_scalers_of_other_types(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    assert accelerator._checkpoints.run.scaler is accelerator.scaler
    target = Path(accelerator.save_state(tmp_path / "ckpt"))
    changed(target, "scaler.pt", change)
    before = accelerator.scaler.state_dict()
    with pytest.raises(LoadError, match=r"scaler\.pt"):
        accelerator.load_state(target)
    assert accelerator.scaler.state_dict() == before


def test_arrays_are_no_weights(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(2, 2))
    target = Path(accelerator.save_state(tmp_path / "ckpt", safe_serialization=False))
    changed(target, "pytorch_model.bin", lambda state: {**state, "weight": np.zeros((2, 2))})
    with pytest.raises(LoadError, match="of type ndarray") as caught:
        accelerator.load_state(target)
    assert caught.value.changed == []
