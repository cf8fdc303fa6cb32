"""The estimates beside what torch allocates, and what is said of models that cannot be found."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate.commands.estimate import command, empty_model
from accelerate.commands.estimate.empty_model import EstimateError, ModelSource
from accelerate.commands.estimate.step import TraceError, trace_step
from accelerate.utils import convert_to_fp32

CASES = json.loads((Path(__file__).resolve().parents[3] / "data" / "estimate_behaviors.json").read_text())
needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed (the extra estimate)"
)


def observed(name: str) -> Any:
    return next(case["output"] for case in CASES if case["name"] == name)


def allocated(model: nn.Module) -> int:
    """Bytes of storage behind a real module, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import BertConfig

    folder = tmp_path_factory.mktemp("bert")
    BertConfig().save_pretrained(folder)
    return str(folder)


@needs_transformers
def test_bert_base_is_as_observed(bert: str) -> None:
    from accelerate.runtime.helpers import convert_bytes

    args = command.estimate_command_parser().parse_args([bert])
    rows = {row[0]: row[1:] for row in command.gather_data(args)}
    wanted = observed("estimate_memory.bert_base")
    assert list(rows) == ["float32", "float16", "int8", "int4"]
    for dtype, (largest, total, usage) in rows.items():
        assert convert_bytes(largest) == wanted[dtype]["largest"] and convert_bytes(total) == wanted[dtype]["total"]
        if wanted[dtype]["training"] == "N/A":
            assert command.training_total(usage) is None
        else:
            assert {part: convert_bytes(size) for part, size in usage.items()} == wanted[dtype]["training"]
    # Decided difference: the sum of weights, gradients and state, where release 1.15 showed the largest of the parts.
    assert convert_bytes(command.training_total(rows["float32"][2])) == "1.63 GB"
    assert convert_bytes(command.training_total(rows["float16"][2])) == "939.71 MB"


@needs_transformers
def test_bert_base_is_what_torch_allocates(bert: str) -> None:
    from transformers import BertConfig, BertModel

    model = command.create_empty_model(bert, None)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    args = argparse.Namespace(model_name=bert, library_name=None, trust_remote_code=False, dtypes=["float32"])
    [[_, _, total, _]] = command.gather_data(args)
    assert total == pytest.approx(allocated(BertModel(BertConfig())), rel=0.005)


def test_training_usage_is_as_observed() -> None:
    wanted = observed("estimate_memory.bert_base")
    for dtype in ("float32", "float16", "int8", "bfloat16", "no"):
        key = "estimate_training_usage(100,'float32')" if dtype == "float32" else f"(100,'{dtype}')"
        assert command.estimate_training_usage(100, dtype) == wanted[key]


def test_the_table_is_as_observed() -> None:
    table = command.create_ascii_table(["dtype", "Largest Layer"], [["float32", "1 KB"], ["int8", "2 KB"]], "Title")
    assert table.split("\n") == observed("estimate.create_ascii_table")
    wide = command.create_ascii_table(["a"], [[1]], "a title wider than the table").split("\n")
    assert len(set(map(len, wide))) == 1


# A training step ------------------------------------------------------------------------------------------------------


