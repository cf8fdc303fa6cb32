"""Items of a run's progress: positions of loaders, epochs, accumulated gradients, states of random number generators.

Positions do not depend on the number of ranks: they count steps of all ranks together, and are converted if a step now has
another number of samples.

Random states are restored on as many ranks as saved them. With more ranks, a rank without a file derives a seed from rank
0's states and its own rank: the run differs from the one that was saved, but any two resumed runs are the same.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...runtime import devices
from ...runtime.rng import set_seed
from ...runtime.system.file_names import short_repr
from ...settings.enums import SCALER_NAME
from ..errors import Problem
from ..storage.filenames import LOADER_NAME, PROGRESS_NAME, custom_file, gradients_file, indexed_name, rng_file
from ..storage.formats import read_json
from ..storage.schema import is_count
from .model_items import LoadScaler, LoadScheduler, SaveObject, load_registered, scheduler_file
from .state_item import JSON, TORCH, HasStep, LoadItem, SaveItem, TrainingState

EXTENT = "_extent"
"""Key in a loader's position: size of one of its steps."""
STEP = "step"
_FORMAT = "format"


def save_items(run: TrainingState, rank: int, *, gradients: bool) -> list[SaveItem]:
    """Creates the items besides models and optimizers.

    Random states are last, since capturing the others may draw random numbers.

    Args:
        run: The objects.
        rank: This rank.
        gradients: Gradients that are being accumulated are saved.
    """
    return [
        *(SaveObject(scheduler_file(index), inner_scheduler(each)) for index, each in enumerate(run.schedulers)),
        *(SaveLoader(loader_file(i), loader) for i, loader in enumerate(run.loaders) if is_stateful(loader)),
        *([] if run.scaler is None else [SaveObject(SCALER_NAME, run.scaler)]),
        *(SaveObject(custom_file(index), registered) for index, registered in enumerate(run.registered)),
        SaveProgress(PROGRESS_NAME, run),
        *([SaveGradients(gradients_file(rank), run)] if gradients else []),
        SaveRandomStates(rng_file(rank), run.counter),
    ]


def load_items(run: TrainingState, rank: int, size: int, saved_world_size: int, *, gradients: bool) -> list[LoadItem]:
    """Creates the items besides models and optimizers.

    Args:
        run: The objects.
        rank, size: This rank, and the number of ranks.
        saved_world_size: Number of ranks that saved the checkpoint.
        gradients: Gradients can be restored; otherwise a checkpoint that has some is rejected.
    """
    own = rank if saved_world_size == size else None
    return [
        *(LoadScheduler(scheduler_file(index), inner_scheduler(each)) for index, each in enumerate(run.schedulers)),
        *(LoadLoader(loader_file(i), loader) for i, loader in enumerate(run.loaders) if is_stateful(loader)),
        *([] if run.scaler is None else [LoadScaler(SCALER_NAME, run.scaler)]),
        *(load_registered(index, registered) for index, registered in enumerate(run.registered)),
        LoadProgress(PROGRESS_NAME, run),
        LoadGradients(gradients_file(own or 0), run, own, size, saved_world_size)
        if gradients
        else RejectGradients(gradients_file(0)),
        LoadRandomStates(rng_file(rank if rank < saved_world_size else 0), run.counter, rank, rank < saved_world_size),
    ]


def inner_scheduler(scheduler: Any) -> Any:
    """Returns the scheduler inside a prepared one, whose state it is."""
    return getattr(scheduler, "scheduler", scheduler)


# Loaders --------------------------------------------------------------------------------------------------------------


def loader_file(index: int) -> str:
    """Returns the file of a loader's position."""
    return indexed_name(LOADER_NAME, index, ".bin")


def is_stateful(loader: Any) -> bool:
    """Returns whether a loader has a position to save (``use_stateful_dataloader=True``)."""
    return bool(getattr(loader, "use_stateful_dataloader", False)) or hasattr(loader, "snapshot_every_n_steps")


@dataclass
class SaveLoader(SaveItem):
    """Saves the position of a loader."""

    path: str
    loader: Any

    def capture(self) -> dict[str, Any]:
        return {**self.loader.state_dict(), EXTENT: extent(self.loader)}


@dataclass
class LoadLoader(LoadItem):
    """Loads the position of a loader, converted to steps of this loader."""

    path: str
    loader: Any

    def check(self, state: Any) -> list[Problem]:
        return _check_position(self.path, state, self.loader)

    def load(self, state: Any) -> None:
        self.loader.load_state_dict(convert_position(state, self.loader))


def extent(loader: Any) -> dict[str, Any]:
    """Returns the size of a loader's step: samples of all ranks, and batches that the reading rank draws for it."""
    draws = loader._batches_per_step() if hasattr(loader, "_batches_per_step") else 1
    return {"samples": getattr(loader, "total_batch_size", None), "draws": draws, "workers": loader.num_workers}


