"""Random number generators: seeds all of a process's generators, or broadcasts their states from rank 0.

Covers every type of the device table. A type without a device on this machine is skipped, and an error only by name.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..settings import env
from ..settings.enums import RNGType
from . import devices
from .collectives import broadcast
from .world import current


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seeds Python's `random`, numpy, torch and every device of this process.

    Args:
        seed: Any integer. numpy, whose seeds have 32 bits, gets it modulo ``2**32``.
        device_specific: Add the rank, so that processes draw different numbers.
        deterministic: Call `torch.use_deterministic_algorithms`, after which operations without a deterministic
            implementation raise. cuBLAS needs ``CUBLAS_WORKSPACE_CONFIG`` before its first use, which is set to
            ``:4096:8`` unless it is set already.

    Raises:
        TypeError: if `seed` is not an integer.

    Example:
        ```python
        set_seed(42)
        ```
    """
    try:
        seed = operator.index(seed)
    except TypeError:
        raise TypeError(f"set_seed expects an integer; got {seed!r} ({type(seed).__name__}).") from None
    if device_specific:
        seed += current().rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    for kind in devices.DEVICES.values():
        if kind.name != "cpu" and kind.is_available():
            _seed_device(kind, seed)
    if deterministic:
        if env.get("CUBLAS_WORKSPACE_CONFIG") is None:
            env.publish({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
        torch.use_deterministic_algorithms(True)


def _seed_device(kind: devices.DeviceKind, seed: int) -> None:
    if kind.name == "xla":
        import torch_xla.core.xla_model as xm

        xm.set_rng_state(seed)
        return
    module = kind.torch_module()
    seed_all = getattr(module, "manual_seed_all", None) or getattr(module, "manual_seed", None)
    if seed_all is not None:
        seed_all(seed)


def synchronize_rng_state(rng_type: RNGType | str | None = None, generator: torch.Generator | None = None) -> None:
    """Broadcasts the state of one random number generator from rank 0.

    Args:
        rng_type: ``"torch"`` (the default CPU generator), a device type (``"cuda"``, ``"xpu"`` …: the generator of its
            current device), or ``"generator"``. None selects ``"generator"`` if `generator` is given, else ``"torch"``.
        generator: The generator for ``"generator"``.

    Raises:
        ValueError: for another type, or for ``"generator"`` without a generator.
        RuntimeError: for a device type that this process does not have.
    """
    kind = _rng_type(rng_type, generator)
    if kind is RNGType.GENERATOR and generator is None:
        raise ValueError("rng_type='generator' needs the generator to synchronize; generator is None.")
    if current().size == 1:
        return
    if kind is RNGType.GENERATOR:
        assert generator is not None
        generator.set_state(broadcast(generator.get_state()))
    elif kind is RNGType.TORCH:
        torch.set_rng_state(broadcast(torch.get_rng_state()))
    elif kind is RNGType.XLA:
        _synchronize_xla()
    else:
        module = _device_module(kind)
        module.set_rng_state(broadcast(module.get_rng_state()))


def synchronize_rng_states(
    rng_types: Iterable[RNGType | str] | RNGType | str, generator: torch.Generator | None = None
) -> None:
    """Calls `synchronize_rng_state` for each of several types.

    Args:
        rng_types: The types, in the same order on every process.
        generator: The generator for ``"generator"``.
    """
    for rng_type in (rng_types,) if isinstance(rng_types, (str, RNGType)) else rng_types:
        synchronize_rng_state(rng_type, generator)


def _rng_type(rng_type: Any, generator: torch.Generator | None) -> RNGType:
    if rng_type is None:
        return RNGType.TORCH if generator is None else RNGType.GENERATOR
    if rng_type not in RNGType:
        raise ValueError(f"unknown type of random generator {rng_type!r}: expected one of {', '.join(RNGType.list())}.")
    return RNGType(rng_type)


def _device_module(kind: RNGType) -> ModuleType:
    row = devices.DEVICES[kind.value]
    module = row.torch_module() if row.is_available() else None
    if module is None:
        raise RuntimeError(
            f"cannot synchronize the random generator of {kind.value!r}: this process sees no such device. "
            f"It computes on {current().device}; remove {kind.value!r} from rng_types."
        )
    return module


def _synchronize_xla() -> None:
    import torch_xla.core.xla_model as xm

    state = torch.tensor(xm.get_rng_state(), dtype=torch.int64)
    xm.set_rng_state(int(broadcast(state).item()))
