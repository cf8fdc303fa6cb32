"""Local SGD: each process takes several optimizer steps without communication, then all average their parameters.

Parameters are all-reduced in a few large flat buffers, not one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from .runtime import collectives

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from typing_extensions import Self

    from .accelerator import Accelerator

# Bounds the memory of a flat buffer.
_BUFFER_BYTES = 256 * 2**20


class LocalSGD:
    """Context manager of a training loop that averages parameters at intervals instead of gradients at every step.

    Gradient accumulation is unaffected. All calls of `step` count, including those of micro-batches in ``accumulate`` that
    do not update: to average every 8 updates of 2 batches each, pass ``local_sgd_steps=16``. Buffers (running statistics
    of batch norm) and optimizer states are not averaged. All processes must take the same number of steps.

    In the block, `save_state` averages first, since a checkpoint holds one model, and the count to the next average
    restarts, as it does in the resumed run. A resumed run loads rank 0's optimizer state on every process.

    Attributes:
        num_steps: Calls of `step` so far.

    Args:
        accelerator: Accelerator that prepared the model.
        model: Prepared model.
        local_sgd_steps: Calls of `step` between averages; the end of the block averages as well.
        enabled: If False, the context has no effect.

    Raises:
        NotImplementedError: if parameters, gradients or sequences are sharded over the processes, or an engine
            communicates them (FSDP, DeepSpeed, Megatron-LM).
        ValueError: if `local_sgd_steps` is not a positive integer.

    Example:
        ```python
        with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=8) as local_sgd:
            for inputs, targets in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(loss_function(model(inputs), targets))
                    optimizer.step()
                    optimizer.zero_grad()
                    local_sgd.step()
        ```
    """

    def __init__(
        self, accelerator: Accelerator, model: torch.nn.Module, local_sgd_steps: int, enabled: bool = True
    ) -> None:
        if not isinstance(local_sgd_steps, int) or local_sgd_steps < 1:
            raise ValueError(f"local_sgd_steps is a positive number of steps; it was given as {local_sgd_steps!r}.")
        if enabled and not accelerator.strategy.supports_local_sgd:
            raise NotImplementedError(
                "LocalSGD needs a whole copy of the model on every process that it can train on its own, and the "
                f"processes of this run ({accelerator.distributed_type.value}) share its tensors or sequences: use plain "
                "data parallel training, or LocalSGD(..., enabled=False)."
            )
        self.accelerator = accelerator
        self.model = model
        self.local_sgd_steps = local_sgd_steps
        self.enabled = enabled and accelerator.num_processes > 1
        self.num_steps = 0
        self.model_sync_obj: AbstractContextManager[None] | None = None
        self._trained: set[int] = set()
        self._averaged_at = 0
        self._save_hook: RemovableHandle | None = None

    def __enter__(self) -> Self:
        if self.enabled:
            self._trained = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
            self.model_sync_obj = self.accelerator.no_sync(self.model)
            self.model_sync_obj.__enter__()
            checkpoints = self.accelerator._checkpoints
            self._save_hook = checkpoints.add_hook(checkpoints.sync_hooks, self._average)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.model_sync_obj is None:
            return
        if self._save_hook is not None:
            self._save_hook.remove()
            self._save_hook = None
        try:
            if kind is None:  # after an exception, other ranks may never join the all-reduce
                self._average()
        finally:
            self.model_sync_obj.__exit__(kind, error, traceback)
            self.model_sync_obj = None

    def step(self) -> None:
        """Counts a step and averages the parameters at every `local_sgd_steps`-th. Call it after ``optimizer.step()``."""
        self.num_steps += 1
        if self.enabled and self.num_steps - self._averaged_at >= self.local_sgd_steps:
            self._average()

    def _average(self) -> None:
        self._averaged_at = self.num_steps
        with torch.no_grad():
            for parameters in _flat_buffers(self._trained_parameters()):
                flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
                flat = collectives.reduce(flat, "mean")
                parts = flat.split([parameter.numel() for parameter in parameters])
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.copy_(part.view_as(parameter))

    def _trained_parameters(self) -> Iterator[torch.nn.Parameter]:
        # Parameters that were frozen in the meantime differ between ranks as well.
        return (p for p in self.model.parameters() if p.requires_grad or id(p) in self._trained)


def _flat_buffers(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Groups parameters by dtype and device into lists that fit into one buffer; skips quantized parameters."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.nn.Parameter]] = {}
    filled: dict[tuple[torch.dtype, torch.device], int] = {}
    for parameter in parameters:
        if not (parameter.is_floating_point() or parameter.is_complex()):
            continue
        key = (parameter.dtype, parameter.device)
        size = parameter.numel() * parameter.element_size()
        if key in groups and filled[key] + size > _BUFFER_BYTES:
            yield groups.pop(key)
            filled[key] = 0
        groups.setdefault(key, []).append(parameter)
        filled[key] = filled.get(key, 0) + size
    yield from groups.values()
