"""What ranks that share sequences made of a batch, as one rank would have made it of the whole sequences.

Pieces of sequences are put together and losses averaged. What is neither, and differs over the ranks, is refused: no one
rank's would be right, and nobody would notice.
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
    """How sequences were cut.

    Attributes:
        length: Of whole ones.
        layout: Who has which part.
    """

    length: int
    sharding: SequenceSharding

    @property
    def local_length(self) -> int:
        """The length of a rank's part."""
        return self.length // self.sharding.ranks


def unshard_outputs(data: Any, peers: Collectives, sequence: ShardedSequence | None) -> Any:
    """The same on each of the ranks that share sequences.

    Args:
        data: A tree of tensors with a row for each sample, or of a value for all of them; or any picklable objects.
        peers: Those ranks, in the order of their parts. All of them call this, with trees of one structure.
        cut: How the sequences were cut that `data` was made of; None: they were whole.

    Returns:
        Tensors with a part's length in dimension 1: those of all ranks, joined along it. Floats, one for each sample or one
        for all, Python's too: the means over the ranks. Everything else: that of the first rank.

    Raises:
        ValueError: when something of the latter is a tensor, was made of parts, and is not the same on all ranks.
    """
    if contains_only_tensors(data):
        return recursively_apply(_unshard_tensor, data, peers, sequence)
    return _merge_objects(peers.all_gather_object(data))


def _has_tokens(tensor: Tensor, length: int) -> bool:
    """Whether a tensor with a row for each sample has so many tokens in each."""
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
    found = peers.all_gather(tensor[None]).unsqueeze(-1).view(torch.uint8)  # as bytes, for NaN is not the same as NaN
    if (found == found[0]).all():
        return tensor
    raise ValueError(
        f"gather_for_metrics was given a tensor of {tensor.dtype} and shape {tuple(tensor.shape)} that is not the same on "
        f"the {peers.size} ranks that share sequences, and dimension 1 is not the sequence shard of {sequence.local_length} "
        f"out of {sequence.length} tokens. Pass per-token values as (samples, tokens, ...), before padding. Pass counts and "
        "sums as floats: they are averaged over those ranks, so that their quotients are right."
    )


def _merge_objects(found: Sequence[Any]) -> Any:
    """What the ranks' objects come to."""
    first = found[0]
    if isinstance(first, float):
        return sum(found) / len(found)
    if isinstance(first, list) and all(isinstance(item, float) for item in first):
        return [sum(items) / len(items) for items in zip(*found, strict=True)]
    return first
