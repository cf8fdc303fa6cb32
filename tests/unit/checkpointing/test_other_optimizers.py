"""A state of another class of optimizer is a finding of the one error, with a manifest that names classes and without."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate import Accelerator
from accelerate.checkpointing import LoadError
from accelerate.checkpointing.items import model_items
from accelerate.checkpointing.sharded.compat import compare_optimizers

KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "AdamW": torch.optim.AdamW,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "Adafactor": torch.optim.Adafactor,
}


class Own(torch.optim.Optimizer):
    """An optimizer that nobody has heard of."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            self.state[param]["trace"] = torch.zeros_like(param)


def trained(kind: Callable[[Any], Any], steps: int = 1, scheduler: bool = False) -> Any:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters())
    if scheduler:
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(steps):
        accelerator.backward(model(torch.ones(4, 3)).sum())
        optimizer.step()
        optimizer.zero_grad()
    return accelerator, model, optimizer


def _as_other_releases_leave_it(folder: Path) -> None:
    for own in ("manifest.json", "progress.json"):
        (folder / own).unlink()
    shutil.copy(Path(__file__).parents[2] / "data/checkpoints_of_1.15/bin/random_states_0.pkl", folder)


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "none"])
def test_another_class_is_listed_before_anything_changes(tmp_path: Path, manifest: bool) -> None:
    for name, kind in KINDS.items():
        folder = trained(kind)[0].save_state(tmp_path / name)
        if not manifest:
            _as_other_releases_leave_it(folder)
    for steps, (name, kind) in itertools.product([0, 1], KINDS.items()):
        for other in KINDS:
            accelerator, model, optimizer = trained(kind, steps)
            weights, state = model.weight.clone(), str(optimizer.state_dict())
            if other == name:
                accelerator.load_state(tmp_path / other)
                assert len(optimizer.state) == len(torch.load(tmp_path / other / "optimizer.bin")["state"])
                continue
            with pytest.raises(LoadError) as caught:
                accelerator.load_state(tmp_path / other)
            (problem,) = caught.value.problems
            assert (problem.file, problem.kind) == ("optimizer.bin", "state"), (name, other)
            assert (f"saved by {other}" in problem.text) == manifest and name in problem.text
            assert torch.equal(model.weight, weights) and str(optimizer.state_dict()) == state


def test_classes_that_keep_the_same_are_told_apart_by_the_manifest(tmp_path: Path) -> None:
    trained(torch.optim.Adam)[0].save_state(tmp_path)
    accelerator, _, optimizer = trained(torch.optim.AdamW)
    with pytest.raises(LoadError, match=r"optimizer.bin: state: it was saved by Adam, and this run has AdamW"):
        accelerator.load_state(tmp_path)
    assert optimizer.param_groups[0].get("decoupled_weight_decay", True)  # since torch 2.7
    report = accelerator.load_state(tmp_path, strict=False)
    assert [problem.kind for problem in report.problems] == ["state"]
    assert optimizer.param_groups[0].get("decoupled_weight_decay", True)  # since torch 2.7


class Derived(torch.optim.AdamW):
    """AdamW, but for a name."""


def test_a_class_derived_from_another_is_that_class(tmp_path: Path) -> None:
    trained(torch.optim.AdamW)[0].save_state(tmp_path / "plain")
    trained(Derived)[0].save_state(tmp_path / "derived")
    for kind, folder in ((Derived, "plain"), (torch.optim.AdamW, "derived")):
        accelerator, _, optimizer = trained(kind, steps=2)
        accelerator.load_state(tmp_path / folder)
        assert [int(values["step"]) for values in optimizer.state.values()] == [1, 1]
    with pytest.raises(
        LoadError, match=r"saved by AdamW, and this run has Adam, which has to begin anew \(strict=False"
    ):
        trained(torch.optim.Adam)[0].load_state(tmp_path / "derived")


def test_what_releases_and_schedulers_add_or_lack_is_no_other_class(tmp_path: Path) -> None:
    saved = trained(torch.optim.AdamW, scheduler=True)[2].state_dict()
    for switch in ("fused", "foreach", "capturable", "decoupled_weight_decay"):
        saved["param_groups"][0].pop(switch, None)  # the last one since torch 2.7
    fresh = trained(torch.optim.AdamW, steps=0)[2]
    assert "max_lr" in saved["param_groups"][0]
    assert compare_optimizers("o", fresh, saved["param_groups"], saved["state"].values()) == []
    for values in saved["state"].values():
        values["average"] = values["exp_avg"]
    assert compare_optimizers("o", fresh, saved["param_groups"], saved["state"].values()) == []


def test_an_optimizer_that_nobody_knows(tmp_path: Path) -> None:
    own, other = trained(Own)[2], trained(torch.optim.Adagrad)[2].state_dict()
    groups, states = other["param_groups"], other["state"].values()
    (problem,) = compare_optimizers("o", own, groups, states)
    assert problem.text == "it is of another kind of optimizer than Own: no ['trace'], but ['step', 'sum']"
    assert compare_optimizers("o", trained(Own, steps=0)[2], groups, states) == []  # nothing to compare with
    mine = own.state_dict()
    assert compare_optimizers("o", own, mine["param_groups"], mine["state"].values()) == []


class Wrapping(Own):
    """Saves under other names than it uses, as bitsandbytes' optimizers do."""

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        return {**saved, "state": {key: {"wrapped": values} for key, values in saved["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = {key: values.get("wrapped", values) for key, values in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": state})


@pytest.mark.parametrize("saving", [Own, Wrapping])
def test_an_optimizer_may_save_other_names_than_it_uses(tmp_path: Path, saving: Any) -> None:
    folder = trained(saving)[0].save_state(tmp_path)
    _as_other_releases_leave_it(folder)
    for steps in (0, 1):  # a run may go back in the middle
        accelerator, _, optimizer = trained(Wrapping, steps)
        accelerator.load_state(folder)
        assert all(list(values) == ["trace"] for values in optimizer.state.values())
    with pytest.raises(LoadError, match="another kind of optimizer than Wrapping: no"):
        other = trained(torch.optim.Adagrad)[0].save_state(tmp_path / "other")
        _as_other_releases_leave_it(other)
        accelerator.load_state(other)


def test_states_with_names_are_compared_too(tmp_path: Path) -> None:
    _, model, optimizer = trained(KINDS["SGD"])
    saved = trained(torch.optim.AdamW)[2].state_dict()
    torch.save(saved, tmp_path / "optimizer.bin")
    item = model_items.load_optimizer(tmp_path, 0, optimizer, [model], sharded=True)
    (problem,) = item.check(item.read(tmp_path / item.path, {}))
    assert problem.kind == "state" and "another kind of optimizer than SGD" in problem.text
