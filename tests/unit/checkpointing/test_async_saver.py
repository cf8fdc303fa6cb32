"""A save in the background: what comes next waits for it, and raises what went wrong in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate import Accelerator
from accelerate.checkpointing import SaveError
from accelerate.checkpointing.async_saver import AsyncSaver
from accelerate.checkpointing.items.state_item import TORCH
from accelerate.checkpointing.storage import formats as checkpoint_files


class Slow:
    """Holds the save of a registered object back until something waits for it."""

    def __init__(self) -> None:
        self.waited_for = threading.Event()
        self.error: Exception | None = None
        self.value = torch.ones(1)

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["slow"]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    slow, write, wait = Slow(), checkpoint_files.write_torch, AsyncSaver.wait

    def held_back(state: Any, writer: Any) -> None:
        if isinstance(state, dict) and "slow" in state and threading.current_thread() is not threading.main_thread():
            assert slow.waited_for.wait(60)
            if slow.error is not None:
                raise slow.error
        write(state, writer)

    def waited_for(writer: AsyncSaver) -> None:
        if writer._thread is not None:
            slow.waited_for.set()
        wait(writer)

    monkeypatch.setattr(AsyncSaver, "wait", waited_for)
    object.__setattr__(TORCH, "write", held_back)
    yield slow
    slow.waited_for.set()
    object.__setattr__(TORCH, "write", write)


NEXT: dict[str, Callable[[Accelerator, Path], Any]] = {
    "wait_for_checkpoint": lambda accelerator, folder: accelerator.wait_for_checkpoint(),
    "load_state": lambda accelerator, folder: accelerator.load_state(folder / "before"),
    "end_training": lambda accelerator, folder: accelerator.end_training(),
}


def saving(slow: Slow, folder: Path) -> Accelerator:
    """An accelerator in whose background a save is under way."""
    accelerator = Accelerator(cpu=True, project_dir=folder)
    accelerator.prepare(nn.Linear(2, 2))
    accelerator.save_state(folder / "before")
    accelerator.register_for_checkpointing(slow)
    accelerator.save_state(folder / "slow", asynchronous=True)
    accelerator._custom_objects.clear()
    assert not (folder / "slow").exists()
    return accelerator


@pytest.mark.parametrize("call", [*NEXT, "save_state"])
def test_what_comes_next_waits_for_the_save_under_way(call: str, slow: Slow, tmp_path: Path) -> None:
    accelerator = saving(slow, tmp_path)
    if call == "save_state":
        accelerator.save_state(tmp_path / "next")
    else:
        NEXT[call](accelerator, tmp_path)
    assert (tmp_path / "slow" / "manifest.json").is_file()


@pytest.mark.parametrize("call", NEXT)
def test_what_comes_next_raises_the_error_of_the_save(call: str, slow: Slow, tmp_path: Path) -> None:
    slow.error = OSError(28, "No space left on device")
    accelerator = saving(slow, tmp_path)
    with pytest.raises(SaveError, match="No space left"):
        NEXT[call](accelerator, tmp_path)
    assert not (tmp_path / "slow").exists()
    accelerator.wait_for_checkpoint()  # raised once


def test_a_save_holds_the_state_of_its_step(slow: Slow, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(slow)
    accelerator.save_state(tmp_path / "slow", asynchronous=True)
    slow.value.zero_()  # before it is written
    accelerator.wait_for_checkpoint()
    accelerator.load_state(tmp_path / "slow")
    assert slow.value.item() == 1
