"""A small language model built like Llama, and what training it comes to however the run is distributed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig

STEPS, BATCH, LENGTH, VOCABULARY = 8, 4, 8, 13


class Attention(nn.Module):
    """Two heads of queries share one of keys and values; positions are rotations."""

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.size = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width // shared, bias=False)
        self.v_proj = nn.Linear(width, width // shared, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, turned: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        queries, keys, values = (
            part.unflatten(-1, (-1, self.size)).transpose(1, 2)
            for part in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        repeats = queries.size(1) // keys.size(1)
        keys, values = (part.repeat_interleave(repeats, dim=1) for part in (turn(keys, *turned), values))
        mixed = functional.scaled_dot_product_attention(turn(queries, *turned), keys, values, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, 2 * width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width)
        self.self_attn = Attention(width, heads, shared)
        self.post_attention_layernorm = nn.RMSNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: torch.Tensor, turned: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turned)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Tied embeddings, a frozen part, a buffer that is not saved, a vocabulary that no number of ranks divides."""

    _no_split_modules = ["DecoderLayer"]
    frequencies: torch.Tensor
    _tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "lm_head": "colwise_gather_output",
    }

    def __init__(self, width: int = 8, heads: int = 4, shared: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([DecoderLayer(width, heads, shared) for _ in range(layers)])
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        size = width // heads
        frequencies = 1 / 100 ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.get_parameter("layers.0.mlp.up_proj.weight").requires_grad_(False)
        self.get_parameter("layers.1.input_layernorm.weight").requires_grad_(False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device)
        angles = positions[..., None].to(self.frequencies.dtype) * self.frequencies
        hidden = self.embed_tokens(tokens)
        turned = (angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype))
        for layer in self.layers:
            hidden = layer(hidden, turned)
        return self.lm_head(self.norm(hidden))


def turn(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of features by their positions' angles."""
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cosines - other * sines, one * sines + other * cosines], dim=-1)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Norms without weight decay, as one does."""
    norms = {id(param) for name, param in model.named_parameters() if "norm" in name}
    params = list(model.parameters())
    return [
        {"params": [param for param in params if id(param) not in norms]},
        {"params": [param for param in params if id(param) in norms], "weight_decay": 0.0},
    ]


def train(
    fsdp: dict[str, Any] | None = None,
    sizes: dict[str, Any] | None = None,
    items: bool = False,
    late: bool = False,
    lacking: bool = False,
    clip_value: bool = False,
    **more: Any,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and norms of `STEPS` steps in float64: AdamW with two groups, accumulation over 2, clipping.

    Args:
        fsdp: Fields of the plugin; None: no plugin.
        sizes: Of the device mesh.
        items: Divide by the exact number of tokens.
        late: Make the optimizer of the prepared model.
        lacking: Ranks other than 0 have no weights.
        clip_value: Clip values as well as norms.
        **more: For the Accelerator.
    """
    accelerator = Accelerator(
        cpu=True,
        split_batches=True,
        fsdp_plugin=None if fsdp is None else FullyShardedDataParallelPlugin(**fsdp),
        parallelism_config=None if sizes is None else ParallelismConfig(**sizes),
        **{"gradient_accumulation_steps": 2, **more},
    )
    torch.manual_seed(accelerator.process_index)  # ranks start from the weights of rank 0
    with torch.device("meta" if lacking and not accelerator.is_main_process else "cpu"):
        model: Any = Llama().double()
    if late:
        model = accelerator.prepare(model)
    optimizer: Any = torch.optim.AdamW(groups(model), lr=1e-2)
    rows = torch.randint(0, VOCABULARY, (STEPS * 2 * BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    loader: Any = DataLoader(TensorDataset(rows[:, :-1], rows[:, 1:]), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    norms = []
    for tokens, truths in loader:
        positions = torch.arange(LENGTH)
        whole = [tokens, truths, positions]
        shared = accelerator.maybe_context_parallel(whole, [1, 1, 0], no_restore_buffers={tokens})
        with accelerator.accumulate(model), shared:
            predictions = model(tokens, positions).flatten(0, 1)
            if items:
                loss = functional.cross_entropy(predictions, truths.flatten(), reduction="sum")
                accelerator.backward(loss, num_items=truths.numel())
            else:
                accelerator.backward(functional.cross_entropy(predictions, truths.flatten()))
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
                if clip_value:
                    accelerator.clip_grad_value_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    state = accelerator.get_state_dict(model)
    assert bool(state) == accelerator.is_main_process or fsdp is None
    return {name: value.detach().clone() for name, value in state.items()}, norms
