"""A load that one rank refuses ends alike on all: an error everywhere, and the state of before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate import Accelerator
from accelerate.checkpointing import LoadError
from tests.unit.checkpointing.test_loading import Grown, changed

RunRanks = Callable[..., list[Any]]


def refused_on_one(folder: str, how: str) -> tuple[str, list[str], list[str], bool, float]:
    """Saves, goes on, and loads while something is wrong on rank 1 alone."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(2, 2))
    grown = Grown()
    accelerator.register_for_checkpointing(grown)
    target = Path(accelerator.save_state(Path(folder) / "ckpt"))
    if accelerator.is_main_process and how == "random":
        changed(target, "random_states_1.pkl", lambda state: {**state, "torch_manual_seed": 3})
    accelerator.wait_for_everyone()
    with torch.no_grad():
        model.module.weight.add_(1)
    grown.values["best"] = 0.9
    if accelerator.process_index == 1 and how == "object":
        original = grown.load_state_dict
        calls: list[Any] = []

        def load(state: dict[str, Any]) -> None:
            original(state)
            calls.append(state)
            if len(calls) == 1:
                raise KeyError("added since")

        grown.load_state_dict = load  # type: ignore[method-assign]
    if accelerator.process_index == 1 and how == "model":
        model.module.load_state_dict = lambda *args, **kwargs: 1 / 0
    weight, states = model.module.weight.detach().clone(), torch.get_rng_state()
    with pytest.raises(LoadError) as caught:
        accelerator.load_state(target)
    same = torch.equal(model.module.weight, weight) and torch.equal(torch.get_rng_state(), states)
    files = [problem.file for problem in caught.value.problems]
    return str(caught.value), files, caught.value.changed, same, grown.values["best"]


@pytest.mark.parametrize(("how", "file"), [("object", "custom_checkpoint_0.pkl"), ("random", "random_states_1.pkl")])
def test_all_ranks_end_as_they_were(run_ranks: RunRanks, tmp_path: Path, how: str, file: str) -> None:
    first, second = run_ranks(2, refused_on_one, str(tmp_path), how)
    assert first == second and first[1:] == ([file], [], True, 0.9), first
    assert how == "random" or "on rank 1: KeyError: 'added since'" in first[0]


def test_what_changed_on_any_rank_is_listed_on_all(run_ranks: RunRanks, tmp_path: Path) -> None:
    first, second = run_ranks(2, refused_on_one, str(tmp_path), "model")
    assert first[:3] == second[:3] and first[1] == ["model.safetensors"]
    assert {"custom_checkpoint_0.pkl", "model.safetensors"} <= set(first[2]) and first[4] == second[4] == 0.5
