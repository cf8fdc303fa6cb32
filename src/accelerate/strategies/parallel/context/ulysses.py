"""Attention over a sequence that is cut over ranks in order: they exchange its pieces for heads, and back (Ulysses).

Each rank then attends with some heads over the whole sequence, with the function, the mask and the dropout that one rank
alone would use. Two exchanges carry a layer's attention, and two its backward.
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
    """Attention of this rank's tokens to those of all ranks.

    Args:
        attention: What computes it, as ``torch.nn.functional.scaled_dot_product_attention`` does.
        query, key, value: Of this rank's tokens: heads in the last dimension but two, tokens in the last but one.
        group: The ranks that share the sequence, in its order.
        attn_mask: Of the whole sequence, for all heads or for each.
        **more: For `attention`.

    Raises:
        ValueError: when the heads of queries cannot be shared out, showing the arithmetic.
    """
    ranks, heads = group.size(), query.shape[-3] if query.dim() > 2 else 1
    if heads % ranks:
        raise ValueError(
            f"sequence parallelism shares out a layer's heads, and {divisibility_error(f'{heads} heads', heads, ranks)}: "
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
    """The arithmetic of a number that ranks cannot share."""
    return f"sp_size={ranks} does not divide {what}, {number} = {number // ranks} x {ranks} + {number % ranks}"


def _repeat_kv_heads(part: Tensor, ranks: int) -> Tensor:
    """Keys or values whose heads can be shared out. Where several heads of queries have one of them, it may have to go to
    several ranks. As `ranks` divides the heads of queries, these stay with their own."""
    copies = ranks // math.gcd(part.shape[-3], ranks)
    return part if copies == 1 else part.repeat_interleave(copies, -3)


def _seq_to_heads(parts: Sequence[Tensor], group: ProcessGroup) -> Sequence[Tensor]:
    """This rank's heads of the whole sequence, from all heads of its tokens."""
    by_rank = [part.unflatten(-3, (group.size(), -1)).movedim(-4, 0) for part in parts]
    received: Tensor = _AllToAll.apply(torch.cat(by_rank, -3), group)
    return received.movedim(0, -3).flatten(-3, -2).split([part.shape[-3] for part in by_rank], -3)


def _heads_to_seq(result: Tensor, group: ProcessGroup) -> Tensor:
    """All heads of this rank's tokens, from its heads of the whole sequence."""
    by_rank = result.unflatten(-2, (group.size(), -1)).movedim(-3, 0)
    received: Tensor = _AllToAll.apply(by_rank, group)
    return received.movedim(0, -4).flatten(-4, -3)


class _AllToAll(torch.autograd.Function):
    """Sends the i-th piece along the first dimension to rank i. Its backward is the same: gradients go where pieces came
    from."""

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
