"""Runs a GPT-2 that is cut into stages, one for each process, so that no process holds all of it.

The model is made from a configuration with random weights. A batch goes through the stages in parts: while the second
stage works on one part, the first works on the next.

    accelerate launch --cpu --num_processes 2 examples/pipelined_inference.py
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch

from accelerate import PartialState, prepare_pippy
from accelerate.utils import set_seed


def make_model(layers: int) -> Any:
    """A small GPT-2."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise SystemExit(f'{error}: pip install "accelerate[clients]"') from error
    sizes: dict[str, Any] = {"vocab_size": 128, "n_positions": 64, "n_embd": 64, "n_layer": layers, "n_head": 4}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
    return GPT2LMHeadModel(config).eval()


def main() -> None:
    """Cuts the model, runs batches through it, and compares with the whole model on the last process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--chunks", type=int, help="parts of a batch; by default as many as processes")
    options = parser.parse_args()

    state = PartialState()
    set_seed(0)
    whole = make_model(options.layers)
    example = torch.randint(128, (8, 32))
    model = prepare_pippy(copy.deepcopy(whole), example_args=(example,), num_chunks=options.chunks)
    held = sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)
    total = sum(parameter.numel() for parameter in whole.parameters())
    state.print(f"cut before {', '.join(model.hf_split_points) or 'nothing'}")
    print(f"process {state.process_index} holds {held:,} of {total:,} weights")
    for rows in (8, 5):  # a batch that is not full works as well
        batch = torch.randint(128, (rows, 32))
        with torch.no_grad():
            output = model(batch)
            if state.is_last_process:
                difference = (output.logits - whole(batch).logits).abs().max().item()
                print(
                    f"{rows} rows: logits of shape {tuple(output.logits.shape)}, {difference:.0e} from the whole model's"
                )


if __name__ == "__main__":
    main()
