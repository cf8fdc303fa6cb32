"""Where a run stands: positions of loaders, the accumulation window, the random states. The entries besides the objects.

Positions do not depend on the number of ranks: they count steps of all ranks together, and are converted where a step
has become another number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...runtime.system.file_names import short_repr
from ...runtime.world import World
from ...state import GradientState
from ..errors import Problem
from ..storage.filenames import LOADER_NAME, PROGRESS_NAME, gradients_file, indexed_name, rng_file
from ..storage.schema import is_count
from . import random_states
from .state_item import JSON, TORCH, Entry

EXTENT = "_extent"
"""Key, in a loader's position, of what one of its steps is."""


@dataclass
class TrainingState:
    """The objects of a run that a checkpoint is about.

    Attributes:
        world: This process and its peers.
        models: The models, as prepared.
        optimizers, schedulers, loaders, registered: As prepared and registered, in their order.
        scaler: The gradient scaler, or None.
        step: `Accelerator.step`, and how it is set.
        window: Reads and sets what is accumulated besides gradients: the items of ``backward(num_items=)``.
    """

    world: World
    models: list[nn.Module] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    loaders: list[Any] = field(default_factory=list)
    registered: list[Any] = field(default_factory=list)
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    set_step: Callable[[int], None] = lambda step: None
    items: Callable[[], torch.Tensor | None] = lambda: None
    set_items: Callable[[torch.Tensor | None], None] = lambda items: None


# Loaders --------------------------------------------------------------------------------------------------------------


def loader_entries(loaders: Sequence[Any]) -> list[Entry]:
    """The positions of the loaders that keep one."""
    return [_loader_entry(index, loader) for index, loader in enumerate(loaders) if is_stateful(loader)]


def is_stateful(loader: Any) -> bool:
    """Whether a loader keeps a position (``use_stateful_dataloader=True``)."""
    return bool(getattr(loader, "use_stateful_dataloader", False)) or hasattr(loader, "snapshot_every_n_steps")


def _loader_entry(index: int, loader: Any) -> Entry:
    path = indexed_name(LOADER_NAME, index, ".bin")
    return Entry(
        path,
        capture=lambda: {**loader.state_dict(), EXTENT: extent(loader)},
        load=lambda saved: loader.load_state_dict(converted(saved, loader)),
        check=lambda saved: _check_position(path, saved, loader),
    )


def extent(loader: Any) -> dict[str, Any]:
    """What one step of a loader is: samples of all ranks, and batches that are drawn for it on the rank that reads."""
    draws = loader._batches_a_step() if hasattr(loader, "_batches_a_step") else 1
    return {"samples": getattr(loader, "total_batch_size", None), "draws": draws, "workers": loader.num_workers}


def _ratio(saved: dict[str, Any], loader: Any) -> tuple[int, int]:
    """Draws of this loader for as many samples as the saved one's, as a fraction."""
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
    if problem := _mistyped_position(path, before, saved):
        return [problem]
    if before is None or not ("_snapshot" in saved or "_num_yielded" in saved):
        return []  # another release's, or a loader that had not begun
    problems = []
    parts, whole = _ratio(saved, loader)
    if _drawn(saved) * parts % whole and not saved.get("_iterator_finished"):
        text = (
            f"it stands behind {_drawn(saved) // before['draws']} steps of {before['samples']} samples, which is no whole "
            f"number of steps of {now['samples']}: choose batches of which all ranks together take {before['samples']}"
        )
        problems.append(Problem(path, "state", text))
    if before["workers"] != now["workers"]:
        text = f"saved by a loader with {before['workers']} workers; this one has {now['workers']}"
        problems.append(Problem(path, "state", text))
    return problems


_COUNTS = ("_num_yielded", "_sampler_iter_yielded", "_snapshot_step", "_steps_since_snapshot", "drawn")


