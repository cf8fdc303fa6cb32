"""Quantized models: the same numbers as bitsandbytes' own functions, wherever weights come from, wait and go."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accelerate import Accelerator, init_empty_weights
from accelerate.utils import BnbQuantizationConfig, has_4bit_bnb_layers, load_and_quantize_model

bnb = pytest.importorskip("bitsandbytes", reason='quantization needs it: pip install "accelerate[quantization]"')
# It says for each product that a float32 input is converted, and that an optional kernel is missing.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FORMATS: dict[str, dict[str, Any]] = {
    "8 bits": {"load_in_8bit": True},
    "fp4": {"load_in_4bit": True},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 in bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bf16"},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 100)  # 100 rows are no multiple of 32: bitsandbytes cannot pack it for the CPU
        self.down = nn.Linear(100, 64, bias=False)
        self.register_buffer("scale", torch.ones(64))
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x)))) * self.scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(32, 64)
        self.blocks = nn.Sequential(Block(), Block())
        self.mix = nn.Linear(64, 64)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.blocks(self.words(ids))))


LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "mix"]
IDS = torch.arange(12).reshape(2, 6)


def config(name: str, **more: Any) -> BnbQuantizationConfig:
    return BnbQuantizationConfig(**{**FORMATS[name], **more})


def empty() -> Net:
    with init_empty_weights():
        net = Net()
        net.head.weight = net.words.weight
    return net.eval()


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).float()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Shards of a net with outliers, one of them on another's layer."""
    torch.manual_seed(0)
    state = {name: value for name, value in Net().state_dict().items() if name != "head.weight"}
    names = list(state)
    folder = tmp_path / "weights"
    folder.mkdir()
    places = {name: f"{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == file}, folder / file)
    index = ", ".join(f'"{name}": "{file}"' for name, file in places.items())
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def resident(folder: Path) -> Net:
    net = Net()
    net.load_state_dict({**read(folder), "head.weight": read(folder)["words.weight"]})
    return net.eval()


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_bitsandbytes(name: str, weights: Path) -> None:
    model = load_and_quantize_model(empty(), config(name), weights)
    state = read(weights)
    for layer in LAYERS:
        module, weight = model.get_submodule(layer), state[f"{layer}.weight"]
        if name == "8 bits":
            assert isinstance(module, bnb.nn.Linear8bitLt)
            values, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
            assert torch.equal(module.weight.data, values) and torch.equal(module.weight.SCB, scales)
            continue
        assert isinstance(module, bnb.nn.Linear4bit)
        kind = {"quant_type": "fp4" if name == "fp4" else "nf4", "compress_statistics": name == "nf4 twice"}
        values, found = bnb.functional.quantize_4bit(weight, **kind)
        assert torch.equal(module.weight.data, values) and found == module.weight.quant_state
        assert module.compute_dtype == config(name).bnb_4bit_compute_dtype
    assert model.head.weight is model.words.weight and model.words.weight.dtype == config(name).torch_dtype
    assert torch.equal(model.words.weight, state["words.weight"].to(config(name).torch_dtype))
    assert model.hf_device_map == {"": torch.device("cpu")}
    assert (model.is_loaded_in_8bit, model.is_loaded_in_4bit) == (name == "8 bits", name != "8 bits")
    assert has_4bit_bnb_layers(model) == (name != "8 bits") and not has_4bit_bnb_layers(Net())
    exact = output(resident(weights))
    assert (output(model) - exact).abs().max() < (0.03 if name == "8 bits" else 0.25) * exact.abs().max()


@pytest.mark.parametrize("name", FORMATS)
def test_a_loaded_model_is_quantized_where_it_is(name: str, weights: Path) -> None:
    whole = resident(weights)
    model = load_and_quantize_model(whole, config(name))
    assert model is whole
    assert torch.equal(output(model), output(load_and_quantize_model(empty(), config(name), weights)))


@pytest.mark.parametrize("name", FORMATS)
def test_layers_on_disk_are_quantized_and_fetched(name: str, weights: Path, tmp_path: Path) -> None:
    places = {"words": "cpu", "blocks.0": "disk", "blocks.1": "cpu", "mix": "disk", "head": "cpu"}
    model = load_and_quantize_model(
        empty(), config(name), weights, device_map=places, offload_folder=tmp_path / "waiting"
    )
    assert model.mix.weight.is_meta and model.blocks[0].up.bias.is_meta and not model.blocks[1].up.weight.is_meta
    here = load_and_quantize_model(empty(), config(name), weights)
    for layer in (here.blocks[0], here.mix):  # an offloaded layer is not packed, which rounds differently
        for module in layer.modules():
            module.support_avx512bf16_for_cpu = False
    for _ in range(2):
        assert torch.equal(output(model), output(here))
    assert model.mix.weight.is_meta
    if name == "8 bits":
        assert model.mix.state.CB is None  # else it would stay in memory after the forward
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin), output(here)) and twin.mix.weight.is_meta
    twin.blocks[1].up.weight.data.zero_()
    assert not torch.equal(output(twin), output(here)) and torch.equal(output(model), output(here))
    on_disk = tmp_path / "waiting" / "mix.weight.dat"
    assert on_disk.stat().st_size == 64 * 64 // (1 if name == "8 bits" else 2)
    Accelerator(cpu=True).save_model(model, str(tmp_path / "saved"))
    for key, value in load_and_quantize_model(empty(), config(name), tmp_path / "saved").state_dict().items():
        assert torch.equal(value, here.state_dict()[key]), key


