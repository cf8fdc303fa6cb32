"""The documented part on one process: files and keys, names and numbers, hooks, strictness, what a load refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from accelerate import Accelerator
from accelerate.checkpointing import LoadError, SaveError
from accelerate.settings.handlers import ProjectConfiguration


class Net(nn.Module):
    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.l1 = nn.Linear(4, hidden)
        self.l2 = nn.Linear(hidden, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l2(self.l1(x))


class Counter:
    def __init__(self, **state: Any) -> None:
        self.state = state or {"a": 1}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def trained(accelerator: Accelerator, hidden: int = 64, steps: int = 2, optimizers: int = 1) -> Any:
    model = Net(hidden)
    made = [torch.optim.AdamW(model.parameters(), lr=1e-3) for _ in range(optimizers)]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in made]
    model, *rest = accelerator.prepare(model, *made, *schedulers)
    for _ in range(steps):
        accelerator.backward(model(torch.randn(3, 4)).square().mean())
        for part in rest:
            part.step()
        rest[0].zero_grad()
    return model, rest


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def project(folder: Path, **options: Any) -> Accelerator:
    options.setdefault("automatic_checkpoint_naming", True)
    return Accelerator(cpu=True, project_config=ProjectConfiguration(project_dir=str(folder), **options))


@pytest.mark.parametrize("safe", [True, False])
def test_files_and_keys_are_the_documented_ones(tmp_path: Path, safe: bool) -> None:
    accelerator = Accelerator(cpu=True)
    trained(accelerator)
    accelerator.register_for_checkpointing(Counter(), Counter())
    folder = accelerator.save_state(tmp_path / "with space", safe_serialization=safe)
    assert folder == tmp_path / "with space"
    names = {
        "optimizer.bin",
        "scheduler.bin",
        "random_states_0.pkl",
        "custom_checkpoint_0.pkl",
        "custom_checkpoint_1.pkl",
    }
    names |= {"model.safetensors" if safe else "pytorch_model.bin", "manifest.json", "progress.json"}
    assert set(os.listdir(folder)) == names
    model = load_file(folder / "model.safetensors") if safe else torch.load(folder / "pytorch_model.bin")
    assert {name: list(value.shape) for name, value in model.items()} == {
        "l1.weight": [64, 4],
        "l1.bias": [64],
        "l2.weight": [4, 64],
        "l2.bias": [4],
    }
    optimizer = torch.load(folder / "optimizer.bin")
    assert set(optimizer) == {"state", "param_groups"} and set(optimizer["state"][0]) == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert torch.load(folder / "scheduler.bin")["last_epoch"] == 2
    assert torch.load(folder / "custom_checkpoint_1.pkl") == {"a": 1}
    random = torch.load(folder / "random_states_0.pkl", weights_only=False)
    assert {"step", "random_state", "numpy_random_seed", "torch_manual_seed"} <= set(random)
    assert random["torch_manual_seed"].shape == (5056,)


def test_numbers_and_the_limit(tmp_path: Path) -> None:
    accelerator = project(tmp_path, total_limit=2)
    trained(accelerator)
    saved = [accelerator.save_state() for _ in range(3)]
    assert saved[-1] == tmp_path / "checkpoints" / "checkpoint_2"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["checkpoint_1", "checkpoint_2"]
    assert accelerator.save_iteration == 3


def test_an_explicit_folder_counts_too(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.save_state(str(tmp_path / "x"))
    assert accelerator.save_iteration == 1


def test_without_a_folder(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(TypeError, match="output_dir"):
        accelerator.save_state()
    with pytest.raises(ValueError, match="input_dir"):
        accelerator.load_state()
    with pytest.raises(ValueError, match="no such folder"):
        accelerator.load_state(tmp_path / "none")


def test_a_number_that_is_taken_is_refused(tmp_path: Path) -> None:
    trained(project(tmp_path))
    project(tmp_path).save_state()
    again = project(tmp_path)
    with pytest.raises(ValueError, match="resume"):
        again.save_state()
    assert again.resume() is not None
    assert again.save_state().name == "checkpoint_1"


def test_resume_at_the_first_start(tmp_path: Path) -> None:
    assert project(tmp_path).resume() is None


def test_the_newest_valid_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = project(tmp_path)
    model, _ = trained(accelerator)
    accelerator.save_state()
    before = weights(model)
    trained_further = [accelerator.save_state() for _ in range(2)]
    (trained_further[0] / "optimizer.bin").write_bytes(b"")
    (trained_further[1] / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "checkpoint_9").mkdir()
    (tmp_path / "checkpoints" / "checkpoint_8.incomplete").mkdir()
    (tmp_path / "checkpoints" / "checkpoint_best").mkdir()
    with torch.no_grad():
        model.l1.weight.zero_()
    report = accelerator.load_state()
    assert report.folder.name == "checkpoint_0"
    assert [folder.name for folder, _ in report.passed_over] == ["checkpoint_9", "checkpoint_2", "checkpoint_1"]
    assert "checkpoint_1" in caplog.text and "optimizer.bin" in caplog.text
    assert torch.equal(weights(model), before)
    assert accelerator.save_iteration == 10


def test_nothing_valid_is_an_error_that_says_why(tmp_path: Path) -> None:
    accelerator = project(tmp_path)
    (tmp_path / "checkpoints" / "checkpoint_0").mkdir(parents=True)
    with pytest.raises(LoadError, match="checkpoint_0.*no checkpoint"):
        accelerator.load_state()


def test_everything_that_does_not_fit_is_in_one_error(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    trained(accelerator, hidden=64, optimizers=2)
    accelerator.register_for_checkpointing(Counter())
    accelerator.save_state(tmp_path / "c")
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    other, (optimizer, scheduler) = trained(accelerator, hidden=32)
    other.register_parameter("added", nn.Parameter(torch.ones(1)))
    before = weights(other)
    with pytest.raises(LoadError) as caught:
        accelerator.load_state(tmp_path / "c")
    found = {(problem.file, problem.kind) for problem in caught.value.problems}
    assert found == {
        ("model.safetensors", "shape"),
        ("model.safetensors", "missing"),
        ("optimizer.bin", "shape"),
        ("optimizer_1.bin", "extra"),
        ("scheduler_1.bin", "extra"),
        ("custom_checkpoint_0.pkl", "extra"),
    }
    assert torch.equal(weights(other), before) and scheduler.scheduler.last_epoch == 2
    report = accelerator.load_state(tmp_path / "c", strict=False)
    assert {(problem.file, problem.kind) for problem in report.problems} == found
    assert torch.equal(other.l2.bias, load_file(tmp_path / "c" / "model.safetensors")["l2.bias"])
    assert other.added.item() == 1


def test_hooks_take_models_over(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, _ = trained(accelerator)
    before = weights(model)

    def save_hook(models: list[Any], states: list[Any], folder: str) -> None:
        os.makedirs(f"{folder}/own")
        torch.save(states.pop(), f"{folder}/own/weights.bin")
        assert models == [model]

    def load_hook(models: list[Any], folder: str) -> None:
        models.pop().load_state_dict(torch.load(f"{folder}/own/weights.bin"))

    handles = accelerator.register_save_state_pre_hook(save_hook), accelerator.register_load_state_pre_hook(load_hook)
    folder = accelerator.save_state(tmp_path / "c")
    assert not (folder / "model.safetensors").exists()
    with torch.no_grad():
        model.l1.weight.zero_()
    accelerator.load_state(folder)
    assert torch.equal(weights(model), before)
    (folder / "own" / "weights.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match="own/weights.bin"):
        accelerator.load_state(folder)
    for handle in handles:
        handle.remove()
    assert (accelerator.save_state(tmp_path / "d") / "model.safetensors").exists()


def test_a_state_that_needs_a_class_says_how_to_allow_it(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(Counter(own=Counter()))
    accelerator.save_state(tmp_path / "c")
    with pytest.raises(LoadError, match="add_safe_globals"):
        accelerator.load_state(tmp_path / "c")
    with torch.serialization.safe_globals([Counter]):
        accelerator.load_state(tmp_path / "c")


def test_saving_over_a_folder_keeps_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, _ = trained(accelerator)
    folder = accelerator.save_state(tmp_path / "c")
    (folder / "notes.txt").write_text("mine")
    with torch.no_grad():
        model.l1.weight.fill_(3)
    accelerator.save_state(folder, safe_serialization=False)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "model.safetensors").exists()
    assert sorted(os.listdir(tmp_path)) == ["c"]
    with torch.no_grad():
        model.l1.weight.zero_()
    accelerator.load_state(folder)
    assert (model.l1.weight == 3).all()


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file")
    with pytest.raises(SaveError, match="is a file"):
        Accelerator(cpu=True).save_state(tmp_path / "c")
    assert (tmp_path / "c").read_text() == "a file"


def test_tied_weights(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = Net(4)
    model.l2.weight = model.l1.weight
    model = accelerator.prepare(model)
    accelerator.save_state(tmp_path / "c")
    assert set(load_file(tmp_path / "c" / "model.safetensors")) == {"l1.weight", "l1.bias", "l2.bias"}
    before = weights(model)
    with torch.no_grad():
        model.l1.weight.zero_()
    accelerator.load_state(tmp_path / "c")
    assert torch.equal(weights(model), before) and model.l2.weight is model.l1.weight


def test_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    accelerator = Accelerator(cpu=True)
    accelerator.save_state("a/b")
    accelerator.save_state("~/c")
    assert (tmp_path / "a" / "b").is_dir() and (tmp_path / "c").is_dir()
    accelerator.load_state("a/b")
    accelerator.load_state("~/c")


def test_a_load_does_not_hold_two_states(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    _, (optimizer, _) = trained(accelerator)
    accelerator.save_state(tmp_path / "c")
    live = [value["exp_avg"] for value in optimizer.state.values()]
    expected = [value.clone() for value in live]
    for value in live:
        value.zero_()
    accelerator.load_state(tmp_path / "c")
    for value, wanted, now in zip(live, expected, optimizer.state.values(), strict=True):
        assert now["exp_avg"].data_ptr() == value.data_ptr() and torch.equal(value, wanted)
