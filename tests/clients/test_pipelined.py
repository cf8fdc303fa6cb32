"""transformers' models as pipelines: GPT-2, BERT and T5 from configurations, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from accelerate import PartialState, prepare_pippy

pytest.importorskip("transformers", reason='the models are its: pip install "accelerate[clients]"')

_SMALL = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=32, n_head=2, n_positions=16, **_SMALL))


def _bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4}
    return BertForSequenceClassification(BertConfig(**sizes, **_SMALL))


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **_SMALL))


def _inputs(name: str, rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(1, 96, (rows, 10), generator=generator)
    lengths = torch.randint(4, 10, (rows, 1), generator=generator)
    mask = (torch.arange(10) < lengths).long()
    if name == "gpt2":
        return (ids,), {}
    if name == "bert":
        return (), {"input_ids": ids, "attention_mask": mask}
    return (), {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :6]}


MODELS = {"gpt2": _gpt2, "bert": _bert, "t5": _t5}
POINTS = {"gpt2": "transformer.h.2", "bert": "bert.encoder.layer.2", "t5": "decoder.block.1"}


def _runs(name: str, points: Any, gather: bool) -> tuple[bool, list[str], int]:
    torch.set_num_threads(1)
    PartialState(cpu=True)

    def made() -> Any:
        torch.manual_seed(0)
        return MODELS[name]().eval()

    args, kwargs = _inputs(name, 4)
    model, whole = made(), made()
    whole.config.use_cache = False
    if name == "t5":
        whole.decoder.config.use_cache = False
    cached = model.config.to_dict().get("use_cache")
    model = prepare_pippy(model, points, example_args=args, example_kwargs=kwargs, gather_output=gather)
    assert model.config.to_dict().get("use_cache") == cached
    for rows in (4, 3, 5):
        args, kwargs = _inputs(name, rows)
        output = model(*args, **kwargs)
        if output is None:
            continue
        with torch.no_grad():
            expected = whole(*args, **kwargs)
        assert type(output) is type(expected)
        for ours, theirs in zip(pytree.tree_leaves(output), pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(ours, theirs)
    held = sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)
    return output is not None, model.hf_split_points, held


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_whole_model(name: str, run_ranks: Any) -> None:
    torch.manual_seed(0)
    total = sum(parameter.numel() for parameter in MODELS[name]().parameters())
    for points, gather in (("auto", True), ([POINTS[name]], False)):
        results = run_ranks(2, _runs, name, points, gather, timeout=200)
        assert [found for found, _, _ in results] == [gather, True]
        assert all(held < 0.75 * total for _, _, held in results)
        assert results[0][1] == results[1][1]
        if points != "auto":
            assert results[0][1] == points
