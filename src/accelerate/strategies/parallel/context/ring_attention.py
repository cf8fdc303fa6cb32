"""Attention over a sequence that is cut over ranks: each rank has the queries, keys and values of its own tokens.

`SequenceSharding` maps chunks of the sequence to ranks. `allgather_kv_attention` all-gathers keys and values;
`ring_attention` passes them from rank to rank and merges the partial results. Both are exact, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# The names since torch 2.13, and before.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_QUERY_BLOCK = 256
"""Queries for which scores and masks are in memory at a time: that many by the length of the sequence, not its square."""
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class SequenceSharding:
    """Which chunks of a sequence each rank has.

    Attributes:
        ranks: How many share the sequence.
        balanced: Each rank has two chunks, one from the head and one from the tail, so that a causal mask leaves all ranks
            the same work. False: one chunk each, in order.
    """

    ranks: int
    head_tail: bool

    @classmethod
    def for_length(
        cls, length: int, ranks: int, *, setting: str = "cp_size", contiguous: bool = False
    ) -> SequenceSharding:
        """The layout for sequences of this length.

        Args:
            length: The number of tokens.
            ranks: How many share them.
            setting: What has set that number, for the message.
            in_order: Each rank has one piece, whatever the length.

        Raises:
            ValueError: when it cannot be cut into equal parts, showing the arithmetic.
        """
        if length % ranks:
            best = "" if contiguous else f", best of {2 * ranks}, which shares the work evenly as well"
            raise ValueError(
                f"a sequence of {length} tokens cannot be cut into {ranks} equal parts ({setting}={ranks}), since "
                f"{length} = {length // ranks} x {ranks} + {length % ranks}: pad it to a multiple of {ranks}{best}."
            )
        return cls(ranks, not contiguous and length % (2 * ranks) == 0)

    @property
    def num_chunks(self) -> int:
        """How many chunks the sequence has."""
        return self.ranks * (2 if self.head_tail else 1)

    def chunks_of_rank(self, rank: int) -> tuple[int, ...]:
        """The numbers of a rank's chunks, in the order in which it holds them."""
        return (rank, self.num_chunks - 1 - rank) if self.head_tail else (rank,)

    def shard(self, tensor: Tensor, dim: int, rank: int) -> Tensor:
        """A copy of the rank's part of a tensor with the whole sequence along `dim`."""
        chunks = tensor.chunk(self.num_chunks, dim)
        return torch.cat([chunks[number] for number in self.chunks_of_rank(rank)], dim)

    def unshard(self, parts: list[Tensor], dim: int) -> Tensor:
        """The whole sequence in its order, from all ranks' parts."""
        chunks: dict[int, Tensor] = {}
        for rank, part in enumerate(parts):
            numbers = self.chunks_of_rank(rank)
            chunks.update(zip(numbers, part.chunk(len(numbers), dim), strict=True))
        return torch.cat([chunks[number] for number in range(self.num_chunks)], dim)


# All keys and values on every rank -----------------------------------------------------------------------------------


