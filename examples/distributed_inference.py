"""Lets a small GPT-2 go on with a list of prompts, each process with its share of them, and puts the answers together.

The model is made from a configuration with random weights, so what it writes means nothing: the point is who writes it.

    python examples/distributed_inference.py
    accelerate launch --cpu --num_processes 2 examples/distributed_inference.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from accelerate import PartialState
from accelerate.utils import gather_object, set_seed

PROMPTS = ["def split(data):", "class Loader:", "import torch", "for batch in loader:", "return model(x)"]


def make_model() -> Any:
    """A GPT-2 that reads and writes ASCII characters."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise SystemExit(f'{error}: pip install "accelerate[clients]"') from error
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=128, n_embd=64, n_layer=2, n_head=4, **ends)).eval()


def go_on(model: Any, prompt: str, length: int) -> str:
    """The prompt and the characters that the model finds likeliest after it."""
    ids = torch.tensor([[ord(character) for character in prompt]], device=model.device)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
    return "".join(chr(code) for code in written[0].tolist())


def main() -> None:
    """Splits the prompts, answers this process's, and prints all answers on the main process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16, help="characters to write")
    length = parser.parse_args().length

    state = PartialState()
    set_seed(0)  # the same weights everywhere
    model = make_model().to(state.device)
    with state.split_between_processes(PROMPTS) as prompts:
        answers = [(state.process_index, go_on(model, prompt, length)) for prompt in prompts]
    # Objects may be of any number on each process; tensors would need apply_padding=True above.
    for process, answer in gather_object(answers):
        state.print(f"process {process}: {answer!r}")


if __name__ == "__main__":
    main()
