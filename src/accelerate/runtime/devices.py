"""The device table: differences between device types are rows here, not branches elsewhere.

A row holds the torch module, the communication backends in order of preference, the `DistributedType`, the variable that
restricts visible devices and the package that registers the device. The launcher reads the table too, so torch is
imported on use.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from ..settings import env
from ..settings.enums import DistributedType

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DeviceKind:
    """A row of the device table.

    Attributes:
        name: The device type, as in `torch.device.type`.
        distributed_type: The `DistributedType` of a run over several devices.
        backends: Backends of torch.distributed in order of preference.
        visible_devices: The variable that restricts the visible devices, if there is one.
        library: The package that registers the device type with torch, if it is not built in.
        indexed: Whether devices have an index (``cuda:1``) or there is only one (``mps``).
    """

    name: str
    distributed_type: DistributedType
    backends: tuple[str, ...]
    visible_devices: str | None = None
    library: str | None = None
    indexed: bool = True

    def torch_module(self) -> ModuleType | None:
        """Returns ``torch.cuda``, ``torch.xpu`` …, or None if this torch does not have it."""
        import torch

        if self.library is not None:
            if not _is_installed(self.library):
                return None
            importlib.import_module(self.library)
        return getattr(torch, self.name, None)

    def is_available(self) -> bool:
        """Returns whether this process can use a device of this type."""
        if self.name == "cpu":
            return True
        if self.name == "xla":
            return _is_installed("torch_xla")
        if self.name == "mps":
            import torch

            return bool(torch.backends.mps.is_available())
        module = self.torch_module()
        return module is not None and bool(module.is_available())

    def count(self) -> int:
        """Returns the number of visible devices of this type."""
        if not self.is_available():
            return 0
        if not self.indexed:
            return 1
        module = self.torch_module()
        return int(module.device_count()) if module is not None else 1

    def device(self, local_rank: int) -> torch.device:
        """Returns the device of a local rank.

        Raises:
            RuntimeError: if there are fewer devices than processes.
        """
        import torch

        if not self.indexed:
            return torch.device(self.name)
        count = self.count()
        if local_rank >= count:
            raise RuntimeError(
                f"local rank {local_rank} has no device: this process sees {count} {self.name} device(s). "
                f"Start at most {count} processes here (--num_processes), or make more devices visible"
                + (f" in {self.visible_devices}." if self.visible_devices else ".")
            )
        return torch.device(self.name, local_rank)

    def current(self) -> torch.device:
        """Returns torch's current device of this type, in the form that `Tensor.device` reports.

        Raises:
            RuntimeError: if no device of this type is visible.
        """
        import torch

        if self.name == "cpu":
            return torch.device("cpu")
        if not self.is_available():
            raise RuntimeError(f"this process sees no {self.name} device.")
        module = self.torch_module() if self.indexed else None
        current_device = getattr(module, "current_device", None)
        return torch.device(self.name, 0 if current_device is None else int(current_device()))

    def set_device(self, device: torch.device) -> None:
        """Sets torch's current device."""
        if self.indexed and (module := self.torch_module()) is not None and hasattr(module, "set_device"):
            module.set_device(device)

    def empty_cache(self) -> None:
        """Releases cached memory to the driver, if the device type has a caching allocator."""
        module = self.torch_module()
        if module is not None and hasattr(module, "empty_cache"):
            module.empty_cache()


def _is_installed(library: str) -> bool:
    # Top-level package only: find_spec("a.b") imports a, and raises if it is missing.
    return importlib.util.find_spec(library.split(".")[0]) is not None


