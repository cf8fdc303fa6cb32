"""Builds the communication hook of `DistributedDataParallelKwargs`, for any backend, including gloo.

torch's bf16 hooks require NCCL, although gloo all-reduces bf16. One wrapper casts gradients before the all-reduce; the fp16
and bf16 hooks are that wrapper around torch's `allreduce_hook`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..enums import DDPCommunicationHookType
from .power_sgd import batched_power_sgd_hook

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    Hook = Callable[[Any, Any], torch.futures.Future[torch.Tensor]]

_WIRE_DTYPES = {DDPCommunicationHookType.FP16: "float16", DDPCommunicationHookType.BF16: "bfloat16"}
_POWER_SGD = (DDPCommunicationHookType.POWER_SGD, DDPCommunicationHookType.BATCHED_POWER_SGD)


def communication_hook(
    kind: DDPCommunicationHookType,
    wrapper: DDPCommunicationHookType,
    options: Mapping[str, Any],
    group: ProcessGroup | None,
) -> tuple[Any, Hook] | None:
    """Returns state and hook for ``DistributedDataParallel.register_comm_hook``, or None for torch's default.

    Args:
        kind: The compression of gradients.
        wrapper: Casts gradients to fp16 or bf16 before `kind`; ``NO`` does not cast.
        options: Arguments of torch's ``PowerSGDState``; only the PowerSGD hooks take options.
        group: The process group to average over; None for all ranks.

    Raises:
        ValueError: if `options` has a name that the hook does not take.
    """
    if kind is DDPCommunicationHookType.NO and wrapper is DDPCommunicationHookType.NO:
        _reject_unknown(kind, options, set())
        return None
    state, hook = _power_sgd(kind, options, group) if kind in _POWER_SGD else _average(kind, options, group)
    for half in (kind, wrapper):
        if half in _WIRE_DTYPES:
            hook = _with_wire_dtype(hook, _WIRE_DTYPES[half])
    return state, hook


def _average(
    kind: DDPCommunicationHookType, options: Mapping[str, Any], group: ProcessGroup | None
) -> tuple[Any, Hook]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    _reject_unknown(kind, options, set())
    return group, allreduce_hook


def _power_sgd(
    kind: DDPCommunicationHookType, options: Mapping[str, Any], group: ProcessGroup | None
) -> tuple[Any, Hook]:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd

    _reject_unknown(kind, options, set(inspect.signature(power_sgd.PowerSGDState).parameters))
    state = power_sgd.PowerSGDState(**{"process_group": group, **options})
    return (
        state,
        batched_power_sgd_hook if kind is DDPCommunicationHookType.BATCHED_POWER_SGD else power_sgd.powerSGD_hook,
    )


def _reject_unknown(kind: DDPCommunicationHookType, options: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"comm_state_option has {', '.join(map(repr, unknown))}, but the {kind.value!r} communication hook takes "
            + (f"only {', '.join(sorted(known))}." if known else "no options: leave comm_state_option out.")
        )


def _with_wire_dtype(hook: Hook, dtype_name: str) -> Hook:
    import torch

    dtype: torch.dtype = getattr(torch, dtype_name)

    # torch compares a hook's annotations with types, which postponed annotations are not: hence none here.
    def cast_hook(state, bucket):  # type: ignore[no-untyped-def]
        gradients = bucket.buffer()
        bucket.set_buffer(gradients.to(dtype))
        return hook(state, bucket).then(lambda done: gradients.copy_(_tensor(done.value())))

    cast_hook.__name__ = cast_hook.__qualname__ = f"{hook.__name__}_in_{dtype_name}"
    return cast_hook


def _tensor(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return value[0] if isinstance(value, list) else value
