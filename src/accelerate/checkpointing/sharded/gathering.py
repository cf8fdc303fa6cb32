"""States that ranks share, whole in the memory of rank 0: a stretch of bytes at a time, and nothing more on other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..consensus import checkpoint_group, run_on_all_ranks
from ..errors import SaveError
from .local_state import ExtraState
from .shard_layout import Box, Held, is_tiled, part_of

_STRETCH = 64 * 2**20
_ALIGNMENT = 16

# Key, shape of the whole tensor, number format, and the box of it that a rank sends.
_Offered = tuple[Any, tuple[int, ...], torch.dtype, Box]


def gathered(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The whole state on the CPU of rank 0, in memory of its own, and an empty one elsewhere. Collective.

    Tensors travel through gloo on the CPU, for the last rank sends only when rank 0 has received from all others: NCCL's
    watchdog would end it, and NCCL opens a communicator for each pair.

    Args:
        state: Each rank's part: `Held` tensors, and other values where this rank is the one to give them. Keys of one
            tensor (tied names) share it afterwards, too.
    """
    collectives = checkpoint_group(SaveError)
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

    told = run_on_all_ranks(collectives, "gathering a state on rank 0", own, SaveError)
    result: dict[Any, Any] = {}
    sizes = [_sum(stretch) for offered, _, _ in told[1:] for stretch in _stretches(offered)]
    buffer = torch.empty(0)

    def make_room() -> None:
        nonlocal buffer
        # Nothing is allocated once tensors are on their way: a rank that failed there would leave another one waiting.
        buffer = torch.empty(max(sizes, default=0), dtype=torch.uint8, device=collectives.device)
        if collectives.rank == 0:
            _check_whole(offered for offers, _, _ in told for offered in offers)
            for _, values, _ in told:
                result.update({key: value for key, value in values.items() if key not in result})
            for offered, _, _ in told:
                for key, shape, dtype, _ in offered:
                    if key not in result:
                        result[key] = torch.empty(shape, dtype=dtype)

    run_on_all_ranks(collectives, "gathering a state on rank 0", make_room, SaveError)

    def transfer() -> None:
        if collectives.rank:
            for stretch in _stretches(offer):
                for (key, _, _, box), part in _parts(buffer, stretch):
                    part.copy_(pieces[key, box])
                collectives.send(buffer[: _sum(stretch)], 0)
            return
        for (key, box), piece in pieces.items():
            part_of(result[key], box, (0,) * len(box.offsets)).copy_(piece)
        for rank, (offered, _, _) in enumerate(told[1:], start=1):
            for stretch in _stretches(offered):
                collectives.receive(buffer[: _sum(stretch)], rank)
                for (key, _, _, box), part in _parts(buffer, stretch):
                    part_of(result[key], box, (0,) * len(box.offsets)).copy_(part)

    # No rank goes back to the training, and waits there, before rank 0 has everything.
    run_on_all_ranks(collectives, "gathering a state on rank 0", transfer, SaveError)
    if collectives.rank:
        return {}
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


def _check_whole(offers: Iterable[_Offered]) -> None:
    """Raises where ranks hold no whole tensor together: some of it would be whatever memory held before."""
    boxes: dict[Any, tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]] = {}
    for key, shape, _, box in offers:
        boxes.setdefault(key, (shape, []))[1].append((box.offsets, box.sizes))
    for key, (shape, found) in boxes.items():
        if not is_tiled(shape, found):
            raise ValueError(f"the parts that ranks hold of {key} overlap or do not make up the shape {list(shape)}")


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
    """The bytes of a tensor in the buffer, where the next one begins aligned for every dtype."""
    return -(-offered[3].count * offered[2].itemsize // _ALIGNMENT) * _ALIGNMENT


def _sum(stretch: Sequence[_Offered]) -> int:
    return sum(map(_size, stretch))


def _parts(buffer: torch.Tensor, stretch: Sequence[_Offered]) -> Iterator[tuple[_Offered, torch.Tensor]]:
    """Yields each tensor of a stretch with its place in the buffer."""
    start = 0
    for offered in stretch:
        _, _, dtype, box = offered
        yield offered, buffer[start : start + box.count * dtype.itemsize].view(dtype).view(box.sizes)
        start += _size(offered)
