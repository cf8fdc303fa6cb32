"""Checkpoints at URLs, saved and loaded by several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from accelerate import Accelerator
from accelerate.checkpointing import SaveError


def there_and_back(url: str, asynchronous: bool) -> tuple[Any, bool]:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(3, 2))
    before = accelerator.unwrap_model(model).weight.detach().clone()
    accelerator.save_state(url, asynchronous=asynchronous)
    with torch.no_grad():
        accelerator.unwrap_model(model).weight.zero_()
    report = accelerator.load_state(url)
    with pytest.raises(SaveError, match="there is a checkpoint already"):
        accelerator.save_state(url)
    return report.url, torch.equal(accelerator.unwrap_model(model).weight, before)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_ranks(run_ranks: Any, tmp_path: Path, asynchronous: bool) -> None:
    url = f"file://{tmp_path}/my runs/step 1"
    (tmp_path / "scratch").mkdir()
    found = run_ranks(2, there_and_back, url, asynchronous, env={"TMPDIR": str(tmp_path / "scratch")})
    assert found == [(url, True)] * 2
    names = {path.name for path in (tmp_path / "my runs" / "step 1").iterdir()}
    assert names >= {"manifest.json", "model.safetensors", "random_states_0.pkl", "random_states_1.pkl"}
    assert not list((tmp_path / "scratch").glob("accelerate_*"))
