"""Runs a batch through the stages of a pipeline: pads it, runs it in rounds of microbatches, and concatenates the outputs.

A stage that fails forwards zero-filled outputs and an error message, so that downstream stages do not deadlock and the
next batch runs as usual.
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

_ERROR_BYTES = 1024  # bytes of an error message

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Pipeline(ForwardWrapper):
    """Replaces a model's forward: all ranks call it together, and each runs its stage.

    Args:
        cut: The split model, with this rank's stage on its device.
        example: Positional and keyword inputs, with the rows of one microbatch.
        chunks: Number of microbatches per round.
        gather_output: Return the outputs on all ranks, not only on the last.
    """

    def __init__(self, cut: SplitModel, example: Inputs, chunks: int, gather_output: bool) -> None:
        here = world.current()
        self.stage = _ErrorForwarding(cut.stage, here.rank, here.device)
        self.received = (*cut.stage.inputs, _encode_message("", here.device))
        self.chunks, self.part = chunks, batch_length(example, "the example")
        self.round = self.chunks * self.part
        self.outputs, self.shapes, self.structure = cut.outputs, cut.shapes, cut.structure
        self.gather_output = gather_output
        leaves, self.inputs = pytree.tree_flatten(example)
        self.names = list(example[1])
        self.expected = [_signature(leaf) for leaf in leaves]

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = world.current()
        if set(kwargs) == set(self.names):
            kwargs = {name: kwargs[name] for name in self.names}
        rows, given = self._agree_on_batch((args, kwargs))
        self.stage.error = None
        found: list[tuple[torch.Tensor, ...]] = []
        for start in range(0, self._padded_rows(rows), self.round):
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
        """Runs the stage on each microbatch of a round; returns its outputs, on the last rank those of the model.

        Does not use torch's ScheduleGPipe: up to torch 2.7, on gloo, it keeps only one of the requests that a microbatch
        takes, and the others are dropped before they complete.
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
        """Broadcasts the number of rows, or an error, from rank 0; returns it with the padded inputs (rank 0 only)."""
        here = world.current()
        answer: list[Any] = [None]
        given: list[torch.Tensor] = []
        if here.rank == 0:
            try:
                rows = self._validate(inputs)
                leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
                given = [resize_batch(leaf.to(here.device), self._padded_rows(rows)) for leaf in leaves]
                answer = [rows]
            except Exception as error:  # noqa: BLE001 - the other ranks wait for an answer in any case
                answer = [str(error) or type(error).__name__]
        (rows,) = broadcast_object_list(answer)
        if isinstance(rows, str):
            raise ValueError(rows)
        return int(rows), given

    def _padded_rows(self, rows: int) -> int:
        """Rounds up to whole rounds."""
        return -(-rows // self.round) * self.round

    def _raise_failure(self) -> None:
        """Raises if this stage or an earlier one failed; with `gather_output`, if any did.

        A stage does not wait for the errors of later ones, which may still be running.
        """
        message = self.stage.error_message()
        if self.gather_output:
            (message,) = broadcast_object_list([message], from_process=world.current().size - 1)
        if message:
            raise RuntimeError(message) from self.stage.error

    def _validate(self, inputs: Any) -> int:
        """Validates the inputs and returns their number of rows.

        Raises:
            ValueError: if the inputs differ from the traced ones in more than their number of rows.
        """
        leaves, structure = pytree.tree_flatten(inputs)
        given = [_signature(leaf) for leaf in leaves]
        if structure != self.inputs or given != self.expected:
            raise ValueError(
                "a pipeline takes inputs like those that it was traced with, in any number of rows: expected "
                f"{_format_inputs(self.expected, self.inputs)}, and got {_format_inputs(given, structure)}. Prepare the "
                "model again for these."
            )
        return batch_length(inputs, "the inputs")


class _ErrorForwarding(nn.Module):
    """Runs a stage; after an error it forwards zero-filled outputs, and with all outputs an error message.

    Attributes:
        error: The stage's exception; reset to None for each batch.

    Args:
        stage: The stage.
        number: Its number.
        device: Its device.
    """

    def __init__(self, stage: Stage, number: int, device: torch.device) -> None:
        super().__init__()
        self.module, self.outputs, self.number, self.device = stage.module, stage.outputs, number, device
        self.error: Exception | None = None
        self._upstream_error = _encode_message("", device)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.number:
            *inputs, self._upstream_error = inputs  # type: ignore[assignment]
        if self.error is None:
            try:
                return (*self.module(*inputs), self._upstream_error)
            except Exception as error:  # noqa: BLE001 - any error of a model; raised after the outputs are sent
                self.error = error
        # Not zeros_like: the traced outputs are fake tensors, and so would be their zeros.
        empty = [torch.zeros(out.shape, dtype=out.dtype, device=self.device) for out in self.outputs]
        return (*empty, _encode_message(self.error_message(), self.device))

    def error_message(self) -> str:
        """Returns the error message for the last microbatch: that of the earliest failed stage; empty if none failed."""
        upstream = bytes(self._upstream_error.flatten().tolist()).rstrip(b"\0").decode(errors="ignore")
        if upstream or self.error is None:
            return upstream
        return f"stage {self.number} of the pipeline failed: {type(self.error).__name__}: {self.error}"


def _requests(way: Callable[..., Any], tensors: Sequence[torch.Tensor], peer: int) -> list[dist.Work]:
    """Sends tensors to a neighbor, or receives them from it, in one batch (``dist.isend`` or ``dist.irecv``)."""
    return dist.batch_isend_irecv([dist.P2POp(way, tensor, peer) for tensor in tensors])


def _encode_message(message: str, device: torch.device) -> torch.Tensor:
    """Encodes a message as a tensor of fixed size."""
    return torch.tensor(
        [list(message.encode()[:_ERROR_BYTES].ljust(_ERROR_BYTES, b"\0"))], dtype=torch.uint8, device=device
    )


def batch_length(inputs: Inputs, where: str) -> int:
    """Returns the number of rows of the inputs.

    Raises:
        ValueError: unless all tensors have the same number of rows, at least one.
    """
    sizes = {
        leaf.shape[0] if leaf.dim() else 0 for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)
    }
    if not sizes:
        raise ValueError(f"{where} have no tensors: pass the model's inputs, as tensors with a row for each sample.")
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            f"{where} have {sorted(sizes)} rows: expected tensors with one row for each sample, at least one."
        )
    return sizes.pop()


def resize_batch(value: Any, rows: int) -> Any:
    """Pads a tensor to a number of rows by repeating its last row, or trims it."""
    if not isinstance(value, torch.Tensor):
        return value
    missing = rows - value.shape[0]
    return value[:rows] if missing <= 0 else torch.cat([value, value[-1:].expand(missing, *value.shape[1:])])


def _signature(leaf: Any) -> Any:
    """Returns the dtype and dimensions of an input that must be the same in every batch."""
    return (leaf.dtype, tuple(leaf.shape[1:])) if isinstance(leaf, torch.Tensor) else leaf


def _format_inputs(kinds: Sequence[Any], structure: Any) -> str:
    def format_leaf(kind: Any) -> Any:
        return f"{str(kind[0]).removeprefix('torch.')}{['rows', *kind[1]]}" if isinstance(kind, tuple) else kind

    args, kwargs = pytree.tree_unflatten([format_leaf(kind) for kind in kinds], structure)
    return ", ".join([*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())]) or "nothing"
