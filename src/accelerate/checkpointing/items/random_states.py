"""The random states of a process: Python's, numpy's, torch's and each device's, as plain data and tensors.

On as many ranks as saved them, each takes up its own. On another number, a rank that has none takes a seed from rank 0's
states and its own number: the run differs from the one that was saved, but two resumed runs are the same.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ...runtime import devices
from ...runtime.rng import set_seed
from ...runtime.system.file_names import short_repr
from ..errors import Problem
from ..storage.schema import is_count

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
    lost = [Problem(path, "missing", f"no {name!r}") for name in _REQUIRED if name not in states]
    return lost or [Problem(path, "corrupt", text) for text in _unusable(states)]


def _unusable(states: dict[str, Any]) -> Iterator[str]:
    """Returns states that generators refuse, found by loading them into generators that are not in use."""
    trials: dict[str, Callable[[Any], object]] = {
        "random_state": lambda state: random.Random().setstate(_python_state(state)),
        "numpy_random_seed": lambda state: np.random.RandomState().set_state(state),
        "torch_manual_seed": lambda state: torch.Generator().set_state(state.clone()),
    }
    for name, take in trials.items():
        try:
            take(states[name])
        except Exception as error:  # noqa: BLE001 - each library has errors of its own
            yield f"{name!r} is no state of a generator ({type(error).__name__}: {error})"
    if not is_count(states.get(STEP, 0)):
        yield f"{STEP!r} is {short_repr(states[STEP])}; expected a number of at least 0"
    for kind in devices.DEVICES.values():
        saved = states.get(_key(kind.name))
        every = saved if isinstance(saved, (list, tuple)) else [saved]
        if saved is not None and kind.name not in ("cpu", "xla") and not all(map(_is_bytes, every)):
            yield f"{_key(kind.name)!r} is {short_repr(saved)}; expected tensors of bytes"


def _is_bytes(state: Any) -> bool:
    return isinstance(state, torch.Tensor) and state.dtype is torch.uint8 and state.dim() == 1


def _python_state(state: Any) -> Any:
    version, internal, gauss = state
    return version, tuple(internal), gauss


def restore(states: dict[str, Any]) -> None:
    """Takes up the states that `capture` gave. Those of devices this process does not have are left out."""
    random.setstate(_python_state(states["random_state"]))
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
