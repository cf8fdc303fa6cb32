"""Adapters on a model whose weights bitsandbytes packed into 4 bits, fully sharded: the same training as on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from tests.helpers.releases import fsdp

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'accelerate[clients]'")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'accelerate[clients]'")
pytest.importorskip("bitsandbytes", reason="quantization needs it: pip install 'accelerate[quantization]'")
pytestmark = pytest.mark.slow

# FSDP's version, and in which elements the 4-bit numbers lie; adapters are in float32.
WAYS = [fsdp(1, torch.float32), fsdp(2, torch.float32), fsdp(2, torch.uint8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    where = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(where)
    return where


def _made(folder: Path, storage: torch.dtype) -> Any:
    packing = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=storage
    )
    options = {"quantization_config": packing, "dtype": torch.float32, "device_map": {"": "cpu"}}
    model = transformers.LlamaForCausalLM.from_pretrained(folder, **options)
    torch.manual_seed(0)
    wanted = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, wanted).train()


def _plugin(version: int) -> FullyShardedDataParallelPlugin:
    more: dict[str, Any] = {"use_orig_params": True} if version == 1 else {}
    return FullyShardedDataParallelPlugin(
        fsdp_version=version, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False, **more
    )


def _train(folder: Path, version: int, storage: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, norms and an evaluation of each of three steps, and the adapters they come to."""
    accelerator = Accelerator(cpu=True, fsdp_plugin=_plugin(version) if version else None)
    model = _made(folder, storage)
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    if not version:  # without shards, bitsandbytes packs weights anew for an evaluation, and rounds their scales
        for module in model.modules():
            module.support_avx512bf16_for_cpu = False
    told = []
    for step in range(3):
        ids = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(step))
        mine = ids.chunk(accelerator.num_processes)[accelerator.process_index]
        model.train()
        loss = model(input_ids=mine, labels=mine).loss
        accelerator.backward(loss)
        told.append(float(accelerator.reduce(loss.detach(), "mean")))
        told.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            loss = model.eval()(input_ids=mine, labels=mine).loss
        told.append(float(accelerator.reduce(loss, "mean")))
    state = accelerator.get_state_dict(model)
    return told, {name: value.clone() for name, value in state.items() if "lora_" in name}


@pytest.fixture(scope="module")
def alone(rank_pool: Any, folder: Path) -> Any:
    return rank_pool.run(1, _train, folder, 0, torch.float32, env={"HF_HUB_OFFLINE": "1"})[0]


@pytest.mark.parametrize("version, storage", WAYS)
def test_adapters_train_as_on_one_rank(
    version: int, storage: torch.dtype, folder: Path, run_ranks: Any, alone: Any
) -> None:
    results = run_ranks(2, _train, folder, version, storage, env={"HF_HUB_OFFLINE": "1"})
    for told, _ in results:
        assert told == pytest.approx(alone[0], rel=1e-5)
    state = results[0][1]
    assert state.keys() == alone[1].keys() and len(state) == 12
    for name, value in alone[1].items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-5)


def _refused(folder: Path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", fsdp_plugin=_plugin(2))
    model = _made(folder, torch.float32)
    with pytest.raises(ValueError, match="load the model with bnb_4bit_quant_storage=torch.bfloat16"):
        accelerator.prepare(model)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    layer.weight.quant_state.packing_format_for_cpu = True  # as a forward in eval mode leaves it on some processors
    with pytest.raises(ValueError, match="repacked for inference"):
        accelerator.prepare(model)
    layer.weight.SCB = None
    with pytest.raises(ValueError, match="quantized to 8 bits, and its scales would be lost"):
        accelerator.prepare(model)


def test_what_shards_would_spoil_is_refused(folder: Path, run_ranks: Any) -> None:
    run_ranks(1, _refused, folder, env={"HF_HUB_OFFLINE": "1"})
