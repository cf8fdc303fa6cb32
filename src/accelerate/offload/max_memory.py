"""How much of a model each device may take: measured, as the user wrote it, or evened out over the devices."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..runtime.devices import default_kind
from ..runtime.helpers import convert_file_size_to_int
from .module_groups import group_modules
from .sizes import Dtype

Device = int | str
Limits = dict[Device, int]

OFFLOADED = ("cpu", "disk")
"""Where weights wait that are moved to another device to be used, slower ones last."""


def accelerators(devices: Iterable[Device]) -> list[Device]:
    """Those devices that compute, in order."""
    return [device for device in devices if device not in OFFLOADED]


def get_max_memory(max_memory: Mapping[Device, int | str] | None = None) -> Limits:
    """Bytes that weights may take on each device.

    Args:
        max_memory: Limits by device: numbers of bytes, or sizes such as ``"10GiB"`` and ``"10GB"``. A device that is not
            named is not used. Sizes in a dictionary become numbers of bytes in place, on which callers rely. None:
            what is free now on each accelerator that this process sees, and of the machine's
            memory.

    Returns:
        Limits in bytes: accelerators in order, then ``"cpu"``, then ``"disk"``.

    Raises:
        ValueError: for a size or a device that is none.
    """
    if max_memory is None:
        return _free_memory()
    limits = {device: convert_file_size_to_int(size) for device, size in max_memory.items()}
    for device in limits:
        if not isinstance(device, int) and device not in (*OFFLOADED, "mps"):
            raise ValueError(
                f"max_memory names the device {device!r}: expected the number of an accelerator (0, 1 ...), 'mps', 'cpu' "
                "or 'disk'."
            )
    if isinstance(max_memory, dict):
        max_memory.update(limits)
    numbered: list[Device] = sorted(device for device in limits if isinstance(device, int))
    numbered += [device for device in ("mps", *OFFLOADED) if device in limits]
    return {device: limits[device] for device in numbered}


def _free_memory() -> Limits:
    import psutil

    kind = default_kind()
    limits: Limits = {}
    module = kind.torch_module() if kind.name != "cpu" else None
    if kind.name == "mps":
        limits["mps"] = int(torch.mps.recommended_max_memory())
    elif module is not None and kind.indexed and hasattr(module, "mem_get_info"):
        for index in range(kind.count()):
            limits[index] = int(module.mem_get_info(index)[0])
    limits["cpu"] = int(psutil.virtual_memory().available)
    return limits


def get_balanced_memory(
    model: nn.Module,
    max_memory: Mapping[Device, int | str] | None = None,
    no_split_module_classes: Sequence[str] | str | None = None,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    low_zero: bool = False,
) -> Limits:
    """Limits with which `infer_auto_device_map` spreads a model evenly over the accelerators.

    The limit is the smallest with which the layers, placed in order, still fit: no even split has a smaller largest share.
    The last accelerator keeps its own limit, so that a layer counted too low still finds room. Where the accelerators
    cannot hold the model, nothing can be evened out and the limits stay as they are.

    Args:
        model: The model, on any device.
        max_memory: Limits by device, as for `get_max_memory`.
        no_split_module_classes: Names of classes whose modules stay on one device.
        dtype: Count weights as if converted to this.
        special_dtypes: Count these tensors, by name, as if converted to these.
        low_zero: Put on the first accelerator only what does not fit on the others: room to work with outputs there.

    Returns:
        Limits in bytes by device.
    """
    limits = get_max_memory(max_memory)
    devices = [device for device in accelerators(limits) if limits[device] > 0]
    if len(devices) < 2:
        return limits
    sizes = group_modules(model, no_split_module_classes, dtype, special_dtypes).sizes
    if low_zero:
        # The first takes what is left when the others are full; rounded up to whole layers by the placement.
        total = sum(sizes)
        first, devices = devices[0], devices[1:]
        if total > sum(limits[device] for device in devices):
            limits[first] = min(limits[first], _least_before(sizes, [limits[device] for device in devices]))
            return limits
        limits[first] = 0
    share = _smallest_share(sizes, [limits[device] for device in devices])
    if share is not None:
        for device in devices[:-1]:
            limits[device] = min(limits[device], share)
    return limits


def _fits(sizes: Sequence[int], limits: Sequence[int]) -> bool:
    """Whether groups placed in order, device after device, fit within limits."""
    index, room = 0, limits[0]
    for size in sizes:
        while size > room:
            index += 1
            if index == len(limits):
                return False
            room = limits[index]
        room -= size
    return True


def _smallest_share(sizes: Sequence[int], limits: Sequence[int]) -> int | None:
    """The smallest limit for all devices with which groups fit in order; None where even their own do not do."""
    if not sizes or not _fits(sizes, limits):
        return None
    # Larger limits never hurt a placement in order, so the answer is found by halving.
    low = -(-sum(sizes) // len(limits))
    shares = range(low, max(limits) + 1)
    found = bisect.bisect_left(shares, True, key=lambda share: _fits(sizes, [min(share, each) for each in limits]))
    return shares[found] if found < len(shares) else max(limits)


def _least_before(sizes: Sequence[int], limits: Sequence[int]) -> int:
    """The least that a device before the others must take for the rest to fit on them, in order."""
    starts = range(len(sizes) + 1)
    first = bisect.bisect_left(starts, True, key=lambda start: _fits(sizes[start:], limits))
    return sum(sizes[:first])
