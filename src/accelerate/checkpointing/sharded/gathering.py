"""Gathers a sharded state on rank 0 in buckets, so that other ranks need no more memory than one bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ...runtime import world
from ..consensus import checkpoint_group, run_on_all_ranks
from ..errors import SaveError
from .local_state import ExtraState
from .shard_layout import Chunk, LocalShard, check_tiled, narrow_to

_BUCKET_SIZE = 64 * 2**20
_ALIGNMENT = 16


class _Offer(NamedTuple):
    """A chunk that a rank sends; key, shape and dtype are those of the full tensor."""

    key: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunk: Chunk

    @property
    def nbytes(self) -> int:
        return self.chunk.numel * self.dtype.itemsize

    @property
    def aligned_nbytes(self) -> int:
        """Bytes that the chunk occupies in a bucket, padded to the alignment of every dtype."""
        return -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT

    def view_in(self, full: Mapping[Any, torch.Tensor]) -> torch.Tensor:
        """Returns the chunk's view of the full tensor."""
        return narrow_to(full[self.key], self.chunk, (0,) * len(self.shape))


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
    collectives = checkpoint_group(world.current().collectives, SaveError)
    tied = _tied_keys(state)
    views = {
        _Offer(key, value.layout.shape, view.dtype, chunk): view
        for key, value in state.items()
        if isinstance(value, LocalShard) and value.layout.is_writer and key not in tied
        for chunk, view in value.chunk_views()
    }

    def own_part() -> Any:
        other = {
            key: value.module.get_extra_state() if isinstance(value, ExtraState) else value
            for key, value in state.items()
            if not isinstance(value, LocalShard)
        }
        return list(views), other, tied

    parts = run_on_all_ranks(collectives, "gathering a state on rank 0", own_part, SaveError)
    buckets = [list(_buckets(offers)) for offers, _, _ in parts]
    result: dict[Any, Any] = {}
    buffer = torch.empty(0)

    def allocate() -> None:
        nonlocal buffer
        # Allocates before the first send: an out-of-memory error in between would leave a peer blocked.
        size = max((_bucket_nbytes(bucket) for of_rank in buckets[1:] for bucket in of_rank), default=0)
        buffer = torch.empty(size, dtype=torch.uint8, device=collectives.device)
        if collectives.rank == 0:
            offers = [offer for of_rank, _, _ in parts for offer in of_rank]
            _check_tiled(offers)
            for _, values, _ in parts:
                result.update({key: value for key, value in values.items() if key not in result})
            for offer in offers:
                if offer.key not in result:
                    result[offer.key] = torch.empty(offer.shape, dtype=offer.dtype)

    run_on_all_ranks(collectives, "gathering a state on rank 0", allocate, SaveError)

    def transfer() -> None:
        if collectives.rank:
            for bucket in buckets[collectives.rank]:
                for offer, view in _bucket_views(buffer, bucket):
                    view.copy_(views[offer])
                collectives.send(buffer[: _bucket_nbytes(bucket)], 0)
            return
        for offer, view in views.items():
            offer.view_in(result).copy_(view)
        for rank in range(1, len(parts)):
            for bucket in buckets[rank]:
                collectives.receive(buffer[: _bucket_nbytes(bucket)], rank)
                for offer, view in _bucket_views(buffer, bucket):
                    offer.view_in(result).copy_(view)

    # Blocks until rank 0 has everything: in a collective of the training, ranks would run into its timeout.
    run_on_all_ranks(collectives, "gathering a state on rank 0", transfer, SaveError)
    if collectives.rank:
        return {}
    for _, _, names in parts:
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
    for offer in offers:
        chunks.setdefault(offer.key, (offer.shape, []))[1].append((offer.chunk.offsets, offer.chunk.sizes))
    for key, (shape, found) in chunks.items():
        check_tiled(key, shape, found)


def _buckets(offers: Sequence[_Offer]) -> Iterator[list[_Offer]]:
    """Splits chunks into buckets; sender and receiver compute the same ones."""
    bucket: list[_Offer] = []
    size = 0
    for offer in offers:
        bucket.append(offer)
        size += offer.aligned_nbytes
        if size >= _BUCKET_SIZE:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _bucket_nbytes(bucket: Sequence[_Offer]) -> int:
    return sum(offer.aligned_nbytes for offer in bucket)


def _bucket_views(buffer: torch.Tensor, bucket: Sequence[_Offer]) -> Iterator[tuple[_Offer, torch.Tensor]]:
    """Yields the view of each chunk in the buffer."""
    start = 0
    for offer in bucket:
        yield offer, buffer[start : start + offer.nbytes].view(offer.dtype).view(offer.chunk.sizes)
        start += offer.aligned_nbytes
