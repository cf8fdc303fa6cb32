"""Saving and resuming on real ranks: bit for bit, on another number of ranks, and when a rank fails or is gone."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchdata.stateful_dataloader")

from accelerate import Accelerator
from accelerate.checkpointing import LoadError, SaveError
from accelerate.checkpointing.items.state_item import TORCH
from accelerate.checkpointing.storage import formats as checkpoint_files
from accelerate.runtime import world
from tests.helpers.resuming import Recipe, Training

STEPS, CUT = 40, 17


def whole_run(recipe: Recipe, save_at: tuple[int, ...] = (CUT,), steps: int = STEPS, **options: Any) -> Any:
    run = Training.start(recipe).train(steps, save_at, **options)
    return run.ids, run.losses, run.weights()


def resumed_run(recipe: Recipe, steps: int, save_at: tuple[int, ...] = ()) -> Any:
    run = Training.start(recipe, seed=99)
    report = run.accelerator.resume()
    assert report is not None and not report.problems
    run.train(steps, save_at)
    return run.ids, run.losses, run.weights(), len(run.data.fetched) if hasattr(run.data, "fetched") else None


BITWISE: list[tuple[int, dict[str, Any]]] = [
    (2, {"precision": "bf16", "accumulation": 4}),
    (1, {"precision": "fp16", "workers": 2, "persistent": True}),
]
SLOWER: list[tuple[int, dict[str, Any]]] = [
    (ranks, options)
    for ranks in (1, 2)
    for options in (
        {"seedable": False},
        {"workers": 2},
        {"accumulation": 4, "precision": "fp16"},
        {"stream": True},
        {"dispatch": True},
        {"precision": "bf16", "workers": 2, "augmented": True},
        {"precision": "fp16", "workers": 2, "augmented": True, "accumulation": 4},
        {"augmented": True},
    )
]
CASES = [*BITWISE, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOWER)]


@pytest.mark.parametrize(("ranks", "options"), CASES)
def test_a_resumed_run_goes_on_bit_for_bit(run_ranks: Any, tmp_path: Path, ranks: int, options: dict[str, Any]) -> None:
    recipe = Recipe(str(tmp_path), **options)
    unbroken = run_ranks(ranks, whole_run, recipe, timeout=120)
    resumed = run_ranks(ranks, resumed_run, recipe, STEPS - CUT, timeout=120)
    for (ids, losses, weights), (later_ids, later_losses, later_weights, _) in zip(unbroken, resumed, strict=True):
        assert later_ids == ids[CUT:]
        assert later_losses == losses[CUT:]
        assert torch.equal(later_weights, weights)


def in_global_order(ranks: list[Any], place: int = 0) -> list[list[int]]:
    """The indices of each step of all ranks together."""
    return [[index for part in step for index in part] for step in zip(*(rank[place] for rank in ranks), strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dispatch": True},
        pytest.param({"workers": 2}, marks=pytest.mark.slow),
        pytest.param({"stream": True}, marks=pytest.mark.slow),
        pytest.param({"stream": True, "dispatch": True}, marks=pytest.mark.slow),
    ],
    ids=["shuffled", "dispatched", "workers", "stream", "dispatched stream"],
)
def test_the_order_does_not_depend_on_the_number_of_ranks(
    run_ranks: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    # 100 samples in steps of 24: the last step of an epoch is padded.
    recipe = Recipe(str(tmp_path / "runs"), total_batch=24, length=100, **options)
    alone = run_ranks(1, whole_run, Recipe(str(tmp_path / "alone"), total_batch=24, length=100, **options), (), 18)
    wanted = [sorted(set(step)) for step in in_global_order(alone)]
    first = run_ranks(4, whole_run, recipe, (7,), 7, timeout=120)
    second = run_ranks(2, resumed_run, recipe, 4, (4,), timeout=120)
    third = run_ranks(3, resumed_run, recipe, 7, timeout=120)
    seen = [step for ranks in (first, second, third) for step in in_global_order(ranks)]
    assert len(seen) == len(wanted) == 18
    for place, (step, expected) in enumerate(zip(seen, wanted, strict=True)):
        padded = place % 5 == 4
        assert (set(step) >= set(expected)) if padded else sorted(step) == expected, place
    if not options:
        assert [rank[3] for rank in second] == [4 * 12] * 2, "skipped samples were fetched"


def accumulated(recipe: Recipe, steps: int, save_at: tuple[int, ...], resume: bool) -> Any:
    run = Training.start(recipe)
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if resume:
        run.accelerator.resume()
    return run.train(steps, save_at).weights()


def test_an_open_window_is_resumed_on_another_number_of_ranks(run_ranks: Any, tmp_path: Path) -> None:
    recipe = Recipe(str(tmp_path), total_batch=12, length=96, accumulation=4)
    unbroken = run_ranks(3, accumulated, recipe, 8, (6,), False)
    resumed = run_ranks(2, accumulated, recipe, 2, (), True)
    assert torch.allclose(resumed[0], unbroken[0], atol=1e-5)
    assert torch.equal(resumed[0], resumed[1])


def saved_in_the_background(recipe: Recipe) -> Any:
    run = Training.start(recipe).train(STEPS, (CUT,), asynchronous=True)
    run.accelerator.wait_for_checkpoint()
    return run.ids, run.losses, run.weights()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_in_the_background_holds_the_state_of_its_step(run_ranks: Any, tmp_path: Path, ranks: int) -> None:
    recipe = Recipe(str(tmp_path))
    unbroken = run_ranks(ranks, saved_in_the_background, recipe)
    resumed = run_ranks(ranks, resumed_run, recipe, STEPS - CUT)
    for whole, later in zip(unbroken, resumed, strict=True):
        assert later[1] == whole[1][CUT:]
        assert torch.equal(later[2], whole[2])


def one_rank_cannot_write(recipe: Recipe, asynchronous: bool) -> Any:
    run = Training.start(recipe)
    accelerator = run.accelerator
    run.train(3, (3,))
    before = run.weights()
    run.train(2)

    class Broken:
        def state_dict(self) -> Any:
            return {"held": 1}

        def load_state_dict(self, state: Any) -> None: ...

    original = checkpoint_files.write_torch
    if accelerator.process_index == 1:

        def full(state: Any, writer: Any) -> None:
            original(state, writer)
            raise OSError(28, "No space left on device")

        object.__setattr__(TORCH, "write", full)
    try:
        with pytest.raises(SaveError, match="on rank 1.*No space left") as caught:
            accelerator.save_state(asynchronous=asynchronous)
            accelerator.wait_for_checkpoint()
    finally:
        if accelerator.process_index == 1:
            object.__setattr__(TORCH, "write", original)
    accelerator.wait_for_everyone()
    left = sorted(os.listdir(Path(recipe.folder) / "checkpoints"))
    run.train(2)  # goes on
    accelerator.save_state()
    accelerator.load_state(Path(recipe.folder) / "checkpoints" / "checkpoint_0")
    assert torch.equal(run.weights(), before)
    return left, str(caught.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_cannot_write_fails_all_and_leaves_the_old_checkpoint(
    run_ranks: Any, tmp_path: Path, asynchronous: bool
) -> None:
    results = run_ranks(2, one_rank_cannot_write, Recipe(str(tmp_path)), asynchronous)
    assert [left for left, _ in results] == [["checkpoint_0"]] * 2


def dies_while_saving(recipe: Recipe) -> str:
    run = Training.start(recipe).train(2, (2,))
    accelerator = run.accelerator

    def die(*_: Any) -> None:
        if accelerator.process_index == 1:
            os._exit(9)

    accelerator.register_save_state_pre_hook(die)
    with pytest.raises(SaveError) as caught:
        accelerator.save_state()
    return str(caught.value)


def test_a_rank_that_dies_is_an_error_on_the_others(run_ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="rank 1"):
        run_ranks(2, dies_while_saving, Recipe(str(tmp_path)), timeout=60)
    assert run_ranks(2, resumed_run, Recipe(str(tmp_path)), 1)
    assert not (tmp_path / "checkpoints" / "checkpoint_1").exists()


def only_the_main_process(folder: str) -> str:
    accelerator = Accelerator(cpu=True)
    accelerator.strategy.world = dataclasses.replace(accelerator.strategy.world, debug=True)
    message = ""
    if accelerator.is_main_process:
        with pytest.raises(RuntimeError, match="only some processes") as caught:
            accelerator.save_state(folder)
        message = str(caught.value)
    if accelerator.process_index == 0 and folder:
        with pytest.raises(RuntimeError, match="only some processes"):
            accelerator.load_state(folder)
    accelerator.wait_for_everyone()
    return message


def test_a_save_by_the_main_process_alone_is_refused_at_once(run_ranks: Any, tmp_path: Path) -> None:
    main, other = run_ranks(2, only_the_main_process, str(tmp_path / "x"))
    assert "if accelerator.is_main_process" in main and not other


def save_plain(folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(3, 2))
    accelerator.save_state(folder)


def frozen_linear(folder: str) -> list[str]:
    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(3 + accelerator.process_index, 2).requires_grad_(False)
    accelerator.prepare(layer)
    with pytest.raises(LoadError) as caught:
        accelerator.load_state(folder)
    return [problem.kind for problem in caught.value.problems]


def test_what_one_rank_finds_all_report(run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(1, save_plain, str(tmp_path / "c"))
    assert run_ranks(2, frozen_linear, str(tmp_path / "c")) == [["shape"], ["shape"]]


def disks_apart(folder: str) -> list[str]:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    # Two machines, each with a disk of its own.
    accelerator.strategy.world = dataclasses.replace(world.current(), local_rank=0, local_size=1)
    world.set_current(accelerator.strategy.world)
    os.makedirs(f"{folder}/{rank}")
    os.chdir(f"{folder}/{rank}")
    model = accelerator.prepare(torch.nn.Linear(3, 2))
    accelerator.save_state("saved")
    names = sorted(os.listdir("saved"))
    accelerator.project_configuration.save_on_each_node = True
    accelerator.save_state("both")
    with torch.no_grad():
        accelerator.unwrap_model(model).weight.zero_()
    accelerator.load_state("both")
    assert accelerator.unwrap_model(model).weight.any()
    return names


def test_machines_without_a_common_disk_each_commit_their_part(run_ranks: Any, tmp_path: Path) -> None:
    first, second = run_ranks(2, disks_apart, str(tmp_path))
    assert "model.safetensors" in first and "random_states_0.pkl" in first and "manifest.json" in first
    assert second == ["manifest.json", "random_states_1.pkl"]


def models_saved(folder: str) -> str:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    Path(f"{folder}/file").touch()
    message = ""
    try:
        accelerator.save_model(model, f"{folder}/file/below")
    except (OSError, SaveError) as error:
        assert isinstance(error, OSError) == accelerator.is_main_process
        message = str(error)
    if accelerator.is_main_process:
        accelerator.save_model(model, f"{folder}/by the first alone")
    accelerator.save_model(model, f"{folder}/by all")
    accelerator.wait_for_everyone()
    return message


def test_save_model_may_be_called_by_one_rank_and_fails_on_all_that_call_it(run_ranks: Any, tmp_path: Path) -> None:
    messages = run_ranks(2, models_saved, str(tmp_path))
    assert all("Not a directory" in message for message in messages), messages
    assert "on rank 0" in messages[1]
    for name in ("by the first alone", "by all"):
        assert (tmp_path / name / "model.safetensors").is_file()
