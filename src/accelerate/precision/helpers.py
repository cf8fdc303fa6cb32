"""Autocast and gradient scaler as plain functions, for loops that use `AcceleratorState` without an `Accelerator`."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..runtime import world
from ..settings.enums import DistributedType
from ..state import AcceleratorState
from .amp import select_precision

if TYPE_CHECKING:
    from ..settings.handlers import AutocastKwargs

# Distributed types with sharded gradients: their scalers synchronize overflows between ranks.
_SCALERS = {DistributedType.FSDP: "torch.distributed.fsdp.sharded_grad_scaler:ShardedGradScaler"}


def get_mixed_precision_context_manager(
    native_amp: bool = False, autocast_kwargs: AutocastKwargs | None = None
) -> AbstractContextManager[Any]:
    """Returns an autocast context in the mixed precision of the run.

    Args:
        native_amp: If False, the context does nothing.
        autocast_kwargs: Arguments for `torch.autocast`.
    """
    if not native_amp:
        return nullcontext()
    state = AcceleratorState()
    return select_precision(state.mixed_precision, state.device, autocast_kwargs).autocast()


def get_grad_scaler(distributed_type: DistributedType | None = None, **kwargs: Any) -> torch.amp.GradScaler:
    """Returns a gradient scaler for the device of this process.

    Args:
        distributed_type: Distributed type of the run; with FSDP, scalers synchronize overflows between ranks.
        **kwargs: Arguments for `torch.amp.GradScaler`.
    """
    module, _, name = _SCALERS.get(distributed_type or DistributedType.NO, "torch.amp:GradScaler").partition(":")
    kind: type[torch.amp.GradScaler] = getattr(importlib.import_module(module), name)
    return kind(device=world.current().device.type, **kwargs)