def measured_peak(model: nn.Module, batch: dict[str, torch.Tensor], mixed: bool) -> int:
    """The most bytes torch held during the second step, by its own profiler, which sees every allocation."""
    from torch.profiler import ProfilerActivity, profile

    optimizer = torch.optim.AdamW(model.train().parameters())

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            output = model(**batch)
        if mixed:
            output = convert_to_fp32(output)  # as a prepared model does
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    live = allocated(model) + sum(value.untyped_storage().nbytes() for value in (*states, *batch.values()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = live
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def config(name: str) -> Any:
    import transformers

    small = {
        "GPT2LMHeadModel": transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=2000),
        "BertForSequenceClassification": transformers.BertConfig(
            num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=256, vocab_size=2000
        ),
        "ViTForImageClassification": transformers.ViTConfig(
            num_hidden_layers=2, hidden_size=128, num_attention_heads=4, intermediate_size=512, image_size=192
        ),
    }
    return small[name]


BATCHES = {
    "GPT2LMHeadModel": {"input_ids": torch.zeros(8, 64).long(), "labels": torch.zeros(8, 64).long()},
    "BertForSequenceClassification": {"input_ids": torch.zeros(8, 64).long(), "labels": torch.zeros(8).long()},
    "ViTForImageClassification": {"pixel_values": torch.zeros(8, 3, 192, 192), "labels": torch.zeros(8).long()},
}


STEPS = [("GPT2LMHeadModel", False), ("GPT2LMHeadModel", True), ("BertForSequenceClassification", False)]


@needs_transformers
@pytest.mark.parametrize("name, mixed", [*STEPS, ("ViTForImageClassification", False)])
def test_a_step_is_what_torch_allocates(name: str, mixed: bool) -> None:
    import transformers

    kind = getattr(transformers, name)
    with torch.device("meta"):
        empty = kind(config(name))
    step = trace_step(empty, 8, 64, mixed)
    real = kind(config(name))
    assert step.weights == allocated(real) == step.gradients + sum(b.nbytes for b in real.buffers())
    assert step.optimizer == sum(8 * p.numel() + 4 for p in real.parameters())
    # A convolution has working memory of its own, which cannot be seen.
    near = 0.1 if name.startswith("ViT") else 0.02
    assert step.peak == pytest.approx(measured_peak(real, BATCHES[name], mixed), rel=near)
    assert step.peak <= step.weights + step.gradients + step.optimizer + step.activations
    assert {tensor.device.type for tensor in empty.parameters()} == {"meta"}


class Choosing(nn.Module):
    """Looks at a value, as a mixture of experts does."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, device="meta")

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layer(input_ids[:, :4].float()) if input_ids.sum().item() else self.layer.weight


def test_a_step_that_depends_on_values_is_refused() -> None:
    with pytest.raises(TraceError, match="DataDependent"):
        trace_step(Choosing(), 2, 8, mixed=False)
    with pytest.raises(TraceError, match="only batches of tokens and of images"):
        trace_step(nn.Linear(2, 2, device="meta"), 2, 8, mixed=False)


# Finding the model ----------------------------------------------------------------------------------------------------


def refused(name: str, *words: str, library: str | None = None) -> None:
    with pytest.raises(EstimateError) as caught:
        empty_model.find_source(name, library)
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_is_not_here_is_said(tmp_path: Path) -> None:
    refused("./nothing", "there is no file or folder ./nothing")
    refused(str(tmp_path), "there is no config.json in it")
    (tmp_path / "config.json").write_text("[1]")
    refused(str(tmp_path), "expected keys and values")
    (tmp_path / "config.json").write_text("{")
    refused(str(tmp_path / "config.json"), "cannot be read as a configuration")
    (tmp_path / "config.json").write_text("{}")
    refused(str(tmp_path), "--library_name {timm,transformers}")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    assert empty_model.find_source(str(tmp_path)) == ModelSource(str(tmp_path), "timm", tmp_path / "config.json")
    assert empty_model.find_source("resnet18", "timm") == ModelSource("resnet18", "timm")


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """The Hub, answering or failing in one way: it cannot be reached from where tests run."""
    import huggingface_hub

    def model_info(repo: str, token: str | None = None) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)


def test_the_hubs_answers_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import ModelInfo, errors

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("two words", "neither a folder here nor a model on the Hub")
    answering(monkeypatch, errors.OfflineModeIsEnabled("off"))
    refused("a/b", "the Hub cannot be reached, and a/b is not in its cache")
    answering(monkeypatch, ConnectionError("no route"))
    refused("a/b", "the Hub cannot be reached")
    folder = ModelInfo(id="a/b", siblings=[{"rfilename": "README.md"}])
    answering(monkeypatch, folder)
    refused("a/b", "no model that can be estimated")
    siblings = [{"rfilename": "config.json"}]
    answering(monkeypatch, ModelInfo(id="a/b", siblings=siblings))
    refused("a/b", "does not name its library")
    answering(monkeypatch, ModelInfo(id="a/b", siblings=siblings, library_name="diffusers"))
    refused("a/b", "is for diffusers")
    answering(monkeypatch, ModelInfo(id="a/b", siblings=siblings, library_name="timm"))
    assert empty_model.find_source("a/b") == ModelSource("a/b", "timm")


@pytest.mark.parametrize(
    "kind, words", [("GatedRepoError", "no access"), ("RepositoryNotFoundError", "neither a folder")]
)
def test_refusals_of_the_hub(kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    error = getattr(errors, kind).__new__(getattr(errors, kind))
    answering(monkeypatch, error)
    refused("a/b", words)


def test_a_name_of_the_hub_for_timm() -> None:
    assert command.add_timm_hub_prefix("timm/resnet50.a1_in1k") == "hf-hub:timm/resnet50.a1_in1k"
    assert command.add_timm_hub_prefix("hf_hub:timm/x") == "hf_hub:timm/x"


@needs_transformers
def test_a_configuration_of_no_known_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(EstimateError, match="cannot be made.*no_such_type"):
        command.create_empty_model(str(tmp_path), None)
