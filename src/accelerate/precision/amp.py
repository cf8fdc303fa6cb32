"""Mixed precision with torch's own means: a no-op base, and autocast with gradient scaling for fp16.

An autocast object costs several microseconds to build, so that one built anew at each forward would be a visible part of
a small step; wrappers here keep theirs. They are kept in a free list: a forward inside a forward, or a second thread, finds
the list empty and builds another.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..runtime.devices import device_kind
from ..runtime.system.availability import supports_bf16
from ..runtime.tensors.forward import ForwardWrapper, wrap_forward
from ..runtime.tensors.pytree import convert_to_fp32
from .loss_scale import LossScaler

if TYPE_CHECKING:
    from ..settings.handlers import AutocastKwargs, GradScalerKwargs

_HALF = (torch.float16, torch.bfloat16)


class Precision:
    """Computes in the parameters' own format: nothing is converted.

    Attributes:
        name: ``no``, ``bf16``, ``fp16`` or ``fp8``.
        scaler: Scales losses so that small gradients survive in fp16, or None.
    """

    name = "no"
    scaler: torch.amp.GradScaler | None = None

    def convert(self, model: nn.Module) -> nn.Module:
        """The model with its layers replaced where the format needs other ones."""
        return model

    def wrap_forward(self, model: nn.Module) -> None:
        """Makes the model's forward compute in this format and return float32."""

    def autocast(self, handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """A context in which eligible operations compute in this format."""
        return nullcontext()


class Autocast(Precision):
    """torch.autocast to bf16 or fp16; fp16 comes with a gradient scaler.

    Args:
        name: ``bf16`` or ``fp16``.
        device: The device whose operations are cast.
        autocast: Arguments for ``torch.autocast``.
        scaler: Arguments for ``torch.amp.GradScaler``; used for fp16 only.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        autocast: AutocastKwargs | None = None,
        scaler: GradScalerKwargs | None = None,
    ) -> None:
        self.name = name
        self._device_type = device.type
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self._options = autocast.to_kwargs() if autocast is not None else {}
        if name == "fp16":
            self.scaler = LossScaler(device.type, **(scaler.to_kwargs() if scaler is not None else {}))

    def wrap_forward(self, model: nn.Module) -> None:
        wrap_forward(model, _AutocastForward(self._build))

    def autocast(self, handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        return self._build() if handler is None else self._build(handler.to_kwargs())

    def _build(self, options: dict[str, Any] | None = None) -> torch.autocast:
        return torch.autocast(self._device_type, dtype=self._dtype, **(self._options if options is None else options))


class _AutocastForward(ForwardWrapper):
    """A forward under autocast whose half-precision outputs become float32."""

    def __init__(self, build: Callable[[], torch.autocast]) -> None:
        self._build = build
        self._free: list[torch.autocast] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler wants to see the context built
            with self._build():
                return convert_to_fp32(self.__wrapped__(*args, **kwargs))
        context = self._free.pop() if self._free else self._build()
        with context:
            outputs = self.__wrapped__(*args, **kwargs)
        self._free.append(context)
        if isinstance(outputs, torch.Tensor):
            return outputs.float() if outputs.dtype in _HALF else outputs
        return convert_to_fp32(outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _AutocastForward:
        import copy
        import functools

        other = type(self)(self._build)
        functools.update_wrapper(other, copy.deepcopy(self.__wrapped__, memo), updated=())
        return other


def select_precision(
    name: str,
    device: torch.device,
    autocast: AutocastKwargs | None = None,
    scaler: GradScalerKwargs | None = None,
) -> Precision:
    """The precision for a run.

    Raises:
        ValueError: for a format that this version does not have, or the device cannot compute in.
    """
    if name == "no":
        return Precision()
    if name == "bf16" and not supports_bf16(device_kind(device)):
        raise ValueError(
            f"mixed_precision='bf16' was asked for, and {device} does not compute in bfloat16: use 'fp16' or 'no' "
            "(--mixed_precision, ACCELERATE_MIXED_PRECISION)."
        )
    if name in ("bf16", "fp16"):
        return Autocast(name, device, autocast, scaler)
    raise ValueError(
        f"mixed_precision={name!r} is not part of this version: use 'no', 'fp16' or 'bf16' (fp8 is planned)."
    )