def _ratio(saved: dict[str, Any], loader: Any) -> tuple[int, int]:
    """Returns draws of this loader for one draw of the saved one, as a fraction."""
    before, now = saved.get(EXTENT), extent(loader)
    if before is None or before["samples"] is None or now["samples"] is None:
        return (now["draws"], before["draws"]) if before is not None else (1, 1)
    return before["samples"] * now["draws"], now["samples"] * before["draws"]


def _drawn(saved: dict[str, Any]) -> int:
    main = saved["_snapshot"].get("_main_snapshot", {}) if "_snapshot" in saved else saved
    own = main.get("_sampler_iter_state")
    return (
        int(own["drawn"]) if isinstance(own, dict) and "drawn" in own else int(main.get("_sampler_iter_yielded") or 0)
    )


def _check_position(path: str, saved: Any, loader: Any) -> list[Problem]:
    if not isinstance(saved, dict):
        return [Problem(path, "corrupt", f"expected a loader's position, found {type(saved).__name__}")]
    before, now = saved.get(EXTENT), extent(loader)
    if problem := _position_type_problem(path, before, saved):
        return [problem]
    if before is None or not ("_snapshot" in saved or "_num_yielded" in saved):
        return []  # saved by another release, or before the first batch
    problems = []
    parts, whole = _ratio(saved, loader)
    if _drawn(saved) * parts % whole and not saved.get("_iterator_finished"):
        text = (
            f"it is at step {_drawn(saved) // before['draws']} of {before['samples']} samples, which is not a whole "
            f"number of steps of {now['samples']}: choose batches of which all ranks together take {before['samples']}"
        )
        problems.append(Problem(path, "state", text))
    if before["workers"] != now["workers"]:
        text = f"saved by a loader with {before['workers']} workers; this one has {now['workers']}"
        problems.append(Problem(path, "state", text))
    return problems


_COUNTS = ("_num_yielded", "_sampler_iter_yielded", "_snapshot_step", "_steps_since_snapshot", "drawn")


def _position_type_problem(path: str, before: Any, saved: Any) -> Problem | None:
    """Returns the first value in a position that is not a valid count."""
    if before is not None:
        valid = isinstance(before, dict) and {"samples", "draws", "workers"} <= before.keys()
        samples = before["samples"] if valid else -1
        if not valid or not (samples is None or is_count(samples, 1)) or not is_count(before["draws"], 1):
            return Problem(
                path, "corrupt", f"{EXTENT!r} is {short_repr(before)}; expected numbers of samples, draws and workers"
            )
    for name, value in saved.items():
        if isinstance(value, dict) and (problem := _position_type_problem(path, None, value)):
            return problem
        if name in _COUNTS[:-1] and value is not None and not is_count(value):  # any dataset may have a "drawn"
            return Problem(path, "corrupt", f"{name!r} is {short_repr(value)}; expected a number of at least 0")
    return None


def convert_position(saved: dict[str, Any], loader: Any) -> dict[str, Any]:
    """Converts a saved position to steps of this loader."""
    parts, whole = _ratio(saved, loader)
    state = {name: value for name, value in saved.items() if name != EXTENT}
    return state if parts == whole else _scale_counts(state, parts, whole)


def _scale_counts(tree: Any, parts: int, whole: int) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {
        name: value * parts // whole
        if name in _COUNTS and isinstance(value, int)
        else _scale_counts(value, parts, whole)
        for name, value in tree.items()
    }


# Progress -------------------------------------------------------------------------------------------------------------


@dataclass
class SaveProgress(SaveItem):
    """Saves counters: epochs of the loaders, the step, and whether gradients are being accumulated."""

    path: str
    run: TrainingState
    format = JSON

    def capture(self) -> dict[str, Any]:
        return {
            "loaders": [_epoch_of(loader) for loader in self.run.loaders],
            "sync_gradients": self.run.accumulation.sync_gradients,
            "step": self.run.counter.step,
        }


@dataclass
class LoadProgress(LoadItem):
    """Loads the epochs of loaders without a position, and whether gradients are being accumulated."""

    path: str
    run: TrainingState
    required = False

    def read(self, path: Path, options: dict[str, Any]) -> Any:
        return read_json(path)

    def check(self, state: Any) -> list[Problem]:
        found = state if isinstance(state, dict) else {}
        epochs = found.get("loaders")
        fits = isinstance(epochs, list) and all(map(_is_epoch, epochs)) and type(found.get("sync_gradients")) is bool
        if fits and is_count(found.get("step", 0)):
            return []
        text = (
            f"it is {short_repr(state)}; expected the epochs of loaders, a boolean 'sync_gradients' and a number 'step'"
        )
        return [Problem(PROGRESS_NAME, "corrupt", text)]

    def load(self, state: dict[str, Any]) -> None:
        for loader, epoch in zip(self.run.loaders, state["loaders"], strict=False):
            if not is_stateful(loader):
                _set_epoch(loader, epoch)
        self.run.accumulation._set_sync_gradients(state["sync_gradients"])


