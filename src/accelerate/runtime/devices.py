"""The device table: what differs between kinds of device is a row here, not a branch elsewhere.

A row names the torch module, the communication backends in order of preference, the enumeration member of a
distributed run, the variable that hides devices and the library that brings the device. torch is imported on use: the
launcher reads this table too.
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
    """One kind of device.

    Attributes:
        name: The device type as torch spells it.
        distributed_type: The member of `DistributedType` for a run over several of them.
        backends: Communication backends of torch.distributed, best first.
        visible_devices: The variable that says which devices a process may see, if there is one.
        library: A package that must be imported before torch knows the device.
        indexed: Whether a process takes one of several (``cuda:1``) or there is just one (``mps``).
    """

    name: str
    distributed_type: DistributedType
    backends: tuple[str, ...]
    visible_devices: str | None = None
    library: str | None = None
    indexed: bool = True

    def torch_module(self) -> ModuleType | None:
        """``torch.cuda``, ``torch.xpu`` …, or None when this torch does not have it."""
        import torch

        if self.library is not None:
            if not _is_installed(self.library):
                return None
            importlib.import_module(self.library)
        return getattr(torch, self.name, None)

    def is_available(self) -> bool:
        """Whether a device of this kind can be used in this process."""
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
        """How many devices of this kind this process can see."""
        if not self.is_available():
            return 0
        if not self.indexed:
            return 1
        module = self.torch_module()
        return int(module.device_count()) if module is not None else 1

    def device(self, local_rank: int) -> torch.device:
        """The device of the process with this rank on its machine.

        Raises:
            RuntimeError: when there are fewer devices than processes.
        """
        import torch

        if not self.indexed:
            return torch.device(self.name)
        count = self.count()
        if local_rank >= count:
            raise RuntimeError(
                f"this process is number {local_rank} on its machine, but it sees {count} {self.name} device(s). "
                f"Start at most {count} processes here (--num_processes), or show more devices"
                + (f" in {self.visible_devices}." if self.visible_devices else ".")
            )
        return torch.device(self.name, local_rank)

    def current(self) -> torch.device:
        """Returns the device of this kind that torch selects for this process, in the form its tensors report.

        Raises:
            RuntimeError: when this process sees no device of this kind.
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
        """Makes `device` the one that torch uses when none is named."""
        if self.indexed and (module := self.torch_module()) is not None and hasattr(module, "set_device"):
            module.set_device(device)

    def empty_cache(self) -> None:
        """Gives cached memory back to the driver, where the kind has such a cache."""
        module = self.torch_module()
        if module is not None and hasattr(module, "empty_cache"):
            module.empty_cache()


def _is_installed(library: str) -> bool:
    # find_spec("a.b") imports a, and raises where a is not there: ask for the top-level package only.
    return importlib.util.find_spec(library.split(".")[0]) is not None


# Order matters: the first available kind is the default device; "cpu" is the last resort.
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
    """The kind of device a process uses when nobody chose one.

    ``ACCELERATE_TORCH_DEVICE`` (``cuda``, ``cuda:1``, ``cpu`` …) decides if it is set.

    Raises:
        ValueError: when that variable names a kind that is not in the table.
    """
    if (wanted := env.get("ACCELERATE_TORCH_DEVICE")) is not None:
        return device_kind(wanted)
    return next(kind for kind in _ROWS if _may_be_default(kind) and kind.is_available())


def _may_be_default(kind: DeviceKind) -> bool:
    # An installed torch_xla takes the process over; USE_TORCH_XLA=0 keeps it out.
    return kind.name != "xla" or env.flag("USE_TORCH_XLA", default=True)


def device_kind(device: str | torch.device) -> DeviceKind:
    """The row of a device or of its name (``"cuda:1"``).

    Raises:
        ValueError: when the table has no such kind.
    """
    name = str(device).split(":")[0]
    try:
        return DEVICES[name]
    except KeyError:
        raise ValueError(f"unknown kind of device {name!r}; known are {', '.join(DEVICES)}.") from None


def with_index(device: str | int | torch.device) -> torch.device:
    """Returns the device in the form its tensors report: ``"cuda"`` is the current CUDA device.

    Devices that arguments name go through here before they are compared, stored as a key or passed to functions that
    require an index. A device that this process does not have is returned as it is; torch raises where it is used.

    Args:
        device: A device, its name, or the number of an accelerator.
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
        return torch.device(index)  # of torch's accelerator: finding the kind in the table takes a millisecond
    except RuntimeError:
        if (kind := default_kind()).name == "cpu":
            raise
        return torch.device(kind.name, index)


def require_device(device: str | int | torch.device) -> torch.device:
    """Returns the device as `with_index` does, after a check that this process has it.

    Raises:
        RuntimeError: when this process does not see such a device.
    """
    kind = default_kind() if isinstance(device, int) else DEVICES.get(str(device).split(":")[0])
    if kind is None or (kind.name == "cpu" and not isinstance(device, int)):
        return with_index(device)
    count = kind.count() if kind.name != "cpu" else 0
    index = device if isinstance(device, int) else int(str(device).partition(":")[2] or 0)
    if index < count:
        return with_index(device)
    name = "accelerator" if kind.name == "cpu" else f"{kind.name} device"
    hidden = f" (or shown by {kind.visible_devices})" if kind.visible_devices else ""
    raise RuntimeError(
        f"device {device!r} was asked for, and this process sees {count or 'no'} {name}{'' if count == 1 else 's'}. Name "
        f"one that is there{hidden}, or 'cpu'. torch.__version__ names the devices that this build of torch supports."
    )
