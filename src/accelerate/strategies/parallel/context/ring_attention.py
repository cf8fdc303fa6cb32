"""Context-parallel attention: each rank holds the queries, keys and values of its shard of the sequence.

`SequenceSharding` maps chunks of the sequence to ranks. `allgather_kv_attention` all-gathers keys and values.
`ring_attention` sends them around a ring and merges partial results by their log-sum-exp, as flash attention merges blocks
(Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023). Both are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed these functions.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_QUERY_BLOCK = 256
"""Queries per block: scores and masks take _QUERY_BLOCK x sequence length in memory, not the length squared."""
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class SequenceSharding:
    """Maps the chunks of a sequence to ranks.

    Attributes:
        ranks: Number of ranks that share the sequence.
        head_tail: Whether each rank has two chunks, one from the head and one from the tail, which balances the work of
            a causal mask. Otherwise each rank has one chunk, in order of rank.
    """

    ranks: int
    head_tail: bool

    @classmethod
    def for_length(
        cls, length: int, ranks: int, *, setting: str = "cp_size", contiguous: bool = False
    ) -> SequenceSharding:
        """Returns the sharding of a sequence: head-tail if its length allows it.

        Args:
            length: Number of tokens.
            ranks: Number of ranks that share them.
            setting: Name of the setting of `ranks`, for the error.
            contiguous: Give each rank one chunk, whatever the length.

        Raises:
            ValueError: if `ranks` does not divide `length`; shows the arithmetic.
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
        """Number of chunks of the sequence."""
        return self.ranks * (2 if self.head_tail else 1)

    def chunks_of_rank(self, rank: int) -> tuple[int, ...]:
        """Returns the chunk numbers of a rank, in the order in which it holds them."""
        return (rank, self.num_chunks - 1 - rank) if self.head_tail else (rank,)

    def shard(self, tensor: Tensor, dim: int, rank: int) -> Tensor:
        """Copies a rank's shard out of a tensor with the whole sequence along `dim`."""
        chunks = tensor.chunk(self.num_chunks, dim)
        return torch.cat([chunks[number] for number in self.chunks_of_rank(rank)], dim)

    def unshard(self, parts: list[Tensor], dim: int) -> Tensor:
        """Restores the whole sequence, in order, from the shards of all ranks."""
        chunks: dict[int, Tensor] = {}
        for rank, part in enumerate(parts):
            numbers = self.chunks_of_rank(rank)
            chunks.update(zip(numbers, part.chunk(len(numbers), dim), strict=True))
        return torch.cat([chunks[number] for number in range(self.num_chunks)], dim)


# KV all-gather -------------------------------------------------------------------------------------------------------


class _AllGather(torch.autograd.Function):
    """All-gathers and stacks a tensor of each rank; the backward reduce-scatters the gradients."""

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
    """All-gathers keys and values, and computes the attention of this rank's queries to all of them.

    A causal mask is applied block by block of queries: each block attends to the keys up to its last row only.

    Args:
        attention: Function with the signature of ``torch.nn.functional.scaled_dot_product_attention``.
        query, key, value: This rank's shard, of shape (..., heads, tokens, width).
        group: Ranks that share the sequence.
        sharding: Chunks of each rank.
        is_causal: Whether a token attends only to itself and earlier tokens of the whole sequence.
        **more: Passed to `attention`.
    """
    width = key.shape[-1]
    both = sharding.unshard(list(_AllGather.apply(torch.cat([key, value], -1), group)), -2)
    keys, values = both.split([width, both.shape[-1] - width], -1)
    if not is_causal:
        return attention(query, keys, values, **more)
    numbers = sharding.chunks_of_rank(dist.get_rank(group))
    length = query.shape[-2] // len(numbers)
    if length > _QUERY_BLOCK and more.pop("enable_gqa", False):  # here once, not in every block
        keys, values = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (keys, values))
    rows = min(_QUERY_BLOCK, length)
    # The mask of each block is a right-aligned slice of this bias: its last row attends to all keys up to itself.
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
    """Yields start and stop of each block of queries in a chunk."""
    return ((start, min(start + _QUERY_BLOCK, length)) for start in range(0, length, _QUERY_BLOCK))


# Ring attention ------------------------------------------------------------------------------------------------------


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
    """Computes ring attention: keys and values of one other rank are in memory at a time.

    At step *i* a rank holds the keys and values of rank ``rank - i``, attends to them, merges the partial result into its
    own, and sends them to the next rank. The backward runs the same ring, and gradients travel along with their tensors.

    Args:
        query, key, value, group, sharding, is_causal: See `allgather_kv_attention`; of four dimensions.
        scale: Factor of the scores; None means ``query.shape[-1] ** -0.5``.

    Raises:
        ValueError: if keys and values have different shapes, or queries not four dimensions.
    """
    own = torch.stack([key, value]) if key.shape == value.shape else None
    if own is None or query.dim() != 4:
        raise ValueError(
            f"cp_comm_strategy='alltoall' takes queries of four dimensions, and keys and values of one shape; found "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}. Use 'allgather'."
        )
    grouped = query.unflatten(1, (key.shape[1], -1))  # grouped-query attention
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the float32 accumulation
        result: Tensor = _RingAttention.apply(grouped, own.unsqueeze(3), group, sharding, is_causal, factor)
    return result.flatten(1, 2)


class _RingAttention(torch.autograd.Function):
    """Merges partial results of the ring steps, weighted by the exponentials of their log-sum-exps."""

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
            of_there = _ring_shift(
                of_there, group
            )  # after the last shift, gradients are on the rank that owns the keys
        return of_query.to(query.dtype), of_there.to(own.dtype), None, None, None, None


def _visible_chunk_pairs(
    sharding: SequenceSharding, rank: int, step: int, causal: bool
) -> Iterator[tuple[int, int, bool]]:
    """Yields the pairs of local query chunk and visiting key chunk that attend at a step of the ring.

    The third item is True for the diagonal: both are the same chunk, under a causal mask.
    """
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
    """Computes the scores of a block of queries; on the diagonal, the causal mask is right-aligned."""
    score = query @ key.mT * scale
    if diagonal:
        rows = score.shape[-2]
        later = torch.ones(rows, rows, dtype=torch.bool, device=score.device).triu(1)
        score[..., -rows:].masked_fill_(later, -torch.inf)
    return score


def _ring_shift(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Sends a tensor to the next rank, and returns the one of the previous rank."""
    rank, size = dist.get_rank(group), group.size()
    sent, received = tensor.contiguous().view(-1), tensor.new_empty(tensor.numel())
    to, come = [0] * size, [0] * size
    to[(rank + 1) % size] = come[(rank - 1) % size] = tensor.numel()
    dist.all_to_all_single(received, sent, come, to, group=group)
    return received.view(tensor.shape)
