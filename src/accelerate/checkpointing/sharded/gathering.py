"""Gathers a sharded state on rank 0 in buckets, so that other ranks need no more memory than one bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..consensus import checkpoint_group, run_on_all_ranks
from ..errors import SaveError
from .local_state import ExtraState
from .shard_layout import Chunk, LocalShard, is_tiled, narrow_to

_BUCKET_SIZE = 64 * 2**20
_ALIGNMENT = 16

# Key, shape of the full tensor, dtype, and the chunk that the rank sends.
_Offer = tuple[Any, tuple[int, ...], torch.dtype, Chunk]


def gather_full_state(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Gathers the full state in CPU memory of rank 0. Collective.

    Ranks other than 0 send their chunks one rank after the other, in buckets of about 64 MiB. They are sent by gloo over the
    CPU: while rank 0 receives from other ranks, NCCL's watchdog would time out the last one, and NCCL opens a communicator
    per pair.

    Args:
        state: This rank's `LocalShard` tensors, and other values on the rank that owns them.

    Returns:
        The full state on rank 0, in which keys of tied tensors share one tensor; an empty dict on other ranks.
    """
    collectives = checkpoint_group(SaveError)
    tied = _tied_keys(state)
    views = {
        (key, chunk): view
        for key, value in state.items()
        if isinstance(value, LocalShard) and value.layout.is_writer and key not in tied
        for chunk, view in value.chunk_views()
    }
    offer = [(key, state[key].layout.shape, view.dtype, chunk) for (key, chunk), view in views.items()]

    def own() -> Any:
        return (
            offer,
            {key: _picklable(value) for key, value in state.items() if not isinstance(value, LocalShard)},
            tied,
        )

    offers_by_rank = run_on_all_ranks(collectives, "gathering a state on rank 0", own, SaveError)
    result: dict[Any, Any] = {}
    sizes = [_bucket_size(bucket) for offer_, _, _ in offers_by_rank[1:] for bucket in _buckets(offer_)]
    buffer = torch.empty(0)

    def allocate() -> None:
        nonlocal buffer
        # Allocates before the first send: an out-of-memory error in between would leave a peer blocked.
        buffer = torch.empty(max(sizes, default=0), dtype=torch.uint8, device=collectives.device)
        if collectives.rank == 0:
            _check_tiled(offer_ for offers, _, _ in offers_by_rank for offer_ in offers)
            for _, values, _ in offers_by_rank:
                result.update({key: value for key, value in values.items() if key not in result})
            for offer_, _, _ in offers_by_rank:
                for key, shape, dtype, _ in offer_:
                    if key not in result:
                        result[key] = torch.empty(shape, dtype=dtype)

    run_on_all_ranks(collectives, "gathering a state on rank 0", allocate, SaveError)

    def transfer() -> None:
        if collectives.rank:
            for bucket in _buckets(offer):
                for (key, _, _, chunk), view in _bucket_views(buffer, bucket):
                    view.copy_(views[key, chunk])
                collectives.send(buffer[: _bucket_size(bucket)], 0)
            return
        for (key, chunk), view in views.items():
            narrow_to(result[key], chunk, (0,) * len(chunk.offsets)).copy_(view)
        for rank, (offer_, _, _) in enumerate(offers_by_rank[1:], start=1):
            for bucket in _buckets(offer_):
                collectives.receive(buffer[: _bucket_size(bucket)], rank)
                for (key, _, _, chunk), view in _bucket_views(buffer, bucket):
                    narrow_to(result[key], chunk, (0,) * len(chunk.offsets)).copy_(view)

    # Blocks until rank 0 has everything: in a collective of the training, ranks would run into its timeout.
    run_on_all_ranks(collectives, "gathering a state on rank 0", transfer, SaveError)
    if collectives.rank:
        return {}
    for _, _, names in offers_by_rank:
        result.update({key: result[first] for key, first in names.items() if first in result})
    return {key: result[key] for key in (*(k for k in state if k in result), *(k for k in result if k not in state))}


def _tied_keys(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns key -> the first key with the same tensor."""
    first: dict[int, Any] = {}
    tied = {}
    for key, value in state.items():
        if isinstance(value, LocalShard) and first.setdefault(id(value), key) != key:
            tied[key] = first[id(value)]
    return tied


def _check_tiled(offers: Iterable[_Offer]) -> None:
    """Raises if the chunks of all ranks do not tile a tensor, since the gaps would be uninitialized memory."""
    chunks: dict[Any, tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]] = {}
    for key, shape, _, chunk in offers:
        chunks.setdefault(key, (shape, []))[1].append((chunk.offsets, chunk.sizes))
    for key, (shape, found) in chunks.items():
        if not is_tiled(shape, found):
            raise ValueError(f"the shards of {key} overlap or do not cover the shape {list(shape)}")


def _picklable(value: Any) -> Any:
    return value.module.get_extra_state() if isinstance(value, ExtraState) else value


def _buckets(offer: Sequence[_Offer]) -> Iterator[list[_Offer]]:
    """Splits chunks into buckets; sender and receiver compute the same ones."""
    bucket: list[_Offer] = []
    size = 0
    for offer_ in offer:
        bucket.append(offer_)
        size += _aligned_size(offer_)
        if size >= _BUCKET_SIZE:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _aligned_size(offer_: _Offer) -> int:
    """Returns the bytes that a chunk occupies in a bucket, padded to the alignment of every dtype."""
    return -(-offer_[3].numel * offer_[2].itemsize // _ALIGNMENT) * _ALIGNMENT


def _bucket_size(bucket: Sequence[_Offer]) -> int:
    return sum(map(_aligned_size, bucket))


def _bucket_views(buffer: torch.Tensor, bucket: Sequence[_Offer]) -> Iterator[tuple[_Offer, torch.Tensor]]:
    """Yields the view of each chunk in the buffer."""
    start = 0
    for offer_ in bucket:
        _, _, dtype, chunk = offer_
        yield offer_, buffer[start : start + chunk.numel * dtype.itemsize].view(dtype).view(chunk.sizes)
        start += _aligned_size(offer_)
