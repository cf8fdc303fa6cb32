"""Mixed precision by torch's autocast, with a gradient scaler for fp16.

Building an autocast object takes several microseconds, a visible part of a small step. Wrapped forwards keep them in a free
list for reuse; a nested forward or a second thread finds the list empty and builds another.
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
    """Computes in the dtype of the parameters: nothing is cast.

    Attributes:
        name: ``no``, ``bf16``, ``fp16`` or ``fp8``.
        scaler: Gradient scaler for fp16, or None.
    """

    name = "no"
    scaler: torch.amp.GradScaler | None = None

    def convert(self, model: nn.Module) -> nn.Module:
        """Returns the model with layers replaced, where the precision needs other ones."""
        return model

    def wrap_forward(self, model: nn.Module) -> None:
        """Wraps the model's forward to compute in this precision and return float32."""

    def autocast(self, handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """Returns a context in which eligible operations compute in this precision."""
        return nullcontext()


class Autocast(Precision):
    """Computes under torch.autocast in bf16, or in fp16 with a gradient scaler.

    Args:
        name: ``bf16`` or ``fp16``.
        device: Device whose operations are autocast.
        autocast: Arguments for ``torch.autocast``.
        scaler: Arguments for ``torch.amp.GradScaler``, used for fp16 only.
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
    """Runs a forward under autocast and casts its half-precision outputs to float32."""

    def __init__(self, build: Callable[[], torch.autocast]) -> None:
        self._build = build
        self._free: list[torch.autocast] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler traces the construction of the context
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
    """Returns the precision for a run.

    Raises:
        ValueError: for a precision that this version or the device does not support.
    """
    if name == "no":
        return Precision()
    if name == "bf16" and not supports_bf16(device_kind(device)):
        raise ValueError(
            f"mixed_precision='bf16' was requested, and {device} does not support bfloat16: use 'fp16' or 'no' "
            "(--mixed_precision, ACCELERATE_MIXED_PRECISION)."
        )
    if name in ("bf16", "fp16"):
        return Autocast(name, device, autocast, scaler)
    raise ValueError(
        f"mixed_precision={name!r} is not part of this version: use 'no', 'fp16' or 'bf16' (fp8 is planned)."
    )
