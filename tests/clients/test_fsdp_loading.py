"""A pretrained model under FSDP: weights on rank 0 only, and what transformers takes from us."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import accelerate
from tests.helpers.releases import fsdp

pytest.importorskip("transformers", reason="needs transformers: pip install 'accelerate[clients]'")
pytestmark = pytest.mark.slow


def load_and_prepare(folder: str, version: int) -> tuple[bool, bool, float, bool]:
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_fsdp_enabled

    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=version, cpu_ram_efficient_loading=True, auto_wrap_policy="transformer_based_wrap"
    )
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    elsewhere: dict[str, Any] = {} if accelerator.is_main_process else {"device_map": "meta"}
    model = AutoModelForCausalLM.from_pretrained(folder, **elsewhere)
    empty = all(parameter.is_meta for parameter in model.parameters())
    model = accelerator.prepare(model)
    ids = torch.arange(8).unsqueeze(0)
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    state = accelerator.get_state_dict(model)
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    same = all(torch.equal(value.cpu(), saved[name]) for name, value in state.items())
    return is_fsdp_enabled(), empty, loss.item(), same


@pytest.mark.parametrize("version", [fsdp(1), fsdp(2)])
def test_ranks_without_weights_train_with_those_of_rank_0(
    run_ranks: Callable[..., list[Any]], tmp_path: Path, version: int
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    ids = torch.arange(8).unsqueeze(0)
    expected = model(input_ids=ids, labels=ids).loss.item()
    first, second = run_ranks(2, load_and_prepare, str(tmp_path), version)
    assert first[:2] == (True, False)
    assert second[:2] == (True, True)
    for _, _, loss, same in (first, second):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert same
