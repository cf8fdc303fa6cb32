"""A trained model saved by transformers' own `save_pretrained`, through the accelerator, on one process and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from accelerate import Accelerator

pytest.importorskip("transformers", reason="needs transformers: pip install 'accelerate[clients]'")


def trained_and_saved(folder: str) -> dict[str, torch.Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    words = torch.randint(0, 40, (2, 8))
    accelerator.backward(model(input_ids=words, labels=words).loss)
    optimizer.step()
    accelerator.unwrap_model(model).save_pretrained(
        folder,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    accelerator.save_model(model, f"{folder}/ours")
    accelerator.wait_for_everyone()
    return {name: value.clone() for name, value in accelerator.unwrap_model(model).state_dict().items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_there_and_back(run_ranks: Any, tmp_path: Path, ranks: int) -> None:
    from safetensors.torch import load_file
    from transformers import GPT2LMHeadModel

    wanted = run_ranks(ranks, trained_and_saved, str(tmp_path), timeout=120)[0]
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in wanted.items())
    theirs, ours = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(value, wanted[name]) for name, value in (theirs | ours).items())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight  # tied: saved once, in either file
    assert len(theirs) == len(ours) == len(wanted) - 1
