"""States that ranks share, whole in the memory of rank 0: a stretch of bytes at a time, and nothing more on other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..runtime.transport import Collectives
from .errors import SaveError
from .joint import together
from .live import ExtraState
from .pieces import Box, Held, part_of

_STRETCH = 64 * 2**20

# Key, shape of the whole tensor, number format, and the box of it that a rank sends.
_Offered = tuple[Any, tuple[int, ...], torch.dtype, Box]


def gathered(collectives: Collectives, state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The whole state on the CPU of rank 0, in memory of its own, and an empty one elsewhere. Collective.

    Args:
        collectives: The ranks.
        state: Each rank's part: `Held` tensors, and other values where this rank is the one to give them. Keys of one
            tensor (tied names) share it afterwards, too.
    """
    tied = _tied(state)
    pieces = {
        (key, box): piece
        for key, value in state.items()
        if isinstance(value, Held) and value.layout.writes and key not in tied
        for box, piece in value.pieces()
    }
    offer = [(key, state[key].layout.shape, piece.dtype, box) for (key, box), piece in pieces.items()]

    def own() -> Any:  # modules say what they hold besides tensors
        return offer, {key: _other(value) for key, value in state.items() if not isinstance(value, Held)}, tied

    told = together(collectives, "gathering a state on rank 0", own, SaveError)
    result: dict[Any, Any] = {}

    def make_room() -> None:
        if collectives.rank == 0:
            for _, values, _ in told:
                result.update({key: value for key, value in values.items() if key not in result})
            for offered, _, _ in told:
                for key, shape, dtype, _ in offered:
                    if key not in result:
                        result[key] = torch.empty(shape, dtype=dtype)

    together(collectives, "gathering a state on rank 0", make_room, SaveError)
    if collectives.rank:
        for stretch in _stretches(offer):
            sent = [_as_bytes(pieces[key, box]).to(collectives.device) for key, _, _, box in stretch]
            collectives.send(torch.cat(sent), 0)
        return {}
    for (key, box), piece in pieces.items():
        part_of(result[key], box, (0,) * len(box.offsets)).copy_(piece)
    for rank, (offered, _, _) in enumerate(told[1:], start=1):
        for stretch in _stretches(offered):
            _receive(collectives, rank, stretch, result)
    for _, _, names in told:
        result.update({key: result[first] for key, first in names.items() if first in result})
    return {key: result[key] for key in (*(k for k in state if k in result), *(k for k in result if k not in state))}


def _tied(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Key -> the first key with the same tensor."""
    first: dict[int, Any] = {}
    tied = {}
    for key, value in state.items():
        if isinstance(value, Held) and first.setdefault(id(value), key) != key:
            tied[key] = first[id(value)]
    return tied


def _other(value: Any) -> Any:
    return value.module.get_extra_state() if isinstance(value, ExtraState) else value


def _stretches(offer: Sequence[_Offered]) -> Iterator[list[_Offered]]:
    """What a rank sends at once; both sides come to the same."""
    stretch: list[_Offered] = []
    size = 0
    for offered in offer:
        stretch.append(offered)
        size += _size(offered)
        if size >= _STRETCH:
            yield stretch
            stretch, size = [], 0
    if stretch:
        yield stretch


def _size(offered: _Offered) -> int:
    return offered[3].count * offered[2].itemsize


def _receive(collectives: Collectives, rank: int, stretch: Sequence[_Offered], result: dict[Any, Any]) -> None:
    """Puts what a rank sends in its place."""
    room = torch.empty(sum(map(_size, stretch)), dtype=torch.uint8, device=collectives.device)
    received = collectives.receive(room, rank).cpu()
    for (key, _, dtype, box), part in zip(stretch, received.split([_size(one) for one in stretch]), strict=True):
        values = part.clone().view(dtype).view(box.sizes)  # a copy of its own begins where the format wants it
        part_of(result[key], box, (0,) * len(box.offsets)).copy_(values)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