def _is_epoch(epoch: Any) -> bool:
    if not isinstance(epoch, dict) or not {"iteration", "seed"} <= epoch.keys():
        return False
    return is_count(epoch["iteration"]) and (epoch["seed"] is None or type(epoch["seed"]) is int)


def _epoch_of(loader: Any) -> dict[str, Any]:
    seed = getattr(getattr(loader, "sampler", None), "initial_seed", None)
    return {"iteration": getattr(loader, "iteration", 0), "seed": seed}


def _set_epoch(loader: Any, epoch: dict[str, Any]) -> None:
    # A loader without a position repeats the interrupted epoch in the same order; `skip_first_batches` skips its first part.
    loader.iteration = epoch["iteration"]
    sampler: Any = getattr(loader, "sampler", None)
    if epoch["seed"] is not None and hasattr(sampler, "initial_seed"):
        sampler.initial_seed = epoch["seed"]
        sampler.seed_is_shared = True


# Gradients ------------------------------------------------------------------------------------------------------------


@dataclass
class SaveGradients(SaveItem):
    """Saves the gradients that this rank has accumulated since the last optimizer step, and their number of items."""

    path: str
    run: TrainingState
    per_rank = True

    def capture(self) -> dict[str, Any] | None:
        if self.run.accumulation.sync_gradients:
            return None
        grads = [parameter.grad for parameter in _parameters(self.run.models)]
        if all(grad is None for grad in grads):
            return None
        return {"gradients": grads, "items": self.run.mean.items}


@dataclass
class LoadGradients(LoadItem):
    """Loads accumulated gradients: this rank's own, or an equal share of all if the number of ranks differs.

    Attributes:
        rank: This rank if each loads its own; None to share.
        size, saved_world_size: Number of ranks of this run, and of the one that saved.
    """

    path: str
    run: TrainingState
    rank: int | None
    size: int
    saved_world_size: int
    required = False

    def read(self, path: Path, options: dict[str, Any]) -> list[Any]:
        if self.rank is not None:
            return [TORCH.read(path, **options)]
        files = [path.with_name(gradients_file(rank)) for rank in range(self.saved_world_size)]
        return [TORCH.read(file, **options) for file in files if file.is_file()]

    def check(self, state: list[Any]) -> list[Problem]:
        first = self.rank or 0
        return [p for n, one in enumerate(state) for p in _check_gradients(gradients_file(first + n), self.run, one)]

    def load(self, state: list[Any]) -> None:
        restore_gradients(self.run, state, self.size)


@dataclass
class RejectGradients(LoadItem):
    """Rejects accumulated gradients: a sharded run cannot restore them."""

    path: str
    required = False

    def check(self, state: Any) -> list[Problem]:
        text = "it was saved during gradient accumulation, and a run that shards gradients cannot restore them"
        return [Problem(self.path, "state", text)]

    def load(self, state: Any) -> None:
        raise AssertionError("rejected by `check`")


def _check_gradients(path: str, run: TrainingState, saved: Any) -> list[Problem]:
    grads = saved.get("gradients") if isinstance(saved, dict) else None
    items = saved.get("items") if isinstance(saved, dict) else None
    if not isinstance(grads, list) or not all(one is None or isinstance(one, torch.Tensor) for one in [*grads, items]):
        return [Problem(path, "corrupt", "it holds no gradients")]
    shapes = [None if grad is None else grad.shape for grad in grads]
    live = [parameter.shape for parameter in _parameters(run.models)]
    fits = len(shapes) == len(live) and all(a is None or a == b for a, b in zip(shapes, live, strict=True))
    return [] if fits else [Problem(path, "shape", "its gradients are of other parameters than these")]


def _parameters(models: Sequence[nn.Module]) -> list[nn.Parameter]:
    seen: dict[int, nn.Parameter] = {id(parameter): parameter for model in models for parameter in model.parameters()}
    return list(seen.values())


def restore_gradients(run: TrainingState, saved: Sequence[dict[str, Any]], size: int) -> None:
    """Sets the gradients of a rank: its own, or an equal share of those of all saved ranks.

    The next gradient synchronization then gives the same result as it would have given with the saved gradients: the mean
    over ranks of gradients of means, or the sum over ranks if sums are divided by the number of items of all.

    Args:
        run: The objects.
        saved: The state of this rank, or those of all ranks that saved.
        size: Number of ranks.
    """
    items = [one["items"] for one in saved if one.get("items") is not None]
    parts = 1 if len(saved) == 1 else size if items else len(saved)
    columns = zip(*(one["gradients"] for one in saved), strict=True)
    for parameter, grads in zip(_parameters(run.models), columns, strict=True):
        given = [grad for grad in grads if grad is not None]
        if not given:
            parameter.grad = None
            continue
        total = given[0].to(parameter.device, copy=True)
        for grad in given[1:]:
            total += grad.to(parameter.device)
        parameter.grad = total if parts == 1 else total / parts
    run.mean.items = sum(items[1:], items[0].clone()) / parts if items else None