# In order of preference: the first available type is the default.
_ROWS = (
    DeviceKind("mlu", DistributedType.MULTI_MLU, ("cncl",), "MLU_VISIBLE_DEVICES", "torch_mlu"),
    DeviceKind("sdaa", DistributedType.MULTI_SDAA, ("tccl",), "SDAA_VISIBLE_DEVICES", "torch_sdaa"),
    DeviceKind("musa", DistributedType.MULTI_MUSA, ("mccl",), "MUSA_VISIBLE_DEVICES", "torch_musa"),
    DeviceKind("npu", DistributedType.MULTI_NPU, ("hccl",), "ASCEND_RT_VISIBLE_DEVICES", "torch_npu"),
    DeviceKind("hpu", DistributedType.MULTI_HPU, ("hccl",), "HABANA_VISIBLE_MODULES", "habana_frameworks.torch"),
    DeviceKind("neuron", DistributedType.MULTI_NEURON, ("neuron",), "NEURON_RT_VISIBLE_CORES", "torch_neuronx"),
    DeviceKind("xla", DistributedType.XLA, ("xla",), None, "torch_xla", indexed=False),
    DeviceKind("cuda", DistributedType.MULTI_GPU, ("nccl",), "CUDA_VISIBLE_DEVICES"),
    DeviceKind("xpu", DistributedType.MULTI_XPU, ("xccl", "ccl"), "ZE_AFFINITY_MASK"),
    DeviceKind("mps", DistributedType.NO, (), None, indexed=False),
    DeviceKind("cpu", DistributedType.MULTI_CPU, ("gloo", "mpi", "ccl"), None, indexed=False),
)
DEVICES: dict[str, DeviceKind] = {row.name: row for row in _ROWS}


def default_kind() -> DeviceKind:
    """Returns the device type of ``ACCELERATE_TORCH_DEVICE`` (``cuda``, ``cuda:1`` …), else the first available one.

    Raises:
        ValueError: if that variable names a type that is not in the table.
    """
    if (wanted := env.get("ACCELERATE_TORCH_DEVICE")) is not None:
        return device_kind(wanted)
    return next(kind for kind in _ROWS if _may_be_default(kind) and kind.is_available())


def _may_be_default(kind: DeviceKind) -> bool:
    # USE_TORCH_XLA=0 disables an installed torch_xla.
    return kind.name != "xla" or env.flag("USE_TORCH_XLA", default=True)


def device_kind(device: str | torch.device) -> DeviceKind:
    """Returns the row of a device or of its name (``"cuda:1"``).

    Raises:
        ValueError: if the table has no such device type.
    """
    name = str(device).split(":")[0]
    try:
        return DEVICES[name]
    except KeyError:
        raise ValueError(f"unknown device type {name!r}; expected one of {', '.join(DEVICES)}.") from None


def with_index(device: str | int | torch.device) -> torch.device:
    """Returns the device in the form that `Tensor.device` reports: ``"cuda"`` becomes the current CUDA device.

    Normalizes devices from arguments before they are compared, used as keys or passed to functions that require an index.
    A device that this process does not have is returned unchanged; torch raises on use.

    Args:
        device: A device, its name, or the index of an accelerator.
    """
    import torch

    if isinstance(device, int):
        return _numbered(device)
    if not isinstance(device, torch.device):
        device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.index is not None or (kind := DEVICES.get(device.type)) is None or not kind.is_available():
        return device
    return kind.current()


def _numbered(index: int) -> torch.device:
    import torch

    try:
        return torch.device(index)  # of torch's accelerator, without the millisecond that `default_kind` takes
    except RuntimeError:
        if (kind := default_kind()).name == "cpu":
            raise
        return torch.device(kind.name, index)


def require_device(device: str | int | torch.device) -> torch.device:
    """Returns `with_index` of a device after checking that it is visible to this process.

    Raises:
        RuntimeError: if it is not.
    """
    kind = default_kind() if isinstance(device, int) else DEVICES.get(str(device).split(":")[0])
    if kind is None or (kind.name == "cpu" and not isinstance(device, int)):
        return with_index(device)
    count = kind.count() if kind.name != "cpu" else 0
    index = device if isinstance(device, int) else int(str(device).partition(":")[2] or 0)
    if index < count:
        return with_index(device)
    name = "accelerator" if kind.name == "cpu" else f"{kind.name} device"
    hidden = f" (see {kind.visible_devices})" if kind.visible_devices else ""
    raise RuntimeError(
        f"device {device!r} is not available: this process sees {count or 'no'} {name}{'' if count == 1 else 's'}. Pass a "
        f"visible one{hidden}, or 'cpu'. torch.__version__ names the devices that this build of torch supports."
    )
