"""A batch through the stages of a pipeline: filled up, in rounds, and put together again.

A stage that fails hands on empty outputs, and with all outputs go words about what has failed: nobody waits in vain, and
the next batch is as good as the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from ..runtime import world
from ..runtime.collectives import broadcast, broadcast_object_list
from ..runtime.tensors.forward import ForwardWrapper
from .stages import OutputRef, SplitModel, Stage

_ROOM = 1024  # bytes for what is said about a failure

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Pipeline(ForwardWrapper):
    """Stands in for a model's forward: all processes call it together, and each runs its stage.

    Args:
        cut: The model, cut; with this process's stage, on its device.
        example: Positional and keyword inputs, as many rows as a part has.
        chunks: How many parts a round has.
        gather_output: Outputs come to all processes, not only to the last.
    """

    def __init__(self, cut: SplitModel, example: Inputs, chunks: int, gather_output: bool) -> None:
        here = world.current()
        self.stage = _ErrorForwarding(cut.stage, here.rank, here.device)
        self.received = (*cut.stage.inputs, _words("", here.device))
        self.chunks, self.part = chunks, batch_length(example, "the example")
        self.round = self.chunks * self.part
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
        rows, given = self._agree_on_batch((args, kwargs))
        self.stage.error = None
        found: list[tuple[torch.Tensor, ...]] = []
        for start in range(0, self._filled(rows), self.round):
            found += self._round([leaf[start : start + self.round] for leaf in given])
        self._raise_failure()
        if here.rank == here.size - 1:
            *columns, _ = zip(*found, strict=True)
            whole = [torch.cat(parts)[:rows] for parts in columns]
        elif not self.gather_output:
            return None
        else:
            whole = [torch.empty((rows, *s.shape[1:]), dtype=s.dtype, device=here.device) for s in self.shapes]
        if self.gather_output:
            whole = broadcast(whole, from_process=here.size - 1)
        leaves = [whole[value.index] if isinstance(value, OutputRef) else value for value in self.outputs]
        return pytree.tree_unflatten(leaves, self.structure)

    def _round(self, given: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """Runs the stage on each part of a round; returns its outputs, which are the model's on the last process.

        Not by torch's ScheduleGPipe: until after torch 2.7, on gloo, it keeps one request of the several that a part takes,
        and the others are dropped before they are carried out.
        """
        here = world.current()
        outputs: list[tuple[torch.Tensor, ...]] = []
        sent: list[dist.Work] = []
        for start in range(0, self.round, self.part):
            if here.rank == 0:
                inputs = [leaf[start : start + self.part] for leaf in given]
            else:
                inputs = [torch.empty(like.shape, dtype=like.dtype, device=here.device) for like in self.received]
                for request in _requests(dist.irecv, inputs, here.rank - 1):
                    request.wait()
            outputs.append(self.stage(*inputs))
            if here.rank < here.size - 1:
                sent += _requests(dist.isend, outputs[-1], here.rank + 1)
        for request in sent:
            request.wait()
        return outputs

    def _agree_on_batch(self, inputs: Inputs) -> tuple[int, list[torch.Tensor]]:
        """How many rows the first process was given, and there its inputs, filled up; or what is wrong, on all."""
        here = world.current()
        answer: list[Any] = [None]
        given: list[torch.Tensor] = []
        if here.rank == 0:
            try:
                rows = self._checked(inputs)
                leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
                given = [resized(leaf.to(here.device), self._filled(rows)) for leaf in leaves]
                answer = [rows]
            except Exception as error:  # noqa: BLE001 - the others wait for an answer, whatever happens here
                answer = [str(error) or type(error).__name__]
        (rows,) = broadcast_object_list(answer)
        if isinstance(rows, str):
            raise ValueError(rows)
        return int(rows), given

    def _filled(self, rows: int) -> int:
        """The rows of as many rounds as it takes."""
        return -(-rows // self.round) * self.round

    def _raise_failure(self) -> None:
        """Raises where this stage or one before has failed; with `gather_output`, where any has.

        Nobody waits to hear of stages behind it: they may have more to do.
        """
        said = self.stage.said()
        if self.gather_output:
            (said,) = broadcast_object_list([said], from_process=world.current().size - 1)
        if said:
            raise RuntimeError(said) from self.stage.error

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
        return batch_length(inputs, "the inputs")


class _ErrorForwarding(nn.Module):
    """A stage that hands on outputs of zeros from the part on that it fails at, and words about failures with all.

    Attributes:
        error: What it failed with, until that is set back to None.

    Args:
        stage: The stage.
        number: Which one it is.
        device: Where it computes.
    """

    def __init__(self, stage: Stage, number: int, device: torch.device) -> None:
        super().__init__()
        self.module, self.outputs, self.number, self.device = stage.module, stage.outputs, number, device
        self.error: Exception | None = None
        self._heard = _words("", device)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.number:
            *inputs, self._heard = inputs  # type: ignore[assignment]
        if self.error is None:
            try:
                return (*self.module(*inputs), self._heard)
            except Exception as error:  # noqa: BLE001 - whatever a model raises; told when the others have their outputs
                self.error = error
        # Not zeros_like: what tracing leaves are fake tensors, whose likes would be sent as nothing.
        empty = [torch.zeros(out.shape, dtype=out.dtype, device=self.device) for out in self.outputs]
        return (*empty, _words(self.said(), self.device))

    def said(self) -> str:
        """What is known to have failed in the last part; the first stage's failure, where several did."""
        heard = bytes(self._heard.flatten().tolist()).rstrip(b"\0").decode(errors="ignore")
        if heard or self.error is None:
            return heard
        return f"stage {self.number} of the pipeline failed: {type(self.error).__name__}: {self.error}"


def _requests(way: Callable[..., Any], tensors: Sequence[torch.Tensor], peer: int) -> list[dist.Work]:
    """Sends tensors to a neighbor, or receives them from it, together: ``dist.isend`` or ``dist.irecv``."""
    return dist.batch_isend_irecv([dist.P2POp(way, tensor, peer) for tensor in tensors])


def _words(said: str, device: torch.device) -> torch.Tensor:
    """A text as something that stages can hand on."""
    return torch.tensor([list(said.encode()[:_ROOM].ljust(_ROOM, b"\0"))], dtype=torch.uint8, device=device)


def batch_length(inputs: Inputs, where: str) -> int:
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
