"""A small language model for the tests of both versions of FSDP."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu

from accelerate import FullyShardedDataParallelPlugin


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(gelu(self.up(self.norm(x))))


class Tiny(nn.Module):
    """A small language model: tied embeddings, a frozen part, sizes that no number of ranks divides."""

    def __init__(self, vocabulary: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Block(width) for _ in range(3)])
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        frozen: Any = self.layers[0]
        frozen.up.weight.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens) * self.scale
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def plugin(version: int, **fields: Any) -> FullyShardedDataParallelPlugin:
    by_layer = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["Block"]}
    return FullyShardedDataParallelPlugin(**{"fsdp_version": version, **by_layer, **fields})
