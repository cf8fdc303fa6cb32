"""Runs a trained model with less memory than its weights take: the rest is read from disk, just before it is used.

The model is the one that `language_model.py` trains and saves; it stands for one that is a thousand times larger:

    python examples/language_model.py --save weights
    python examples/big_model.py weights --memory 400KB

On a machine with GPUs, leave `--memory` out: they are filled first, then memory, then the disk.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from language_model import LanguageModel

from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from accelerate.utils import compute_module_sizes, convert_bytes


@torch.no_grad()
def write(model: LanguageModel, prompt: str, characters: int) -> str:
    """The prompt, and what the model finds most likely to follow; hooks bring inputs to where a layer runs."""
    codes = torch.tensor([list(prompt.encode())])
    for _ in range(characters):
        scores = model(codes[:, -model.length :])[:, -1]
        codes = torch.cat([codes, scores.argmax(-1, keepdim=True)], dim=1)
    return bytes(codes[0].tolist()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a language model that does not fit into memory.")
    parser.add_argument("weights", help="the folder that `language_model.py --save` wrote")
    parser.add_argument("--length", type=int, default=64, help="characters in a window, as in training")
    parser.add_argument("--memory", help="how much of the model may lie in memory, such as 400KB; else what is free")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--sample", type=int, default=100, help="how many characters to write")
    args = parser.parse_args()

    with init_empty_weights():
        model = LanguageModel(args.length)  # takes no memory yet
    sizes = compute_module_sizes(model)
    load_checkpoint_and_dispatch(
        model,
        args.weights,
        device_map="auto",
        max_memory={"cpu": args.memory} if args.memory else None,
        no_split_module_classes=["Block"],  # what has a residual connection stays on one device
        strict=True,  # weights that do not fit are an error, before anything is loaded
    )
    model.eval()
    print(f"{convert_bytes(sizes[''])} of weights:")
    device_map: Any = model.hf_device_map
    for name, device in device_map.items():
        print(f"  {name or 'everything':12} {convert_bytes(sizes[name]):>10}  {device}")
    print(write(model, args.prompt, args.sample))


if __name__ == "__main__":
    main()
