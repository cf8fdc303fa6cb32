"""The small models that big-model tests use."""

from __future__ import annotations

import torch
from torch import nn


class Blk(nn.Module):
    """Two linear layers, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(10, 20)
        self.b = nn.Linear(20, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs it."""
        out: torch.Tensor = x + self.b(torch.relu(self.a(x)))
        return out


class Net(nn.Module):
    """The model of the observed behaviors: an embedding, three blocks, a norm with buffers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Linear(4, 10)
        self.layers = nn.ModuleList(Blk() for _ in range(3))
        self.norm = nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs it."""
        x = self.emb(x)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.head(self.norm(x))
        return out


class Tied(nn.Module):
    """A model whose head has the weight of its embedding, transposed in use."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Linear(4, 10)
        self.layers = nn.ModuleList(Blk() for _ in range(3))
        self.norm = nn.BatchNorm1d(10)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs it."""
        y = self.emb(x)
        for layer in self.layers:
            y = layer(y)
        out: torch.Tensor = self.norm(y) + self.head(x)
        return out
