"""Memory limits per device: measured, given by the user, or balanced over the devices."""

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
"""Devices on which weights are only stored: they are moved to another device for use. Slower ones last."""


def accelerators(devices: Iterable[Device]) -> list[Device]:
    """Returns the devices that compute, in order."""
    return [device for device in devices if device not in OFFLOADED]


def get_max_memory(max_memory: Mapping[Device, int | str] | None = None) -> Limits:
    """Returns the bytes that weights may take on each device.

    Args:
        max_memory: Limits by device: numbers of bytes, or sizes such as ``"10GiB"`` and ``"10GB"``. Devices that are not
            listed are not used. Sizes in a dictionary are replaced by numbers of bytes in place, since callers rely on it.
            None: the free memory of each visible accelerator and of the machine.

    Returns:
        Limits in bytes: accelerators in order, then ``"cpu"``, then ``"disk"``.

    Raises:
        ValueError: for an invalid size or device.
    """
    if max_memory is None:
        return _free_memory()
    limits = {device: convert_file_size_to_int(size) for device, size in max_memory.items()}
    for device in limits:
        if not isinstance(device, int) and device not in (*OFFLOADED, "mps"):
            raise ValueError(
                f"max_memory has the device {device!r}: expected the index of an accelerator (0, 1 ...), 'mps', 'cpu' "
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
    """Computes limits with which `infer_auto_device_map` spreads a model evenly over the accelerators.

    The limit is the smallest with which the layers, assigned in order, still fit, so no even split has a smaller largest
    share. The last accelerator keeps its full limit, to absorb layers whose size was underestimated. If the accelerators
    cannot hold the model, the limits are returned unchanged.

    Args:
        model: The model, on any device.
        max_memory: Limits by device, as for `get_max_memory`.
        no_split_module_classes: Names of classes whose modules stay on one device.
        dtype: Compute sizes as if weights were converted to this dtype.
        special_dtypes: Compute sizes as if these tensors, by name, were converted to these dtypes.
        low_zero: Use the first accelerator only for layers that do not fit on the others, so that it has room for outputs.

    Returns:
        Limits in bytes by device.
    """
    limits = get_max_memory(max_memory)
    devices = [device for device in accelerators(limits) if limits[device] > 0]
    if len(devices) < 2:
        return limits
    sizes = group_modules(model, no_split_module_classes, dtype, special_dtypes).sizes
    if low_zero:
        # The first device takes the rest after the others are full, rounded up to whole layers.
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
    """Returns whether groups assigned in order, device after device, fit within limits."""
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
    """Returns the smallest common limit with which groups fit in order; None if they do not even fit within `limits`."""
    if not sizes or not _fits(sizes, limits):
        return None
    # Larger limits never make an assignment in order worse, so a binary search finds the smallest.
    low = -(-sum(sizes) // len(limits))
    shares = range(low, max(limits) + 1)
    found = bisect.bisect_left(shares, True, key=lambda share: _fits(sizes, [min(share, each) for each in limits]))
    return shares[found] if found < len(shares) else max(limits)


def _least_before(sizes: Sequence[int], limits: Sequence[int]) -> int:
    """Returns the fewest bytes to assign to a preceding device so that the remaining groups fit in order."""
    starts = range(len(sizes) + 1)
    first = bisect.bisect_left(starts, True, key=lambda start: _fits(sizes[start:], limits))
    return sum(sizes[:first])
