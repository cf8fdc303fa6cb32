"""Quantizes a small GPT-2 in 8 and in 4 bits while its weights are read, and shows what it takes and how well it agrees.

The weights are random, made from a configuration and saved in shards first.

    python examples/quantized.py
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch

from accelerate import Accelerator, init_empty_weights
from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model, set_seed

FORMATS: dict[str, dict[str, Any]] = {
    "8 bits": {"load_in_8bit": True},
    "4 bits (nf4)": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def make_model(width: int) -> Any:
    """A GPT-2 of four layers."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise SystemExit(f'{error}: pip install "accelerate[clients]"') from error
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=width, n_layer=4, n_head=4, **ends)).eval()


def megabytes(model: Any) -> float:
    """What the model's state takes; tied weights count once."""
    return sum({value.data_ptr(): value.nbytes for value in model.state_dict().values()}.values()) / 1e6


def main() -> None:
    """Saves a model, loads it quantized, and compares the words that it finds likeliest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    width = parser.parse_args().width

    accelerator = Accelerator()
    set_seed(0)
    whole = make_model(width)
    ids = torch.randint(512, (4, 32))
    with tempfile.TemporaryDirectory() as weights, torch.no_grad():
        accelerator.save_model(whole, weights, max_shard_size="2MB")
        exact = whole(ids).logits
        print(f"float32: {megabytes(whole):.1f} MB")
        for name, values in FORMATS.items():
            with init_empty_weights():
                empty = make_model(width)
                empty.tie_weights()
            model = load_and_quantize_model(empty, BnbQuantizationConfig(**values), weights)
            logits = model(ids.to(model.device)).logits.float().cpu()
            error = (logits - exact).norm() / exact.norm()
            print(f"{name}: {megabytes(model):.1f} MB, logits {error:.2%} from the whole model's")


if __name__ == "__main__":
    main()
