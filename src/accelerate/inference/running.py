"""A batch through the stages of a pipeline: filled up, in rounds, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..runtime import world
from ..runtime.collectives import broadcast, broadcast_object_list
from ..runtime.forward import ForwardWrapper
from .stages import Cut, Position

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Pipeline(ForwardWrapper):
    """Stands in for a model's forward: all processes call it together, and each runs its stage.

    Args:
        cut: The model, cut; with this process's stage, on its device.
        example: Positional and keyword inputs, as many rows as a part has.
        chunks: How many parts a round has.
        gather_output: Outputs come to all processes, not only to the last.
    """

    def __init__(self, cut: Cut, example: Inputs, chunks: int, gather_output: bool) -> None:
        from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

        here = world.current()
        stage = PipelineStage(
            cut.stage.module,
            here.rank,
            here.size,
            here.device,
            input_args=cut.stage.inputs,
            output_args=cut.stage.outputs,
        )
        self.schedule = ScheduleGPipe(stage, chunks)
        self.round = chunks * rows_of(example, "the example")
        self.outputs, self.shapes, self.structure = cut.outputs, cut.shapes, cut.structure
        self.gather_output = gather_output
        leaves, self.inputs = pytree.tree_flatten(example)
        self.names = list(example[1])
        self.expected = [_kind(leaf) for leaf in leaves]

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = world.current()
        if set(kwargs) == set(self.names):
            kwargs = {name: kwargs[name] for name in self.names}
        rows = self._agree_on_rows((args, kwargs))
        rounds = -(-rows // self.round)
        given: list[torch.Tensor] = []
        if here.rank == 0:
            leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            given = [resized(leaf.to(here.device), rounds * self.round) for leaf in leaves]
        found = []
        for start in range(0, rounds * self.round, self.round):
            found.append(self.schedule.step(*(leaf[start : start + self.round] for leaf in given)))
        if here.rank == here.size - 1:
            whole = [torch.cat(parts)[:rows] for parts in zip(*map(_as_tuple, found), strict=True)]
        elif not self.gather_output:
            return None
        else:
            whole = [torch.empty((rows, *s.shape[1:]), dtype=s.dtype, device=here.device) for s in self.shapes]
        if self.gather_output:
            whole = broadcast(whole, from_process=here.size - 1)
        leaves = [whole[value.index] if isinstance(value, Position) else value for value in self.outputs]
        return pytree.tree_unflatten(leaves, self.structure)

    def _agree_on_rows(self, inputs: Inputs) -> int:
        """How many rows the first process was given; or what is wrong with them, on all."""
        answer: list[Any] = [None]
        if world.current().rank == 0:
            try:
                answer = [self._checked(inputs)]
            except ValueError as error:
                answer = [str(error)]
        (rows,) = broadcast_object_list(answer)
        if isinstance(rows, str):
            raise ValueError(rows)
        return int(rows)

    def _checked(self, inputs: Any) -> int:
        """The number of rows.

        Raises:
            ValueError: when the inputs are not like those that were traced.
        """
        leaves, structure = pytree.tree_flatten(inputs)
        given = [_kind(leaf) for leaf in leaves]
        if structure != self.inputs or given != self.expected:
            raise ValueError(
                "a pipeline takes inputs like those that it was traced with, in any number of rows: expected "
                f"{_told(self.expected, self.inputs)}, and got {_told(given, structure)}. For these, prepare the model anew."
            )
        return rows_of(inputs, "the inputs")


def _as_tuple(found: Any) -> tuple[Any, ...]:
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def rows_of(inputs: Inputs, where: str) -> int:
    """How many rows inputs have.

    Raises:
        ValueError: unless all their tensors have as many, and some.
    """
    sizes = {
        leaf.shape[0] if leaf.dim() else 0 for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)
    }
    if not sizes:
        raise ValueError(f"{where} hold no tensors: pass the model's inputs, as tensors with a row for each sample.")
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            f"{where} have {sorted(sizes)} rows: expected tensors with one row for each sample, at least one."
        )
    return sizes.pop()


def resized(value: Any, rows: int) -> Any:
    """A tensor with so many rows: its last is repeated, or those that are too many left out."""
    if not isinstance(value, torch.Tensor):
        return value
    missing = rows - value.shape[0]
    return value[:rows] if missing <= 0 else torch.cat([value, value[-1:].expand(missing, *value.shape[1:])])


def _kind(leaf: Any) -> Any:
    """What must be the same in every batch."""
    return (leaf.dtype, tuple(leaf.shape[1:])) if isinstance(leaf, torch.Tensor) else leaf


def _told(kinds: Sequence[Any], structure: Any) -> str:
    def told(kind: Any) -> Any:
        return f"{str(kind[0]).removeprefix('torch.')}{['rows', *kind[1]]}" if isinstance(kind, tuple) else kind

    args, kwargs = pytree.tree_unflatten([told(kind) for kind in kinds], structure)
    return ", ".join([*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())]) or "nothing"
