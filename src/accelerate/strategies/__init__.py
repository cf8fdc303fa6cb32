"""One strategy object per way of distributing. `choose` looks it up; nobody else asks which one it is.

A strategy is a row here and a file beside this one. Other distributions add theirs through the entry-point group
``accelerate.strategies``, named after a member of `DistributedType`.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from ..settings.enums import DistributedType
from .base import Bundle, RunSettings, Strategy

__all__ = ["STRATEGIES", "Bundle", "RunSettings", "Strategy", "choose"]

_DDP = "accelerate.strategies.ddp:DataParallel"

STRATEGIES: dict[DistributedType, str] = {
    DistributedType.NO: "accelerate.strategies.base:Strategy",
    DistributedType.MULTI_CPU: _DDP,
    DistributedType.MULTI_GPU: _DDP,
    DistributedType.MULTI_NPU: _DDP,
    DistributedType.MULTI_MLU: _DDP,
    DistributedType.MULTI_SDAA: _DDP,
    DistributedType.MULTI_MUSA: _DDP,
    DistributedType.MULTI_XPU: _DDP,
    DistributedType.MULTI_HPU: _DDP,
    DistributedType.MULTI_NEURON: _DDP,
}


def choose(kind: DistributedType) -> type[Strategy]:
    """The strategy class for a way of distributing.

    Raises:
        ValueError: when neither this version nor an installed distribution has one.
    """
    for entry in entry_points(group="accelerate.strategies", name=kind.value):
        strategy: type[Strategy] = entry.load()
        return strategy
    try:
        module, name = STRATEGIES[kind].split(":")
    except KeyError:
        raise ValueError(
            f"distributed type {kind.value} is not part of this version, which has "
            f"{', '.join(known.value for known in STRATEGIES)}."
        ) from None
    found: type[Strategy] = getattr(importlib.import_module(module), name)
    return found
