"""Damage of any byte of any file is found before anything changes; an interrupted commit leaves a whole checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate import Accelerator
from accelerate.checkpointing import LoadError, SaveError
from accelerate.checkpointing.discovery import latest_valid, problems_of
from accelerate.checkpointing.storage import atomic
from tests.helpers.corruption import Bomb, corrupt
from tests.unit.checkpointing.test_saving_and_loading import project, trained, weights


@pytest.fixture
def run(tmp_path: Path) -> tuple[Accelerator, nn.Module, Path]:
    accelerator = Accelerator(cpu=True)
    model, _ = trained(accelerator, hidden=8)
    return accelerator, model, accelerator.save_state(tmp_path / "c")


def restore(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


@pytest.mark.parametrize("fresh", [False, True])
def test_every_damage_is_reported_and_nothing_changes(tmp_path: Path, fresh: bool) -> None:
    outcome = corrupt(tmp_path, most=12, fresh=fresh)
    assert outcome["tried"] == outcome["reported"] > 250
    assert set(outcome["kinds"]) == {"flip", "truncate", "append", "zeros", "bomb", "delete", "folder", "swap"}
    assert not outcome["executed"]


def test_a_checkpoint_of_another_release_is_read_without_running_code(run: Any, tmp_path: Path) -> None:
    accelerator, model, folder = run
    for name in ("manifest.json", "progress.json"):
        (folder / name).unlink()
    states = torch.load(folder / "random_states_0.pkl", weights_only=False)
    del states["format"]
    torch.save(states, folder / "random_states_0.pkl")
    before = weights(model)
    with torch.no_grad():
        model.l1.weight.zero_()
    accelerator.load_state(folder)
    assert torch.equal(weights(model), before)
    Bomb.target = str(tmp_path / "executed")
    torch.save(Bomb(), folder / "optimizer.bin")
    with pytest.raises(LoadError, match=r"optimizer\.bin"):
        accelerator.load_state(folder)
    assert not (tmp_path / "executed").exists()


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


CALLS = ("rename", "replace", "fsync", "unlink", "mkdir", "rmdir", "open", "write", "pwrite")


def killed_at(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has the process 'killed' before its `count`-th call that touches the disk; returns the calls as they come."""
    made: list[str] = []

    def watched(name: str) -> Any:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) > count:
                raise Killed
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, watched(name))
    return made


@pytest.mark.parametrize("mode", ["numbered", "over", "over with notes"])
def test_killed_at_every_call_a_whole_checkpoint_is_left(tmp_path: Path, mode: str) -> None:
    """Each point at which the process may end while it saves: the next start finds the old state or the new one."""
    accelerator = project(tmp_path / "p", total_limit=1)
    model, _ = trained(accelerator, hidden=8)
    indexed_name = mode == "numbered"
    target = None if indexed_name else tmp_path / "m" / "mine"
    first = accelerator.save_state(target)
    if mode == "over with notes":
        (first / "notes.txt").write_text("mine")
    old, number = weights(model), accelerator.save_iteration
    with torch.no_grad():
        model.l1.weight.add_(1)
    new = weights(model)
    pristine = tmp_path / "pristine"
    shutil.copytree(first.parent, pristine)
    outcomes = set()
    for count in range(10_000):
        restore(pristine, first.parent)
        accelerator.project_configuration.iteration = number
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            made = killed_at(count, patch)
            try:
                accelerator.save_state(target)
                ended = True
            except (Killed, SaveError):
                ended = False
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        report = accelerator.resume() if indexed_name else accelerator.load_state(first)
        assert report is not None and not report.problems
        now = weights(model)
        assert torch.equal(now, old) or torch.equal(now, new), f"after {made}"
        outcomes.add(torch.equal(now, new))
        if mode == "over with notes":
            assert (first / "notes.txt").read_text() == "mine"
        torch.nn.utils.vector_to_parameters(new, model.parameters())
        if ended:
            break
    assert outcomes == {True, False} and count > 30


def test_the_limit_never_takes_the_last_good_one(tmp_path: Path) -> None:
    accelerator = project(tmp_path, total_limit=1)
    trained(accelerator, hidden=8)
    accelerator.save_state()
    accelerator.register_for_checkpointing(
        type("Bad", (), {"state_dict": lambda self: 1 / 0, "load_state_dict": None})()
    )
    with pytest.raises(SaveError, match="division by zero"):
        accelerator.save_state()
    accelerator._custom_objects.clear()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["checkpoint_0"]
    assert accelerator.save_state().name == "checkpoint_1"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["checkpoint_1"]


def test_invalid_checkpoints_do_not_count_among_those_kept(tmp_path: Path) -> None:
    accelerator = project(tmp_path, total_limit=2)
    trained(accelerator, hidden=8)
    good = accelerator.save_state()
    broken = accelerator.save_state()
    (broken / "optimizer.bin").unlink()
    accelerator.save_state()
    assert good.is_dir()
    assert problems_of(good) == [] and problems_of(broken)


@contextmanager
def without_roots_rights() -> Iterator[None]:
    """Root writes anywhere: the block runs with the rights of a user who owns nothing."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_cannot_be_written() -> None:
    accelerator = Accelerator(cpu=True)
    # Not tmp_path: another user than its owner cannot look into what is above it.
    with tempfile.TemporaryDirectory(prefix="accelerate-test-") as folder:
        os.chmod(folder, 0o555)
        with without_roots_rights(), pytest.raises(SaveError, match=r"Permission denied.*c\.incomplete"):
            accelerator.save_state(Path(folder, "c"))
        assert os.listdir(folder) == []
        os.chmod(folder, 0o755)
        assert accelerator.save_state(Path(folder, "c")).is_dir()


def test_leftovers_are_cleaned_up(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    for suffix in (atomic.INCOMPLETE, atomic.DELETED):
        (tmp_path / f"c{suffix}").mkdir()
        (tmp_path / f"c{suffix}" / "junk").write_text("x")
    accelerator.save_state(tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["c"]


def test_no_project_is_no_error_for_the_search(tmp_path: Path) -> None:
    assert latest_valid(tmp_path / "none").folder is None
