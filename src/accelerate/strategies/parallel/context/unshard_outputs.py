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
from .ring_attention import Layout


@dataclass(frozen=True)
class Cut:
    """How sequences were cut.

    Attributes:
        length: Of whole ones.
        layout: Who has which part.
    """

    length: int
    layout: Layout

    @property
    def piece(self) -> int:
        """The length of a rank's part."""
        return self.length // self.layout.ranks


def put_together(data: Any, peers: Collectives, cut: Cut | None) -> Any:
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
        return recursively_apply(_of_all, data, peers, cut)
    return _of_objects(peers.all_gather_object(data))


def _has_tokens(tensor: Tensor, count: int) -> bool:
    """Whether a tensor with a row for each sample has so many tokens in each."""
    return tensor.ndim > 1 and tensor.shape[1] == count


def _of_all(tensor: Tensor, peers: Collectives, cut: Cut | None) -> Tensor:
    here = tensor.detach().to(peers.device)
    if cut is not None and _has_tokens(here, cut.piece):
        parts = peers.all_gather(here).tensor_split(peers.size)
        together = cut.layout.joined(list(parts), 1)
    elif here.is_floating_point() and here.ndim < 2:
        summed = here.float() if here.itemsize < 4 else here.clone()
        together = (peers.all_reduce(summed) / peers.size).to(here.dtype)
    elif cut is None or _has_tokens(here, cut.length):
        together = peers.broadcast(here.clone(memory_format=torch.contiguous_format))
    else:
        together = _the_same(here, peers, cut)
    return together.to(tensor.device)


def _the_same(tensor: Tensor, peers: Collectives, cut: Cut) -> Tensor:
    found = peers.all_gather(tensor[None]).unsqueeze(-1).view(torch.uint8)  # as bytes, for NaN is not the same as NaN
    if (found == found[0]).all():
        return tensor
    raise ValueError(
        f"gather_for_metrics was given a tensor of {tensor.dtype} and shape {tuple(tensor.shape)} that is not the same on "
        f"the {peers.size} ranks that share sequences, and it has no dimension 1 of the {cut.piece} tokens that each has of "
        f"{cut.length}, to be joined along. Pass what there is of each token as (samples, tokens, ...), and before it is "
        "padded. Pass counts and sums as floats: they are averaged over those ranks, so that quotients of them are right."
    )


def _of_objects(found: Sequence[Any]) -> Any:
    """What the ranks' objects come to."""
    first = found[0]
    if isinstance(first, float):
        return sum(found) / len(found)
    if isinstance(first, list) and all(isinstance(item, float) for item in first):
        return [sum(items) / len(items) for items in zip(*found, strict=True)]
    return first
