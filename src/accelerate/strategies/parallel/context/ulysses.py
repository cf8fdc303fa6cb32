"""Ulysses attention: an all-to-all turns sequence shards into head shards, and another turns the result back.

Between the two, each rank computes some heads of the attention over the whole sequence, with the function, mask and
dropout of a single process. A layer takes two all-to-alls in its forward and two in its backward (Jacobs et al.,
"DeepSpeed Ulysses", 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def ulysses_attention(
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: ProcessGroup,
    attn_mask: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """Computes the attention of this rank's tokens to those of all ranks, with heads exchanged by all-to-all.

    Args:
        attention: Function with the signature of ``torch.nn.functional.scaled_dot_product_attention``.
        query, key, value: This rank's sequence shard, of shape (..., heads, tokens, width).
        group: Ranks that share the sequence, in order of their shards.
        attn_mask: Mask of the whole sequence, one for all heads or one for each.
        **more: Passed to `attention`.

    Raises:
        ValueError: if the number of ranks does not divide the query heads; shows the arithmetic.
    """
    ranks, heads = group.size(), query.shape[-3] if query.dim() > 2 else 1
    if heads % ranks:
        raise ValueError(
            f"sequence parallelism divides heads over ranks, and {divisibility_error(f'{heads} heads', heads, ranks)}: "
            "choose a sp_size that does."
        )
    key, value = (_repeat_kv_heads(part, ranks) for part in (key, value))
    if key.shape == value.shape and query.shape[:-3] == key.shape[:-3] and query.shape[-1] == key.shape[-1]:
        query, key, value = _seq_to_heads([query, key, value], group)
    else:
        query, key, value = (_seq_to_heads([part], group)[0] for part in (query, key, value))
    if attn_mask is not None and attn_mask.dim() > 2 and attn_mask.shape[-3] > 1:
        attn_mask = attn_mask.chunk(ranks, -3)[dist.get_rank(group)]
    return _heads_to_seq(attention(query, key, value, attn_mask=attn_mask, **more), group)


def divisibility_error(what: str, number: int, ranks: int) -> str:
    """Formats the arithmetic of a number that ranks do not divide."""
    return f"sp_size={ranks} does not divide {what}, {number} = {number // ranks} x {ranks} + {number % ranks}"


def _repeat_kv_heads(part: Tensor, ranks: int) -> Tensor:
    """Repeats KV heads until the number of ranks divides them (grouped-query attention).

    As `ranks` divides the query heads, each query head stays on the rank of its KV head.
    """
    copies = ranks // math.gcd(part.shape[-3], ranks)
    return part if copies == 1 else part.repeat_interleave(copies, -3)


def _seq_to_heads(parts: Sequence[Tensor], group: ProcessGroup) -> Sequence[Tensor]:
    """Exchanges sequence shards for head shards: from all heads of this rank's tokens to some heads of all tokens."""
    by_rank = [part.unflatten(-3, (group.size(), -1)).movedim(-4, 0) for part in parts]
    received: Tensor = _AllToAll.apply(torch.cat(by_rank, -3), group)
    return received.movedim(0, -3).flatten(-3, -2).split([part.shape[-3] for part in by_rank], -3)


def _heads_to_seq(result: Tensor, group: ProcessGroup) -> Tensor:
    """Exchanges head shards for sequence shards: the inverse of `_seq_to_heads`."""
    by_rank = result.unflatten(-2, (group.size(), -1)).movedim(-3, 0)
    received: Tensor = _AllToAll.apply(by_rank, group)
    return received.movedim(0, -4).flatten(-4, -3)


class _AllToAll(torch.autograd.Function):
    """Sends the i-th slice along dimension 0 to rank i. The backward is the same all-to-all."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        sent = pieces.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        sent: Tensor = _AllToAll.apply(grads[0], ctx.group)
        return sent, None