class _AllGather(torch.autograd.Function):
    """Stacks all ranks' tensors; in the backward, each rank receives the sum of what all ranks say of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        stacked = tensor.new_empty((group.size(), *tensor.shape))
        _all_gather_single(stacked.flatten(0, 1), tensor.contiguous(), group=group)
        return stacked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        own = torch.empty_like(grads[0][0], memory_format=torch.contiguous_format)
        _reduce_scatter_single(own, grads[0].contiguous().flatten(0, 1), group=ctx.group)
        return own, None


def allgather_kv_attention(
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: ProcessGroup,
    sharding: SequenceSharding,
    is_causal: bool,
    **more: Any,
) -> Tensor:
    """Attention of this rank's queries to all keys and values.

    Args:
        attention: What computes it, as ``torch.nn.functional.scaled_dot_product_attention`` does.
        query, key, value: This rank's, the sequence in the last dimension but one.
        group: The ranks that share the sequence.
        layout: Which of it each has.
        is_causal: A token sees itself and those before it, in the order of the whole sequence.
        **more: For `attention`.
    """
    width = key.shape[-1]
    both = sharding.unshard(list(_AllGather.apply(torch.cat([key, value], -1), group)), -2)
    keys, values = both.split([width, both.shape[-1] - width], -1)
    if not is_causal:
        return attention(query, keys, values, **more)
    numbers = sharding.chunks_of_rank(dist.get_rank(group))
    length = query.shape[-2] // len(numbers)
    if length > _QUERY_BLOCK and more.pop("enable_gqa", False):  # once, instead of in every block
        keys, values = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (keys, values))
    rows = min(_QUERY_BLOCK, length)
    # The masks of all blocks are parts of this one, right-aligned: a block's last row sees all keys up to itself.
    bias = torch.full((rows, keys.shape[-2]), -torch.inf, dtype=query.dtype, device=query.device)
    bias = bias.triu(keys.shape[-2] - rows + 1)
    results = []
    for number, own in zip(numbers, query.chunk(len(numbers), -2), strict=True):
        for start, stop in _query_blocks(length):
            seen = number * length + stop
            mask = bias[rows - (stop - start) :, bias.shape[1] - seen :]
            if mask.device.type != "cpu":
                mask = mask.contiguous()  # kernels read aligned rows
            block = own[..., start:stop, :]
            results.append(attention(block, keys[..., :seen, :], values[..., :seen, :], attn_mask=mask, **more))
    return torch.cat(results, -2)


def _query_blocks(length: int) -> Iterator[tuple[int, int]]:
    """Start and end of the blocks of a chunk's queries that see keys together."""
    return ((start, min(start + _QUERY_BLOCK, length)) for start in range(0, length, _QUERY_BLOCK))


# Keys and values in a ring -------------------------------------------------------------------------------------------


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: ProcessGroup,
    sharding: SequenceSharding,
    is_causal: bool,
    scale: float | None = None,
) -> Tensor:
    """The same, with one other rank's keys and values in memory at a time. See `allgather_kv_attention`.

    Args:
        scale: Factor on the products of queries and keys; None: one over the root of their width.
    """
    own = torch.stack([key, value]) if key.shape == value.shape else None
    if own is None or query.dim() != 4:
        raise ValueError(
            f"cp_comm_strategy='alltoall' takes queries of four dimensions, and keys and values of one shape; found "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}. Use 'allgather'."
        )
    grouped = query.unflatten(1, (key.shape[1], -1))  # several heads of queries may share a head of keys
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):  # it would round what is computed exactly here
        result: Tensor = _RingAttention.apply(grouped, own.unsqueeze(3), group, sharding, is_causal, factor)
    return result.flatten(1, 2)


