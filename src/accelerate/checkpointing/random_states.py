"""The random states of a process: Python's, numpy's, torch's and each device's, as plain data and tensors.

On as many ranks as saved them, each takes up its own. On another number, a rank that has none takes a seed from rank 0's
states and its own number: the run differs from the one that was saved, but two resumed runs are the same.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy as np
import torch

from ..runtime import devices
from ..runtime.rng import set_seed
from .errors import Problem

STEP = "step"
FORMAT = "format"
_REQUIRED = ("random_state", "numpy_random_seed", "torch_manual_seed")


def capture(step: int) -> dict[str, Any]:
    """The states of all generators of this process.

    Args:
        step: `Accelerator.step`, which the documented layout keeps here.
    """
    states: dict[str, Any] = {
        STEP: step,
        FORMAT: 1,
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }
    for kind in devices.DEVICES.values():
        if kind.name == "cpu" or not kind.is_available():
            continue
        if kind.name == "xla":
            import torch_xla.core.xla_model as xm

            states["xm_seed"] = xm.get_rng_state()
            continue
        module: Any = kind.torch_module()
        if hasattr(module, "get_rng_state_all"):
            states[_key(kind.name)] = module.get_rng_state_all()
        elif hasattr(module, "get_rng_state"):
            states[_key(kind.name)] = [module.get_rng_state()]
    return states


def _key(kind: str) -> str:
    return f"torch_{kind}_manual_seed"


def check(path: str, states: Any) -> list[Problem]:
    """What keeps states from being taken up."""
    if not isinstance(states, dict):
        return [Problem(path, "corrupt", f"expected random states, found {type(states).__name__}")]
    return [Problem(path, "missing", f"no {name!r}") for name in _REQUIRED if name not in states]


def restore(states: dict[str, Any]) -> None:
    """Takes up the states that `capture` gave. Those of devices this process does not have are left out."""
    version, internal, gauss = states["random_state"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"].clone())
    for kind in devices.DEVICES.values():
        if kind.name == "xla" and kind.is_available() and "xm_seed" in states:
            import torch_xla.core.xla_model as xm

            xm.set_rng_state(states["xm_seed"])
        elif kind.name != "cpu" and kind.is_available() and _key(kind.name) in states:
            _restore_device(kind.torch_module(), states[_key(kind.name)])


def _restore_device(module: Any, saved: Any) -> None:
    every = [state.clone() for state in (saved if isinstance(saved, (list, tuple)) else [saved])]
    if hasattr(module, "set_rng_state_all"):
        module.set_rng_state_all(every[: module.device_count()])
    else:
        module.set_rng_state(every[0])


def derive(states: dict[str, Any], rank: int) -> None:
    """Seeds the generators of a rank that the checkpoint has no states for, from those of rank 0."""
    internal = states["torch_manual_seed"].numpy().tobytes()
    set_seed(zlib.crc32(internal, rank) & 0x7FFFFFFF)
