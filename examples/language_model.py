"""Trains a small causal transformer to write Python, character by character, and lets it write a few lines.

The text is the source of Python's own standard library, as it lies on this machine. The loop is plain PyTorch; the same
file runs on one process or many:

    python examples/language_model.py
    accelerate launch --cpu --num_processes 2 --mixed_precision bf16 examples/language_model.py
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm


def read_text(characters: int) -> str:
    """The first so many characters of the standard library's modules, in alphabetical order; ASCII only."""
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= characters:
            break
    return text.encode("ascii", errors="ignore").decode()[:characters]


class Windows(Dataset):
    """Consecutive pieces of a text; a sample is `length + 1` character codes, each the target of the one before it."""

    def __init__(self, codes: torch.Tensor, length: int) -> None:
        self.codes, self.length = codes, length

    def __len__(self) -> int:
        return (len(self.codes) - 1) // self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.length
        return self.codes[start : start + self.length + 1]


class Block(nn.Module):
    """Attention to what came before, then a small network for each position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.queries_keys_values(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.network(self.network_norm(x))


class LanguageModel(nn.Module):
    """For each position, how likely each character is to come next: codes [batch, length] -> [batch, length, 128]."""

    def __init__(self, length: int, width: int = 96, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.length = length
        self.characters, self.positions = nn.Embedding(128, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(codes.shape[1], device=codes.device)
        return self.head(self.norm(self.blocks(self.characters(codes) + self.positions(positions))))

    @torch.no_grad()
    def write(self, prompt: str, characters: int) -> str:
        device = self.head.weight.device
        codes = torch.tensor([list(prompt.encode())], device=device)
        for _ in range(characters):
            scores = self(codes[:, -self.length :])[:, -1].float()
            codes = torch.cat([codes, torch.multinomial(scores.softmax(-1), 1)], dim=1)
        return bytes(codes[0].tolist()).decode()


def surprise(model: nn.Module, codes: torch.Tensor) -> torch.Tensor:
    """How surprised the model is by each next character, in nats: the mean over each window, shape [batch]."""
    scores = model(codes[:, :-1])
    return functional.cross_entropy(scores.transpose(1, 2), codes[:, 1:], reduction="none").mean(dim=1)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    """The mean loss over every window of the loader, on all processes together."""
    model.eval()
    # From all processes, and without the windows that were repeated to fill the last batch.
    losses = [accelerator.gather_for_metrics(surprise(model, codes)) for codes in loader]
    return torch.cat(losses).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small transformer on the standard library's source text.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32, help="windows per process and step")
    parser.add_argument("--length", type=int, default=64, help="characters in a window")
    parser.add_argument("--characters", type=int, default=400_000, help="how much text to read")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: as launched")
    parser.add_argument("--sample", type=int, default=300, help="how many characters to write at the end")
    parser.add_argument(
        "--save", metavar="FOLDER", help="keep the trained weights there; examples/big_model.py runs them"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    set_seed(args.seed)

    codes = torch.tensor(list(read_text(args.characters).encode()))
    held_out = len(codes) // 20
    train_loader = DataLoader(Windows(codes[:-held_out], args.length), batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(Windows(codes[-held_out:], args.length), batch_size=args.batch_size)
    model = LanguageModel(args.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, train_loader, test_loader)

    for epoch in range(args.epochs):
        model.train()
        # Only the main process shows a bar.
        for batch in tqdm(train_loader, desc=f"epoch {epoch + 1}/{args.epochs}"):
            with accelerator.accumulate(model):
                accelerator.backward(surprise(model, batch).mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        loss = evaluate(accelerator, model, test_loader)
        accelerator.print(f"epoch {epoch + 1}: loss {loss:.3f}, perplexity {math.exp(loss):.2f}")

    if args.save:
        accelerator.save_model(model, args.save, max_shard_size="500KB")  # in several files, as a large model would be
    if accelerator.is_main_process:
        print(accelerator.unwrap_model(model).write("def ", args.sample))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