def drop_gradients(run: TrainingState) -> None:
    """Clears accumulated gradients, for a checkpoint that was saved after an optimizer step."""
    for parameter in _parameters(run.models):
        parameter.grad = None
    run.mean.items = None


# Random states --------------------------------------------------------------------------------------------------------


@dataclass
class SaveRandomStates(SaveItem):
    """Saves the states of this process's generators: Python's, numpy's, torch's and each device's.

    The documented layout keeps `Accelerator.step` in the same file.
    """

    path: str
    counter: HasStep
    per_rank = True

    def capture(self) -> dict[str, Any]:
        states: dict[str, Any] = {
            STEP: self.counter.step,
            _FORMAT: 1,
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
                states[_device_key(kind.name)] = module.get_rng_state_all()
            elif hasattr(module, "get_rng_state"):
                states[_device_key(kind.name)] = [module.get_rng_state()]
        return states


@dataclass
class LoadRandomStates(LoadItem):
    """Loads the states of this process's generators, and the step.

    Attributes:
        has_own: The file is this rank's. Otherwise it is rank 0's, from which a seed is derived.
    """

    path: str
    counter: HasStep
    rank: int
    has_own: bool

    def check(self, state: Any) -> list[Problem]:
        if not isinstance(state, dict):
            return [Problem(self.path, "corrupt", f"expected random states, found {type(state).__name__}")]
        lost = [Problem(self.path, "missing", f"no {name!r}") for name in _GENERATORS if name not in state]
        return lost or [Problem(self.path, "corrupt", text) for text in _invalid_states(state)]

    def load(self, state: dict[str, Any]) -> None:
        if self.has_own:
            _restore_generators(state)
        else:
            content = state["torch_manual_seed"].numpy().tobytes()
            set_seed(zlib.crc32(content, self.rank) & 0x7FFFFFFF)
        self.counter.step = int(state.get(STEP, 0))


def _python_state(state: Any) -> Any:
    version, internal, gauss = state
    return version, tuple(internal), gauss


_GENERATORS: dict[str, Callable[[Any], object]] = {
    "random_state": lambda state: random.Random().setstate(_python_state(state)),
    "numpy_random_seed": lambda state: np.random.RandomState().set_state(state),
    "torch_manual_seed": lambda state: torch.Generator().set_state(state.clone()),
}
"""Key -> loads a state into a generator that is not in use, to find out whether it is valid."""


def _device_key(kind: str) -> str:
    return f"torch_{kind}_manual_seed"


def _invalid_states(states: dict[str, Any]) -> Iterator[str]:
    for name, load in _GENERATORS.items():
        try:
            load(states[name])
        except Exception as error:  # noqa: BLE001 - each library has errors of its own
            yield f"{name!r} is no state of a generator ({type(error).__name__}: {error})"
    if not is_count(states.get(STEP, 0)):
        yield f"{STEP!r} is {short_repr(states[STEP])}; expected a number of at least 0"
    for kind in devices.DEVICES.values():
        saved = states.get(_device_key(kind.name))
        every = saved if isinstance(saved, (list, tuple)) else [saved]
        if saved is not None and kind.name not in ("cpu", "xla") and not all(map(_is_bytes, every)):
            yield f"{_device_key(kind.name)!r} is {short_repr(saved)}; expected tensors of bytes"


def _is_bytes(state: Any) -> bool:
    return isinstance(state, torch.Tensor) and state.dtype is torch.uint8 and state.dim() == 1


def _restore_generators(states: dict[str, Any]) -> None:
    """Restores the generators. States of devices that this process does not have are skipped."""
    random.setstate(_python_state(states["random_state"]))
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"].clone())
    for kind in devices.DEVICES.values():
        if kind.name == "xla" and kind.is_available() and "xm_seed" in states:
            import torch_xla.core.xla_model as xm

            xm.set_rng_state(states["xm_seed"])
        elif kind.name != "cpu" and _device_key(kind.name) in states and kind.is_available():
            module: Any = kind.torch_module()
            saved = states[_device_key(kind.name)]
            every = [state.clone() for state in (saved if isinstance(saved, (list, tuple)) else [saved])]
            if hasattr(module, "set_rng_state_all"):
                module.set_rng_state_all(every[: module.device_count()])
            else:
                module.set_rng_state(every[0])
