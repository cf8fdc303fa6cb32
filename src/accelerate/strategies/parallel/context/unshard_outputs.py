"""Unshards per-rank outputs of context parallelism for metrics.

Sequence shards are all-gathered and joined, and floats (losses) averaged. Other tensors must be equal on all ranks: if they
differ, an error is raised, since the value of any one rank would be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....runtime.collective_backend import Collectives
from ....runtime.tensors.pytree import contains_only_tensors, recursively_apply
from .ring_attention import SequenceSharding


@dataclass(frozen=True)
class ShardedSequence:
    """Length and sharding of the sequences of a batch.

    Attributes:
        length: Number of tokens of a whole sequence.
        sharding: Chunks of each rank.
    """

    length: int
    sharding: SequenceSharding

    @property
    def local_length(self) -> int:
        """Number of tokens of a rank's shard."""
        return self.length // self.sharding.ranks


def unshard_outputs(data: Any, peers: Collectives, sequence: ShardedSequence | None) -> Any:
    """Unshards data over the ranks that share sequences. Collective.

    Args:
        data: Tree of tensors, with a row for each sample or a value for all; or any picklable objects. The structure is
            the same on all ranks.
        peers: Ranks that share sequences, in order of their shards.
        sequence: Sharding of the sequences that `data` was computed from; None if they were whole.

    Returns:
        Tensors whose dimension 1 is a sequence shard are joined along it. Floats, one for each sample or one for all, are
        averaged over the ranks. Everything else is the first rank's.

    Raises:
        ValueError: if a tensor that was computed from shards is neither, and differs between the ranks.
    """
    if contains_only_tensors(data):
        return recursively_apply(_unshard_tensor, data, peers, sequence)
    return _merge_objects(peers.all_gather_object(data))


def _has_tokens(tensor: Tensor, length: int) -> bool:
    """Returns whether dimension 1 of a tensor is a sequence of this length."""
    return tensor.ndim > 1 and tensor.shape[1] == length


def _unshard_tensor(tensor: Tensor, peers: Collectives, sequence: ShardedSequence | None) -> Tensor:
    here = tensor.detach().to(peers.device)
    if sequence is not None and _has_tokens(here, sequence.local_length):
        parts = peers.all_gather(here).tensor_split(peers.size)
        together = sequence.sharding.unshard(list(parts), 1)
    elif here.is_floating_point() and here.ndim < 2:
        summed = here.float() if here.itemsize < 4 else here.clone()
        together = (peers.all_reduce(summed) / peers.size).to(here.dtype)
    elif sequence is None or _has_tokens(here, sequence.length):
        together = peers.broadcast(here.clone(memory_format=torch.contiguous_format))
    else:
        together = _require_equal(here, peers, sequence)
    return together.to(tensor.device)


def _require_equal(tensor: Tensor, peers: Collectives, sequence: ShardedSequence) -> Tensor:
    found = peers.all_gather(tensor[None]).unsqueeze(-1).view(torch.uint8)  # compared as bytes, since NaN != NaN
    if (found == found[0]).all():
        return tensor
    raise ValueError(
        f"gather_for_metrics was given a tensor of {tensor.dtype} and shape {tuple(tensor.shape)} that is not the same on "
        f"the {peers.size} ranks that share sequences, and dimension 1 is not the sequence shard of {sequence.local_length} "
        f"out of {sequence.length} tokens. Pass per-token values as (samples, tokens, ...), before padding. Pass counts and "
        "sums as floats: they are averaged over those ranks, so that their quotients are right."
    )


def _merge_objects(found: Sequence[Any]) -> Any:
    """Averages floats, and lists of floats; returns other objects of the first rank."""
    first = found[0]
    if isinstance(first, float):
        return sum(found) / len(found)
    if isinstance(first, list) and all(isinstance(item, float) for item in first):
        return [sum(items) / len(items) for items in zip(*found, strict=True)]
    return first