class _RingAttention(torch.autograd.Function):
    """Merges what each rank's keys and values give by the logarithms of their sums of exponentials."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        own: Tensor,
        group: ProcessGroup,
        sharding: SequenceSharding,
        causal: bool,
        scale: float,
    ) -> Tensor:
        ctx.how = group, sharding, causal, scale
        exact = torch.promote_types(query.dtype, torch.float32)
        result = torch.zeros((*query.shape[:-1], own.shape[-1]), dtype=exact, device=query.device)
        total = torch.full((*query.shape[:-1], 1), -torch.inf, dtype=exact, device=query.device)
        there = own
        for step in range(sharding.ranks):
            there = _ring_shift(there, group) if step else there
            for mine, theirs, diagonal in _visible_chunk_pairs(sharding, dist.get_rank(group), step, causal):
                key, value = _chunk(there, theirs, sharding).to(exact)
                for start, stop in _query_blocks(key.shape[-2]):
                    seen = stop if diagonal else key.shape[-2]
                    asked, so_far, known = (
                        _chunk(tensor, mine, sharding)[..., start:stop, :] for tensor in (query, result, total)
                    )
                    score = _scores(asked.to(exact), key[..., :seen, :], scale, diagonal)
                    here = score.logsumexp(-1, keepdim=True)
                    both = torch.logaddexp(known, here)
                    so_far.mul_(torch.exp(known - both)).add_(torch.exp(score - both) @ value[..., :seen, :])
                    known.copy_(both)
        ctx.save_for_backward(query, own, result, total)
        return result.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, own, result, total = ctx.saved_tensors
        group, sharding, causal, scale = ctx.how
        exact = result.dtype
        grad = grads[0].to(exact)
        shift = (grad * result).sum(-1, keepdim=True)
        of_query = torch.zeros_like(query, dtype=exact)
        there, of_there = own, torch.zeros_like(own, dtype=exact)
        for step in range(sharding.ranks):
            there = _ring_shift(there, group) if step else there
            for mine, theirs, diagonal in _visible_chunk_pairs(sharding, dist.get_rank(group), step, causal):
                pair, of_pair = _chunk(there, theirs, sharding).to(exact), _chunk(of_there, theirs, sharding)
                for start, stop in _query_blocks(pair.shape[-2]):
                    seen = stop if diagonal else pair.shape[-2]
                    (key, value), (of_key, of_value) = pair[..., :seen, :], of_pair[..., :seen, :]
                    asked, given, known, moved, of_asked = (
                        _chunk(tensor, mine, sharding)[..., start:stop, :]
                        for tensor in (query, grad, total, shift, of_query)
                    )
                    asked = asked.to(exact)
                    weight = torch.exp(_scores(asked, key, scale, diagonal) - known)
                    of_score = weight * (given @ value.mT - moved) * scale
                    of_asked.add_(of_score @ key)
                    of_key.add_((of_score.mT @ asked).sum(2, keepdim=True))
                    of_value.add_((weight.mT @ given).sum(2, keepdim=True))
            of_there = _ring_shift(of_there, group)  # along with what it belongs to; after the last step it is home
        return of_query.to(query.dtype), of_there.to(own.dtype), None, None, None, None


def _visible_chunk_pairs(
    sharding: SequenceSharding, rank: int, step: int, causal: bool
) -> Iterator[tuple[int, int, bool]]:
    """Of this rank's chunks and those it holds at a step of the ring, the places of the pairs that see each other, and
    whether they are the same chunk under a causal mask."""
    source = (rank - step) % sharding.ranks
    for mine, here in enumerate(sharding.chunks_of_rank(rank)):
        for theirs, there in enumerate(sharding.chunks_of_rank(source)):
            if not causal or there <= here:
                yield mine, theirs, causal and there == here


def _chunk(tensor: Tensor, place: int, sharding: SequenceSharding) -> Tensor:
    held = 2 if sharding.head_tail else 1
    length = tensor.shape[-2] // held
    return tensor.narrow(-2, place * length, length)


def _scores(query: Tensor, key: Tensor, scale: float, diagonal: bool) -> Tensor:
    """Scores of a block of queries; on the diagonal, the last of them sees all keys, and those before one less each."""
    score = query @ key.mT * scale
    if diagonal:
        rows = score.shape[-2]
        later = torch.ones(rows, rows, dtype=torch.bool, device=score.device).triu(1)
        score[..., -rows:].masked_fill_(later, -torch.inf)
    return score


def _ring_shift(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The tensor of the rank before, while the one after receives this."""
    rank, size = dist.get_rank(group), group.size()
    sent, received = tensor.contiguous().view(-1), tensor.new_empty(tensor.numel())
    to, come = [0] * size, [0] * size
    to[(rank + 1) % size] = come[(rank - 1) % size] = tensor.numel()
    dist.all_to_all_single(received, sent, come, to, group=group)
    return received.view(tensor.shape)