def _mistyped_position(path: str, before: Any, saved: Any) -> Problem | None:
    """The first count in a position that is none."""
    if before is not None:
        known = isinstance(before, dict) and {"samples", "draws", "workers"} <= before.keys()
        samples = before["samples"] if known else -1
        if not known or not (samples is None or is_count(samples, 1)) or not is_count(before["draws"], 1):
            return Problem(
                path, "corrupt", f"{EXTENT!r} is {short_repr(before)}; expected numbers of samples, draws and workers"
            )
    for name, value in saved.items():
        if isinstance(value, dict) and (problem := _mistyped_position(path, None, value)):
            return problem
        if name in _COUNTS[:-1] and value is not None and not is_count(value):  # any dataset may have a "drawn"
            return Problem(path, "corrupt", f"{name!r} is {short_repr(value)}; expected a number of at least 0")
    return None


def converted(saved: dict[str, Any], loader: Any) -> dict[str, Any]:
    """A saved position in the steps of this loader."""
    parts, whole = _ratio(saved, loader)
    state = {name: value for name, value in saved.items() if name != EXTENT}
    return state if parts == whole else _scaled(state, parts, whole)


def _scaled(tree: Any, parts: int, whole: int) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {
        name: value * parts // whole if name in _COUNTS and isinstance(value, int) else _scaled(value, parts, whole)
        for name, value in tree.items()
    }


# Random states, gradients, counters -----------------------------------------------------------------------------------


def random_entry(run: TrainingState, saved_world_size: int) -> Entry:
    """This rank's random states; of a rank that the checkpoint does not know, rank 0's to derive some from."""
    rank = run.world.rank
    known = rank < saved_world_size
    path = rng_file(rank if known else 0)

    def load(states: dict[str, Any]) -> None:
        if known:
            random_states.restore(states)
        else:
            random_states.derive(states, rank)
        run.set_step(int(states.get(random_states.STEP, 0)))

    return Entry(
        path,
        capture=lambda: random_states.capture(run.step),
        load=load,
        check=lambda states: random_states.check(path, states),
        everywhere=True,
    )


def progress_entry(run: TrainingState) -> Entry:
    """Counters that need no tensors: the epochs of the loaders, and whether a window is open."""

    def capture() -> dict[str, Any]:
        return {
            "loaders": [_epoch_of(loader) for loader in run.loaders],
            "sync_gradients": GradientState().sync_gradients,
            "step": run.step,
        }

    def load(saved: dict[str, Any]) -> None:
        for loader, epoch in zip(run.loaders, saved["loaders"], strict=False):
            if not is_stateful(loader):
                _set_epoch(loader, epoch)
        GradientState()._set_sync_gradients(saved["sync_gradients"])

    return Entry(PROGRESS_NAME, capture=capture, load=load, check=_check_progress, required=False, format=JSON)


def _check_progress(saved: Any) -> list[Problem]:
    found = saved if isinstance(saved, dict) else {}
    loaders = found.get("loaders")
    fits = isinstance(loaders, list) and all(map(_is_epoch, loaders)) and isinstance(found.get("sync_gradients"), bool)
    if fits and is_count(found.get("step", 0)):
        return []
    text = f"it is {short_repr(saved)}; expected the epochs of loaders, a boolean 'sync_gradients' and a number 'step'"
    return [Problem(PROGRESS_NAME, "corrupt", text)]


def _is_epoch(epoch: Any) -> bool:
    if not isinstance(epoch, dict) or not {"iteration", "seed"} <= epoch.keys():
        return False
    return is_count(epoch["iteration"]) and (epoch["seed"] is None or type(epoch["seed"]) is int)


def _epoch_of(loader: Any) -> dict[str, Any]:
    sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else None
    return {"iteration": getattr(loader, "iteration", 0), "seed": getattr(sampler, "initial_seed", None)}


