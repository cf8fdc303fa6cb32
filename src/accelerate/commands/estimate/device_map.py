"""``accelerate estimate-memory --device_map``: the device map of a model, computed from sizes alone.

It equals the map that `dispatch_model` uses; adjacent layers are printed as a range.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..parsers import add
from .empty_model import EstimateError

if TYPE_CHECKING:
    from torch import nn

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class MapReport:
    """Modules assigned to one device.

    Attributes:
        device: The device's index, ``cpu`` or ``disk``.
        modules: FQNs in the map.
        size: Their size in bytes.
        limit: Memory limit in bytes; None without one.
    """

    device: int | str
    modules: tuple[str, ...]
    size: int
    limit: int | None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the map to the command's parser."""
    add(
        parser,
        "--device_map",
        choices=MAPS,
        metavar="KIND",
        help=f"also show where each part goes, in the first of --dtypes: {', '.join(MAPS)} (auto is balanced)",
    )
    add(
        parser,
        "--max_memory",
        nargs="+",
        type=_limits,
        metavar="DEVICE=SIZE",
        help="memory limit of each device, as in 0=10GiB 1=10GiB cpu=30GiB; devices left out are not used (disk: no limit)",
    )
    add(
        parser,
        "--no_split_module_classes",
        nargs="+",
        metavar="CLASS",
        help="classes whose modules stay whole (those that the model names)",
    )


def _limits(text: str) -> list[tuple[int | str, int]]:
    from ...runtime.helpers import convert_file_size_to_int

    found: list[tuple[int | str, int]] = []
    for word in filter(None, text.split(",")):
        device, equals, size = (part.strip() for part in word.partition("="))
        if not equals or not device:
            raise argparse.ArgumentTypeError(f"expected DEVICE=SIZE, as in 0=10GiB or cpu=30GiB, found {word!r}")
        try:
            amount = convert_file_size_to_int(int(size) if size.isdecimal() else size)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{word!r}: expected a size such as 10GiB, 500MB or a number of bytes"
            ) from None
        if not device.isdecimal() and device not in ("cpu", "disk", "mps"):
            raise argparse.ArgumentTypeError(
                f"{word!r}: expected the number of an accelerator (0, 1 ...), mps, cpu or disk, found {device!r}"
            )
        found.append((int(device) if device.isdecimal() else device, amount))
    return found


def parse_limits(args: argparse.Namespace) -> dict[int | str, int] | None:
    """Returns the memory limits by device, or None if none are given.

    Raises:
        EstimateError: if a device has two limits, or limits or classes are given without a map.
    """
    if args.device_map is None and (args.max_memory or args.no_split_module_classes):
        flag = "--max_memory" if args.max_memory else "--no_split_module_classes"
        raise EstimateError(f"{flag} is about a map: add --device_map {{{','.join(MAPS)}}}.")
    if args.max_memory is None:
        return None
    limits: dict[int | str, int] = {}
    for device, amount in (pair for pairs in args.max_memory for pair in pairs):
        if device in limits:
            raise EstimateError(f"--max_memory gives device {device} two limits: give it one.")
        limits[device] = amount
    return limits


def assign(
    model: nn.Module, kind: str, limits: Mapping[int | str, int] | None, whole: Sequence[str] | None, dtype: str
) -> list[MapReport]:
    """Computes a device map.

    Args:
        model: A model on the meta device.
        kind: One of `MAPS`.
        limits: Bytes by device; None: the free memory of this machine.
        whole: Classes that are not split; None: the model's own list.
        dtype: dtype of the weights.

    Raises:
        EstimateError: if a module fits on no device.
    """
    from ...offload.device_map import infer_auto_device_map
    from ...offload.max_memory import get_balanced_memory, get_max_memory
    from ...offload.sizes import compute_module_sizes

    classes = list(whole or getattr(model, "_no_split_modules", None) or ())
    try:
        allowed: Any = get_max_memory(limits)
        share = allowed
        if kind != "sequential":
            share = get_balanced_memory(model, allowed, classes, dtype, low_zero=kind == "balanced_low_0")
        devices = infer_auto_device_map(model, share, classes, dtype)
    except ValueError as error:
        raise EstimateError(f"{type(model).__name__} cannot be placed: {error}") from error
    sizes = compute_module_sizes(model, dtype)
    placed = []
    for device in dict.fromkeys((*allowed, *devices.values())):
        names = tuple(name for name, chosen in devices.items() if chosen == device)
        placed.append(MapReport(device, names, sum(sizes[name] for name in names), allowed.get(device)))
    return placed


def abbreviate(names: Iterable[str]) -> list[str]:
    """Names in order, with ``h.3``, ``h.4``, ``h.5`` as ``h.3-5``, and the whole model as ``(all)``."""
    runs: list[tuple[str, int, int, str]] = []
    for name in names:
        found = re.fullmatch(r"(.*?)(\d+)((?:\.\D[^.]*)*)", name)
        if found is None:
            runs.append((name or "(all)", -1, -1, ""))
            continue
        head, number, tail = found[1], int(found[2]), found[3]
        latest = next((i for i in reversed(range(len(runs))) if runs[i][0] == head and runs[i][3] == tail), None)
        if latest is not None and runs[latest][2] == number - 1:
            runs[latest] = (head, runs[latest][1], number, tail)
        else:
            runs.append((head, number, number, tail))
    return [
        head if first < 0 else f"{head}{first}{tail}" if first == last else f"{head}{first}-{last}{tail}"
        for head, first, last, tail in runs
    ]
