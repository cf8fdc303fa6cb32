"""A small language model, and what training it sharded comes to, for the tests of both versions of FSDP."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig

STEPS = 20


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


def groups(model: nn.Module) -> list[dict[str, Any]]:
    norms = {id(param) for name, param in model.named_parameters() if "norm" in name}
    params = list(model.parameters())
    return [
        {"params": [param for param in params if id(param) not in norms]},
        {"params": [param for param in params if id(param) in norms], "weight_decay": 0.0},
    ]


def train(
    version: int,
    fields: dict[str, Any] | None,
    sizes: dict[str, Any] | None = None,
    items: bool = False,
    compiled: bool = False,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and norms of 20 steps: AdamW with two groups, accumulation over 2, clipping, float64."""
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=2,
        fsdp_plugin=None if fields is None else plugin(version, **fields),
        parallelism_config=None if sizes is None else ParallelismConfig(**sizes),
        dynamo_backend="eager" if compiled else None,
    )
    torch.manual_seed(accelerator.process_index)  # ranks start from the weights of rank 0
    model = Tiny().double()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    tokens = torch.randint(0, 11, (STEPS * 2 * 8, 5), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(tokens), batch_size=8 // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    norms = []
    for (batch,) in loader:
        with accelerator.accumulate(model):
            guesses, truths = model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
            if items:
                loss = cross_entropy(guesses, truths, reduction="sum")
                accelerator.backward(loss, num_items=truths.numel())
            else:
                accelerator.backward(cross_entropy(guesses, truths))
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
    state = accelerator.get_state_dict(model)
    assert bool(state) == accelerator.is_main_process or fields is None
    return dict(state), norms
