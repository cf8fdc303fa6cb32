"""Assigns each part of a model to a device, from sizes alone; the model may be on the meta device.

`assign_devices` computes the assignment of groups within limits; `infer_auto_device_map` splits a model into groups and
maps module names to devices.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ..runtime.devices import require_device
from ..runtime.helpers import convert_bytes
from ..settings import env
from .max_memory import OFFLOADED, Device, Limits, accelerators, get_max_memory
from .module_groups import ModuleGroups, group_modules
from .module_tree import build_tree
from .sizes import Dtype

logger = logging.getLogger(__name__)

DeviceMap = dict[str, Device]
_UNLIMITED = 2**63


def infer_auto_device_map(
    model: nn.Module,
    max_memory: Mapping[Device, int | str] | None = None,
    no_split_module_classes: Sequence[str] | str | None = None,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> DeviceMap:
    """Assigns each part of a model to a device: accelerators are filled first, then CPU memory, then the disk.

    Layers are assigned in order, so that activations cross devices as rarely as possible. Tied weights stay together. If the
    accelerators cannot hold the model, the first one reserves memory to run offloaded layers: the size of the largest of
    them, and of two modules that are loaded one after the other, since weights are prefetched. A layer that does not fit on
    a device closes it: later layers go to the same device as this one, or to later devices.

    Args:
        model: The model; its values are not read, and may be on the meta device.
        max_memory: Limits by device, as for `get_max_memory`. The disk takes the rest, without limit unless one is given
            for ``"disk"``.
        no_split_module_classes: Names of classes whose modules stay on one device (blocks with a residual connection).
        dtype: Compute sizes as if weights were converted to this dtype.
        special_dtypes: Compute sizes as if these tensors, by name, were converted to these dtypes.
        verbose: Log the device of each part at level INFO.
        clean_result: Merge the entries of modules on one device into one. False: keep separate entries below the root.
        offload_buffers: Offload the buffers of offloaded layers, too. False: they stay on the first accelerator, which
            reserves memory for them.
        fallback_allocation: A layer larger than a device does not close it; smaller layers after it may still fill it.

    Returns:
        Devices by name of module (or of a tensor that belongs directly to a larger module); ``{"": device}`` if all parts
        are on one device.

    Raises:
        ValueError: if a part fits nowhere, with its size and the free memory of each device.

    Example:
        ```python
        infer_auto_device_map(model, max_memory={0: "10GiB", "cpu": "30GiB"}, no_split_module_classes=["Block"])
        ```
    """
    limits = get_max_memory(max_memory)
    limits.setdefault("disk", _UNLIMITED)
    groups = group_modules(model, no_split_module_classes, dtype, special_dtypes)
    places = assign_devices(
        groups,
        limits,
        offload_buffers=offload_buffers,
        fallback=fallback_allocation,
        ahead=env.flag("ACCELERATE_OFFLOAD_PREFETCH", default=True),
    )
    if verbose:
        for names, size, device in zip(groups.names(), groups.sizes, places, strict=True):
            logger.info("%s (%s) is assigned to %s", ", ".join(names), convert_bytes(size), device)
    return _named(groups, places, clean_result)


# Assignment -----------------------------------------------------------------------------------------------------------


@dataclass
class _Budget:
    """The memory budget of one device.

    Attributes:
        capacity: Bytes of the empty device.
        left: Bytes still free.
        passed: The device is closed; later groups go to the next ones.
    """

    capacity: int
    left: int
    passed: bool = False


def assign_devices(
    groups: ModuleGroups, limits: Limits, *, offload_buffers: bool = True, fallback: bool = False, ahead: bool = True
) -> list[Device]:
    """Assigns each group to a device. Pure function.

    Args:
        groups: The groups, in order.
        limits: Bytes by device, fastest first.
        offload_buffers: Buffers go to the device of their group; otherwise to the first device.
        fallback: A group larger than a device skips it, and later groups may still go there. Otherwise it closes the device.
        ahead: Weights are prefetched: the next modules are copied to the device while one computes.

    Raises:
        ValueError: if a group fits nowhere.
    """
    fast = {device: limits[device] for device in accelerators(limits)}
    if fast:
        # First in strict order, so that activations never return to an earlier device; then wherever a group fits.
        for skip in (False, True) if fallback else (False,):
            found = _in_order(groups.sizes, fast, skip=skip)
            if None not in found:
                return [device for device in found if device is not None]
    main = next((device for device, limit in (fast or limits).items() if limit > 0), next(iter(limits)))
    waits = OFFLOADED if fast else OFFLOADED[OFFLOADED.index(str(main)) + 1 :]
    count_buffers = bool(fast) and not offload_buffers
    kept = 0  # bytes reserved on the first device to run offloaded groups; grows until it suffices
    while True:
        found = _in_order(groups.sizes, {**limits, main: max(limits[main] - kept, 0)}, skip=fallback)
        places = [device for device in found if device is not None]
        if len(places) < len(found):
            raise ValueError(_refusal(found, groups, limits, kept, main))
        waiting = [number for number, device in enumerate(places) if device in waits]
        needed = _runtime_reserve(
            groups, waiting, limits[main], with_buffers=offload_buffers, ahead=ahead and bool(fast)
        )
        buffers = sum(groups.buffers[number] for number in waiting)
        if count_buffers and needed + buffers > limits[main]:
            # Offloading more of the model would not make them fit.
            logger.warning(
                "the buffers of offloaded layers take %s on device %s, which does not have that much memory left: pass "
                "offload_buffers=True to offload them too.",
                convert_bytes(buffers),
                main,
            )
            count_buffers, kept = False, 0
            continue
        needed += buffers if count_buffers else 0
        if needed <= kept:
            return places
        kept = needed


def _runtime_reserve(
    groups: ModuleGroups, waiting: Sequence[int], limit: int, *, with_buffers: bool, ahead: bool
) -> int:
    """Returns the bytes to reserve on the device that runs offloaded groups.

    This is the size of the largest of them. With prefetching it is at least twice the largest module that is loaded at once:
    one computes while the next is copied.
    """
    sizes, units = [], []
    for number in waiting:
        size = groups.sizes[number] - (0 if with_buffers else groups.buffers[number])
        unit = min(groups.units[number], size)
        sizes.append(size if size <= limit else 0)  # a larger one cannot run there anyway
        units.append(unit if unit <= limit else 0)
    largest = max(sizes, default=0)
    return max(largest, min(2 * max(units, default=0), sum(sizes))) if ahead else largest


def _in_order(sizes: Sequence[int], limits: Mapping[Device, int], *, skip: bool) -> list[Device | None]:
    """Assigns sizes to devices in order; None for one that fits nowhere.

    Args:
        sizes: Bytes of each group.
        limits: Bytes by device.
        skip: A group larger than a device skips it, and later groups may still go there. Otherwise it closes the device.
    """
    rooms = [(device, _Budget(limit, limit)) for device, limit in limits.items()]
    places: list[Device | None] = []
    latest: Device | None = None
    for size in sizes:
        if size == 0:  # follows its neighbors, see _named
            places.append(latest if latest is not None else rooms[0][0])
            continue
        chosen: Device | None = None
        for device, room in rooms:
            if room.passed:
                continue
            if size <= room.left:
                room.left -= size
                chosen = latest = device
                break
            if not skip or size <= room.capacity:
                room.passed = True
        places.append(chosen)
        while rooms[0][1].passed and len(rooms) > 1:
            rooms.pop(0)
    return places


def _refusal(found: Sequence[Device | None], groups: ModuleGroups, limits: Limits, reserve: int, main: Device) -> str:
    used = dict.fromkeys(limits, 0)
    for size, device in zip(groups.sizes, found, strict=True):
        if device is not None:
            used[device] += size
    number = found.index(None)
    lines = [
        f"  {device}: {convert_bytes(limit)}, of which {convert_bytes(used[device])} are used"
        + (f" and {convert_bytes(reserve)} reserved to run offloaded layers" if device == main and reserve else "")
        for device, limit in limits.items()
    ]
    return (
        f"{', '.join(groups.names()[number])} needs {convert_bytes(groups.sizes[number])}, and no device has that much "
        "left:\n"
        + "\n".join(lines)
        + "\nRaise a limit in max_memory, remove the one for 'disk' (the disk is unlimited then), or remove a class from "
        "no_split_module_classes so that its modules can be split."
    )


# Names ----------------------------------------------------------------------------------------------------------------


_NOTHING, _SEVERAL = object(), object()


def _named(groups: ModuleGroups, places: Sequence[Device], clean: bool) -> DeviceMap:
    """Builds the device map; a module replaces its parts if all are on one device.

    Args:
        groups: The groups.
        places: The device of each group. A group of size 0 takes the device of its neighbors.
        clean: Merge below the root, too.
    """
    tree, visited, numbers = groups.tree, groups.visited, groups.numbers
    common: list[object] = [_NOTHING] * len(tree)
    decided = [device if size else _NOTHING for size, device in zip(groups.sizes, places, strict=True)]
    for order in range(len(visited) - 1, -1, -1):
        here, number = visited[order], numbers[order]
        if number >= 0:
            common[here] = _joined(common[here], decided[number])
        if here and common[here] is not _NOTHING:
            parent = tree.parents[here]
            common[parent] = _joined(common[parent], common[here])
    result: DeviceMap = {}
    behind = 0  # modules before this position are covered
    for order, here in enumerate(visited):
        if here < behind:
            continue
        found = common[here]
        if found is _NOTHING:  # nothing inside has a size
            found = next((places[number] for number in numbers[order:] if number >= 0), _NOTHING)
        if isinstance(found, (int, str)) and (here or clean or len(visited) == 1):
            result[tree.names[here]] = found
            behind = tree.ends[here]
        elif numbers[order] >= 0:
            result.update(dict.fromkeys(groups.own_tensors(here), places[numbers[order]]))
    return result


def _joined(one: object, other: object) -> object:
    if one is _NOTHING or one == other:
        return other
    return one if other is _NOTHING else _SEVERAL


def clean_device_map(device_map: DeviceMap, module_name: str = "") -> DeviceMap:
    """Merges, in place, the entries of a module's parts into one for the module if all are on the same device.

    Args:
        device_map: Devices by name.
        module_name: Merge only below this module.

    Returns:
        `device_map`.
        `device_map`.

    Example:
        >>> clean_device_map({"a.x": 0, "a.y": 0, "b": 1})
        {'b': 1, 'a': 0}
    """
    inside: dict[str, list[str]] = {}
    for name in device_map:
        parts = name.split(".") if name else []
        for depth in range(len(parts)):
            inside.setdefault(".".join(parts[:depth]), []).append(name)
    for module, names in sorted(inside.items(), key=lambda item: item[0].count(".") + bool(item[0])):
        if module_name and module != module_name and not module.startswith(f"{module_name}."):
            continue
        present = [name for name in names if name in device_map]
        if present and len({device_map[name] for name in present}) == 1:
            device = device_map[present[0]]
            for name in present:
                del device_map[name]
            device_map[module] = device
    return device_map


# Checks ---------------------------------------------------------------------------------------------------------------


_Place = TypeVar("_Place", bound="int | str | torch.device")


def device_of(name: str, device_map: Mapping[str, _Place]) -> _Place | None:
    """Returns the device of a tensor or module: from its own entry or that of its nearest ancestor; None without either."""
    while True:
        if name in device_map:
            return device_map[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


def normalize(device_map: Mapping[str, Device | torch.device]) -> dict[str, str | torch.device]:
    """Normalizes the devices of a map for comparison: ``"cpu"``, ``"disk"``, or a `torch.device` with an index.

    Raises:
        RuntimeError: if a part is assigned to a device that this process does not have.
    """
    found: dict[str, str | torch.device] = {}
    known: dict[Device | torch.device, str | torch.device] = {"disk": "disk"}
    for name, place in device_map.items():
        if place not in known:
            try:
                device = require_device(place)
            except RuntimeError as error:
                raise RuntimeError(
                    f"the device_map assigns {name or 'the whole model'!r} to {place!r}: {error}"
                ) from None
            known[place] = "cpu" if device.type == "cpu" else device
        found[name] = known[place]
    return found


def check_device_map(model: nn.Module, device_map: Mapping[str, Device | torch.device]) -> None:
    """Checks that a device map covers a model; warns about keys that match no part of it.

    Raises:
        ValueError: with all uncovered tensors, except those that share memory with a covered one.
    """
    tree = build_tree(model)
    known = {*tree.names, *tree.tensor_names}
    for key in device_map.keys() - known:
        near = difflib.get_close_matches(key, known, 1, 0)
        logger.warning(
            "the device_map has an entry for %r, but %s has no such part; the nearest name is %r.",
            key,
            type(model).__name__,
            near[0] if near else "",
        )
    covered: set[int] = set()
    missing: dict[str, int] = {}
    for name, tensor in tree.named_tensors():
        if device_of(name, device_map) is None:
            missing[name] = id(tensor)
        else:
            covered.add(id(tensor))
    names = [name for name, tensor in missing.items() if tensor not in covered]
    if names:
        raise ValueError(
            f"the device_map has no entry for {', '.join(names)}. Add an entry for each, or for a module that contains "
            "it; infer_auto_device_map returns a map that covers everything."
        )


def check_tied_parameters_in_config(model: nn.Module) -> bool:
    """Returns whether a model's configuration, in the style of transformers, declares tied weights."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return False
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    output = getattr(model, "get_output_embeddings", None)
    ties_words = bool(getattr(text, "tie_word_embeddings", False)) and callable(output) and output() is not None
    ties_coder = bool(getattr(config, "is_encoder_decoder", False) and getattr(config, "tie_encoder_decoder", False))
    return ties_words or ties_coder or any(hasattr(module, "_tie_weights") for module in model.modules())


def check_tied_parameters_on_same_device(
    tied_params: Iterable[Sequence[str]], device_map: Mapping[str, _Place]
) -> None:
    """Warns about tied parameters on different devices, each of which would hold its own copy."""
    for names in tied_params:
        places = {name: device_of(name, device_map) for name in names}
        if len(set(places.values())) > 1:
            logger.warning(
                "tied parameters are on different devices: %s. They share one tensor; assign them to one device.",
                places,
            )
