"""peft on top of ours: an adapter loaded onto a model that lies over memory and disk, or added where that cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'accelerate[clients]'")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'accelerate[clients]'")

import accelerate  # noqa: E402

pytestmark = pytest.mark.slow
WHERE = {"transformer.h.0": "cpu", "transformer.h.1": "disk", "transformer.wte": "cpu", "transformer.wpe": "cpu"}
WHERE |= {"transformer.ln_f": "cpu", "lm_head": "cpu"}


def tiny() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def adapter() -> Any:
    return peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)


def loaded(folder: Path) -> Any:
    """A model of which a block is read from the file that it was saved in."""
    accelerate.Accelerator(cpu=True).save_model(tiny(), folder / "weights")
    with accelerate.init_empty_weights():
        model = tiny()
    model.tie_weights()
    return accelerate.load_checkpoint_and_dispatch(model, folder / "weights", WHERE, offload_folder=folder / "index")


def written(folder: Path) -> Any:
    """A model of which a block was written to disk."""
    return accelerate.dispatch_model(tiny(), WHERE, offload_dir=folder / "written")


@pytest.mark.parametrize("dispatched", [loaded, written])
@pytest.mark.parametrize("spread", [False, True])
def test_an_adapter_is_loaded_onto_an_offloaded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dispatched: Any, spread: bool
) -> None:
    monkeypatch.chdir(tmp_path)  # peft writes the weights of blocks on disk anew, under the current folder
    ids = torch.randint(0, 32, (2, 8))
    resident = peft.get_peft_model(tiny(), adapter()).eval()
    resident.save_pretrained(tmp_path / "adapter")
    where = {f"base_model.model.{name}": device for name, device in WHERE.items()}
    options = {"device_map": where, "offload_dir": tmp_path / "again"} if spread else {}
    adapted = peft.PeftModel.from_pretrained(dispatched(tmp_path), tmp_path / "adapter", **options).eval()
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, resident(ids).logits)
    assert ("disk" in adapted.hf_device_map.values()) == spread


def test_an_adapter_that_lost_its_values_is_an_error(tmp_path: Path) -> None:
    adapted = peft.get_peft_model(
        written(tmp_path), adapter()
    ).eval()  # it goes where the offloaded weights are: nowhere
    with pytest.raises(RuntimeError, match=r"h\.1\.attn\.c_attn\.lora_A\.default\.weight has no values"):
        adapted(torch.randint(0, 32, (2, 8)))
