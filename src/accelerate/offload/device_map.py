"""Which device each part of a model goes to: decided from sizes alone, on a model that may be empty.

`place` is the arithmetic, over groups and limits; `infer_auto_device_map` cuts a model into groups and names the result.
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
    """A device for each part of a model, filling accelerators first, then memory, then the disk.

    Layers are placed in order, so that activations travel as little as they can. Tied weights go together. If not all fits
    on the accelerators, the first keeps room for the largest layer that it has to run, and for two modules that are
    fetched one after the other, since weights are read ahead. A layer that does not fit on a device ends it: what comes
    after goes to the same device as this layer or to later ones.

    Args:
        model: The model; its values are not looked at, and may be on the meta device.
        max_memory: Limits by device, as for `get_max_memory`. The disk takes what nothing else does; without limit unless
            one is given for ``"disk"``.
        no_split_module_classes: Names of classes whose modules stay on one device (blocks with a residual connection).
        dtype: Count weights as if converted to this.
        special_dtypes: Count these tensors, by name, as if converted to these.
        verbose: Log where each part goes, and why, at level INFO.
        clean_result: Name a module instead of its parts where all go to one device. False keeps the root's parts apart.
        offload_buffers: Buffers of offloaded layers are offloaded too. False: they stay on the first accelerator, and room
            is kept there.
        fallback_allocation: A layer larger than a device does not end it, and smaller layers after it still fill it.

    Returns:
        Devices by name of module (or of a tensor that lies directly on a larger module); ``{"": device}`` where all goes
        to one.

    Raises:
        ValueError: when something fits nowhere: what, how large it is and what each device had left.

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
            logger.info("%s (%s) goes to %s", ", ".join(names), convert_bytes(size), device)
    return _named(groups, places, clean_result)


# Arithmetic -----------------------------------------------------------------------------------------------------------


@dataclass
class _Budget:
    """What one device has left.

    Attributes:
        capacity: What it could take when empty.
        left: What it can still take.
        passed: The order has gone on to the next device.
    """

    capacity: int
    left: int
    passed: bool = False


def assign_devices(
    groups: ModuleGroups, limits: Limits, *, offload_buffers: bool = True, fallback: bool = False, ahead: bool = True
) -> list[Device]:
    """Returns a device for each group. Pure.

    Args:
        groups: What to place, in order.
        limits: Bytes by device, fastest first.
        offload_buffers: Buffers go where the rest of a group goes; else to the first device.
        fallback: A group larger than a device passes it by, and later ones may still go there. Else it ends the device.
        ahead: While one module computes, the next ones are on their way to the same device.

    Raises:
        ValueError: when a group fits nowhere.
    """
    fast = {device: limits[device] for device in accelerators(limits)}
    if fast:
        # In order first, so that nothing is sent back to a device already left; then wherever there is room.
        for skip in (False, True) if fallback else (False,):
            found = _in_order(groups.sizes, fast, skip=skip)
            if None not in found:
                return [device for device in found if device is not None]
    main = next((device for device, limit in (fast or limits).items() if limit > 0), next(iter(limits)))
    waits = OFFLOADED if fast else OFFLOADED[OFFLOADED.index(str(main)) + 1 :]
    count_buffers = bool(fast) and not offload_buffers
    kept = 0  # bytes on the first device for groups that wait elsewhere; the less it is, the fewer groups wait
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
            # To send the rest of the model away would not make them fit.
            logger.warning(
                "the buffers of offloaded layers take %s on device %s, which has no such room left: pass "
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
    """Returns the bytes that groups which wait elsewhere take on the device where they run.

    That is the largest of them, and with reading ahead two of the largest modules that are fetched as one: the one that
    computes, and as much again on its way.
    """
    sizes, units = [], []
    for number in waiting:
        size = groups.sizes[number] - (0 if with_buffers else groups.buffers[number])
        unit = min(groups.units[number], size)
        sizes.append(size if size <= limit else 0)  # a larger one cannot run there in any case
        units.append(unit if unit <= limit else 0)
    largest = max(sizes, default=0)
    return max(largest, min(2 * max(units, default=0), sum(sizes))) if ahead else largest


def _in_order(sizes: Sequence[int], limits: Mapping[Device, int], *, skip: bool) -> list[Device | None]:
    """Devices in order; None for a group that fits nowhere.

    Args:
        sizes: Bytes of what is to be placed.
        limits: Bytes by device.
        skip: A group larger than a whole device passes it by, and later ones may still go there. Else it ends the device.
    """
    rooms = [(device, _Budget(limit, limit)) for device, limit in limits.items()]
    places: list[Device | None] = []
    latest: Device | None = None
    for size in sizes:
        if size == 0:  # decided by its neighbours, see _named
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
        f"  {device}: {convert_bytes(limit)}, of which {convert_bytes(used[device])} taken"
        + (f" and {convert_bytes(reserve)} kept free to run offloaded layers" if device == main and reserve else "")
        for device, limit in limits.items()
    ]
    return (
        f"{', '.join(groups.names()[number])} needs {convert_bytes(groups.sizes[number])}, and no device has that much "
        "left:\n"
        + "\n".join(lines)
        + "\nRaise a limit in max_memory, leave out the one for 'disk' (it is without limit then), or split a class of "
        "no_split_module_classes."
    )