@pytest.mark.parametrize("name", FORMATS)
def test_saved_and_loaded(name: str, weights: Path, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = load_and_quantize_model(empty(), config(name), weights)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    expected = output(model)  # packs weights for the CPU
    for key, value in model.state_dict().items():
        assert torch.equal(value, fresh[key]), key
    assert torch.equal(output(model), expected)
    accelerator.save_model(model, str(tmp_path / "model"), max_shard_size=3000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    again = load_and_quantize_model(empty(), config(name), tmp_path / "model")
    assert torch.equal(output(again), expected)

    other = load_and_quantize_model(Net().eval(), config(name))
    assert not torch.equal(output(other), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other), expected)

    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    accelerator.save_state(str(tmp_path / "state"))
    with torch.no_grad():
        prepared.words.weight.zero_()
    assert not torch.equal(output(prepared), expected)
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(output(prepared), expected)
    assert torch.equal(output(copy.deepcopy(prepared)), expected)


def test_which_modules_are_quantized(weights: Path) -> None:
    def quantized(**more: Any) -> list[str]:
        model = load_and_quantize_model(empty(), config("8 bits", **more), weights)
        assert output(model).isfinite().all()
        return [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)]

    assert quantized() == LAYERS
    assert quantized(skip_modules=["blocks.1", "down"]) == ["blocks.0.up", "mix"]
    kept = load_and_quantize_model(
        empty(), config("8 bits", keep_in_fp32_modules=["mix"], torch_dtype=torch.float32), weights
    )
    assert type(kept.mix) is nn.Linear and kept.mix.weight.dtype == torch.float32

    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
            self.classifier = nn.Linear(8, 3)

    model = load_and_quantize_model(WithHead(), config("fp4"))
    names = [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert names == ["body.0", "body.1"]  # attention looks at its own weights


def test_layers_of_gpt2_are_turned_upright(weights: Path) -> None:
    convolution = pytest.importorskip("transformers.pytorch_utils", reason="Conv1D is transformers'").Conv1D
    model = nn.Sequential(convolution(48, 64), nn.Linear(48, 48), nn.Linear(48, 2)).eval()
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    quantized = load_and_quantize_model(model, config("8 bits", skip_modules=["2"]))
    values, scales, _ = bnb.functional.int8_vectorwise_quant(weight.t().half().contiguous())
    assert torch.equal(quantized[0].weight.data, values) and torch.equal(quantized[0].bias, bias.half())
    restored = bnb.functional.int8_vectorwise_dequant(values, scales)
    assert (restored - weight.t()).abs().max() <= 0.51 / 127 * scales.max()


def refused(weights: Path, model: nn.Module, match: list[str], **options: Any) -> None:
    kinds = [type(module) for module in model.modules()]
    given = options.pop("config", config("8 bits"))
    with pytest.raises(ValueError) as caught:
        load_and_quantize_model(model, given, weights, **options)
    for words in match:
        assert words in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.is_meta for parameter in model.parameters())


def test_refusals_change_nothing(weights: Path, tmp_path: Path) -> None:
    refused(None, empty(), ["weights_location"])  # type: ignore[arg-type]
    refused(weights, empty(), ["'disk'", "offload_folder"], device_map={"": "cpu", "mix": "disk"})
    refused(weights, empty(), ["device_map", "mix"], device_map={"words": 0, "blocks": 0, "head": 0})
    refused(weights, empty(), ["'even'"], device_map="even")
    saved = tmp_path / "saved"
    Accelerator(cpu=True).save_model(load_and_quantize_model(empty(), config("8 bits"), weights), str(saved))
    refused(
        saved, empty(), ["mix is quantized to 8 bits in the files, but the config requests 4"], config=config("fp4")
    )
    refused(saved, empty(), ["mix.SCB", "skip_modules"], config=config("8 bits", skip_modules=["mix"]))
    state = read(weights)
    state["mix.weight"] = state["mix.weight"][:, :5].contiguous()
    del state["blocks.1.up.weight"]
    save_file(state, tmp_path / "damaged.safetensors")
    refused(
        tmp_path / "damaged.safetensors",
        empty(),
        ["mix.weight has shape (64, 5)", "(64, 64) in the model", "blocks.1.up.weight is missing"],
    )


def test_training_is_refused(weights: Path, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    frozen = load_and_quantize_model(empty(), config("fp4"), weights).requires_grad_(False)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    with pytest.raises(ValueError, match="no trainable weights"):
        accelerator.prepare(frozen, optimizer)
    spread = load_and_quantize_model(
        empty(), config("fp4"), weights, device_map={"": "cpu", "mix": "disk"}, offload_folder=tmp_path / "waiting"
    )
    with pytest.raises(ValueError, match="spread over cpu, disk"):
        accelerator.prepare(spread, optimizer)


def test_adapters_are_trained(weights: Path) -> None:
    torch.manual_seed(0)
    model = load_and_quantize_model(empty(), config("nf4 in bf16"), weights).requires_grad_(False).train()
    model.head = nn.Linear(64, 4, dtype=torch.bfloat16)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.head.parameters(), 0.5))
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(IDS).float().flatten(0, 1), torch.arange(12) % 4)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_map_is_made_within_limits(tmp_path: Path) -> None:
    def places(limit: int, **options: Any) -> dict[str, Any]:
        options |= {"device_map": "sequential", "max_memory": {"cpu": limit}, "offload_folder": tmp_path}
        return load_and_quantize_model(Net(), config("8 bits"), **options).hf_device_map

    assert places(10_000) == {"": "disk"}
    assert places(10**9) == {"": "cpu"}
    assert places(20_000, no_split_module_classes=["Block"])["blocks"] == "disk"
    assert "blocks" not in places(20_000)


def test_layers_split_off_outliers_above_the_threshold() -> None:
    assert load_and_quantize_model(Net(), config("8 bits", llm_int8_threshold=4.0)).mix.state.threshold == 4.0