def _set_epoch(loader: Any, epoch: dict[str, Any]) -> None:
    # Of a loader without a position: the epoch that was interrupted begins anew, in the same order; `skip_first_batches`
    # goes on in the middle of it.
    loader.iteration = epoch["iteration"]
    sampler: Any = loader.get_sampler() if hasattr(loader, "get_sampler") else None
    if epoch["seed"] is not None and hasattr(sampler, "initial_seed"):
        sampler.initial_seed = epoch["seed"]
        sampler.seed_is_shared = True


def gradients_entry(run: TrainingState) -> Entry:
    """What this rank has accumulated in the window that is open: gradients, and the items they are of."""
    path = gradients_file(run.world.rank)

    def capture() -> dict[str, Any] | None:
        if GradientState().sync_gradients:
            return None
        grads = [parameter.grad for parameter in _parameters(run.models)]
        return {"gradients": grads, "items": run.items()} if any(grad is not None for grad in grads) else None

    return Entry(
        path,
        capture,
        load=lambda saved: put_gradients(run, [saved]),
        check=lambda saved: _check_gradients(path, run, saved),
        everywhere=True,
        required=False,
    )


def merged_gradients_entry(run: TrainingState, saved_world_size: int) -> Entry:
    """The same for another number of ranks than saved it: each takes an equal part of what all had accumulated."""

    def read(path: Path, **options: Any) -> list[Any]:
        files = [path.with_name(gradients_file(rank)) for rank in range(saved_world_size)]
        return [TORCH.read(file, **options) for file in files if file.is_file()]

    def check(saved: list[Any]) -> list[Problem]:
        return [p for rank, one in enumerate(saved) for p in _check_gradients(gradients_file(rank), run, one)]

    return Entry(
        gradients_file(0),
        capture=lambda: None,
        load=lambda saved: put_gradients(run, saved),
        check=check,
        everywhere=True,
        required=False,
        format=replace(TORCH, read=read),
    )


def no_gradients_entry(run: TrainingState) -> Entry:
    """The same for ranks of which none has a gradient as a whole: there are none to save, and none can be taken up."""
    path = gradients_file(0)
    text = (
        "it was saved between the micro-steps of an update, whose gradients cannot be shared out over this run's shards"
    )
    return Entry(
        path,
        capture=lambda: None,
        load=lambda saved: None,
        check=lambda saved: [Problem(path, "state", text)],
        required=False,
    )


def _check_gradients(path: str, run: TrainingState, saved: Any) -> list[Problem]:
    grads = saved.get("gradients") if isinstance(saved, dict) else None
    items = saved.get("items") if isinstance(saved, dict) else None
    if not isinstance(grads, list) or not all(one is None or isinstance(one, torch.Tensor) for one in [*grads, items]):
        return [Problem(path, "corrupt", "it holds no gradients")]
    shapes = [None if grad is None else grad.shape for grad in saved["gradients"]]
    live = [parameter.shape for parameter in _parameters(run.models)]
    fits = len(shapes) == len(live) and all(a is None or a == b for a, b in zip(shapes, live, strict=True))
    return [] if fits else [Problem(path, "shape", "its gradients are of other parameters than these")]


def _parameters(models: Sequence[nn.Module]) -> list[nn.Parameter]:
    seen: dict[int, nn.Parameter] = {id(parameter): parameter for model in models for parameter in model.parameters()}
    return list(seen.values())


def put_gradients(run: TrainingState, saved: Sequence[dict[str, Any]]) -> None:
    """Gives the parameters what was accumulated: of one rank its own, of all ranks an equal part.

    What the next synchronisation makes of it is what it would have made of the parts that were saved: the mean over ranks
    of gradients of means, the sum over ranks where sums are divided by the items of all.
    """
    items = [one["items"] for one in saved if one.get("items") is not None]
    parts = 1 if len(saved) == 1 else run.world.size if items else len(saved)
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
    run.set_items(sum(items[1:], items[0].clone()) / parts if items else None)


def drop_gradients(run: TrainingState) -> None:
    """Forgets what has been accumulated in this process: the checkpoint was saved between two windows."""
    for parameter in _parameters(run.models):
        parameter.grad = None
    run.set_items(None)