# Names ----------------------------------------------------------------------------------------------------------------


_NOTHING, _SEVERAL = object(), object()


def _named(groups: ModuleGroups, places: Sequence[Device], clean: bool) -> DeviceMap:
    """The map, with a module in place of its parts where all go to one device.

    Args:
        groups: What was placed.
        places: The device of each group. One without a size has none of its own: its neighbours decide.
        clean: The root may take the place of its parts.
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
    behind = 0  # the modules before this position have their entry
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
    """Replaces, in place, the entries of a module's parts by one for the module where all name the same device.

    Args:
        device_map: Devices by name.
        module_name: Where to begin.

    Returns:
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
    """The device of a tensor or module: its own entry's, or that of the module nearest above it; None without one."""
    while True:
        if name in device_map:
            return device_map[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


def normalize(device_map: Mapping[str, Device | torch.device]) -> dict[str, str | torch.device]:
    """Returns a device map in the form in which places are compared: ``"cpu"``, ``"disk"``, or a device with its index.

    Raises:
        RuntimeError: when a part goes to a device that this process does not have.
    """
    found: dict[str, str | torch.device] = {}
    known: dict[Device | torch.device, str | torch.device] = {"disk": "disk"}
    for name, place in device_map.items():
        if place not in known:
            try:
                device = require_device(place)
            except RuntimeError as error:
                raise RuntimeError(
                    f"the device_map sends {name or 'the whole model'!r} to {place!r}: {error}"
                ) from None
            known[place] = "cpu" if device.type == "cpu" else device
        found[name] = known[place]
    return found


def check_device_map(model: nn.Module, device_map: Mapping[str, Device | torch.device]) -> None:
    """Checks that a device map covers a model; warns of keys that name no part of it.

    Raises:
        ValueError: naming every tensor that it leaves out; one that shares a covered tensor's memory counts as covered.
    """
    tree = build_tree(model)
    known = {*tree.names, *tree.tensor_names}
    for key in device_map.keys() - known:
        near = difflib.get_close_matches(key, known, 1, 0)
        logger.warning(
            "the device_map has an entry for %r, and %s has no such part; the nearest name is %r.",
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
            f"the device_map does not say where these go: {', '.join(names)}. Add an entry for each, or for a module that "
            "holds it; infer_auto_device_map makes a map that covers everything."
        )


def check_tied_parameters_in_config(model: nn.Module) -> bool:
    """Whether the model's own configuration, as transformers' models have one, says that it ties weights."""
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
    """Warns of tied parameters that a device map separates: each device then holds a copy of its own."""
    for names in tied_params:
        places = {name: device_of(name, device_map) for name in names}
        if len(set(places.values())) > 1:
            logger.warning(
                "tied parameters are on different devices: %s. They share one tensor, so put them on one device.",
                places,
            )
