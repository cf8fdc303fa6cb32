"""The entries of models, optimizers, schedulers, the scaler and registered objects, and whether a saved state fits them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ...settings.enums import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME
from ..errors import Problem
from ..model_files import drop_shared_tensors, shared_tensor_names
from ..sharded.compat import (
    SCALARS,
    class_mismatch,
    compare_optimizers,
    compare_weights,
    compatible_entries,
    group_ties,
    has_param_shaped_state,
    optimizer_class_name,
)
from ..storage.filenames import custom_file, indexed_name, model_file
from ..storage.schema import optimizer_state_error, type_mismatches
from ..storage.staging import can_copy, copy_tensors, is_dense_cpu
from .state_item import SAFETENSORS, TORCH, Entry

# Models ---------------------------------------------------------------------------------------------------------------


def model_entry(
    index: int,
    model: nn.Module | None = None,
    state: dict[str, Any] | None = None,
    *,
    safe: bool,
    options: dict[str, Any] | None = None,
) -> Entry:
    """The weights of one model.

    Args:
        index: Its place among the models.
        model: The module itself, without containers, to load into.
        state: Its full state, to save.
        safe: As safetensors; else as `torch.save` writes it.
        options: For ``load_state_dict``.
    """
    path = model_file(index, safe)
    return Entry(
        path,
        capture=lambda: drop_shared_tensors(state or {}) if safe else state,
        load=lambda saved: _load_model(model, saved, options or {}),
        check=lambda saved: _check_model(path, model, saved),
        partial=lambda saved: _matching(model, saved),
        format=SAFETENSORS if safe else TORCH,
    )


def _load_model(model: nn.Module | None, saved: dict[str, Any], options: dict[str, Any]) -> None:
    assert model is not None
    # What is missing has been found fit: it shares its memory with what is there, or the caller allows it.
    model.load_state_dict(
        saved if options.get("assign") else _copied_into(model, saved), **{**options, "strict": False}
    )


def _copied_into(model: nn.Module, saved: dict[str, Any]) -> dict[str, Any]:
    """The state, of which tensors that could be copied to their place at once are those in their place."""
    live = model.state_dict(keep_vars=True)
    copied = {name: live[name] for name, value in saved.items() if can_copy(live.get(name), value)}
    copy_tensors((target, saved[name]) for name, target in copied.items())
    return {**saved, **copied}


def _check_model(path: str, model: nn.Module | None, saved: Any) -> list[Problem]:
    assert model is not None
    if not isinstance(saved, dict):
        return [Problem(path, "corrupt", f"expected a mapping of names to tensors, found {type(saved).__name__}")]
    live = model.state_dict()
    tied = group_ties(shared_tensor_names(live)), group_ties(shared_tensor_names(saved))
    return compare_weights(path, type(model).__name__, live, saved, *tied)


def _matching(model: nn.Module | None, saved: Any) -> dict[str, Any]:
    assert model is not None
    return compatible_entries(model.state_dict(), saved if isinstance(saved, dict) else {})


# Optimizers ---------------------------------------------------------------------------------------------------------


def optimizer_entry(index: int, optimizer: Any) -> Entry:
    """The state of one optimizer (the prepared one)."""
    path = indexed_name(OPTIMIZER_NAME, index, ".bin")
    untouched = not any(optimizer.state.values())
    return Entry(
        path,
        capture=optimizer.state_dict,
        load=lambda saved: optimizer.load_state_dict(saved if untouched else _owned(optimizer, saved)),
        check=lambda saved: _check_optimizer(path, optimizer, saved),
        kind=optimizer_class_name(optimizer),
        kept=untouched,
    )


def _check_optimizer(path: str, optimizer: Any, saved: Any) -> list[Problem]:
    if text := optimizer_state_error(saved):
        return [Problem(path, "corrupt", text)]
    groups, live_groups = saved["param_groups"], optimizer.param_groups
    sizes, live_sizes = ([len(group["params"]) for group in some] for some in (groups, live_groups))
    if sizes != live_sizes:
        text = f"its groups have {sizes} parameters, and {live_sizes} in {optimizer_class_name(optimizer)}"
        return [Problem(path, "shape", text)]
    if problems := compare_optimizers(path, optimizer, groups, saved["state"].values()):
        return problems
    for key, parameter in _places(optimizer, saved):
        values = saved["state"].get(key, {})
        for name, value in values.items():
            live = optimizer.state.get(parameter, {}).get(name)
            problems += [
                Problem(path, "corrupt", text) for text in type_mismatches(live, value, f"{name!r} of parameter {key}")
            ]
            expected = _expected_shape(optimizer, parameter, name)
            is_number = isinstance(value, torch.Tensor) and value.numel() == 1
            if (
                isinstance(value, torch.Tensor)
                and expected is not None
                and value.shape != expected
                and not (is_number and (name in SCALARS or not has_param_shaped_state(optimizer)))
            ):
                text = f"{name!r} of parameter {key} has shape {list(value.shape)}; expected {list(expected)}"
                problems.append(Problem(path, "shape", text))
    return problems


def _places(optimizer: Any, saved: dict[str, Any]) -> Iterator[tuple[Any, torch.Tensor]]:
    """Each parameter's key in a saved state, with the parameter."""
    keys = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
    return zip(keys, itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups), strict=True)


def _expected_shape(optimizer: Any, parameter: torch.Tensor, name: str) -> torch.Size | None:
    live = optimizer.state.get(parameter, {}).get(name)
    if isinstance(live, torch.Tensor):
        return live.shape
    return parameter.shape if has_param_shaped_state(optimizer) else None


def _owned(optimizer: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """The state in memory of its own: that of the live state where it fits, so that there are never two of them."""
    own: dict[int, torch.Tensor] = {}
    pairs = []
    for key, parameter in _places(optimizer, saved):
        live, values = optimizer.state.get(parameter, {}), saved["state"].get(key)
        for name, value in values.items() if isinstance(values, dict) else ():
            target = live.get(name)
            if is_dense_cpu(value) and id(value) not in own:
                own[id(value)] = target.detach() if can_copy(target, value) else torch.empty_like(value)
                pairs.append((own[id(value)], value))
            elif isinstance(value, torch.Tensor) and _takes(target, value):
                own[id(value)] = target.detach().copy_(value)
    copy_tensors(pairs)
    return {**saved, "state": _cloned(saved["state"], own), "param_groups": _cloned(saved["param_groups"])}


def _takes(live: Any, value: torch.Tensor) -> bool:
    """Whether the live tensor can take a value that lies elsewhere or in another order."""
    alike = isinstance(live, torch.Tensor) and live.shape == value.shape and live.dtype == value.dtype
    return alike and live.is_contiguous() and not live.is_meta


def _cloned(tree: Any, own: Mapping[int, torch.Tensor] = MappingProxyType({})) -> Any:
    """A tree with tensors of its own: those of `own`, by the identity of the original, and else copies."""
    if isinstance(tree, torch.Tensor):
        return own[id(tree)] if id(tree) in own else tree.clone()
    if isinstance(tree, dict):
        return {key: _cloned(value, own) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_cloned(value, own) for value in tree)
    return tree


# The others ---------------------------------------------------------------------------------------------------------


def scheduler_entry(index: int, scheduler: Any) -> Entry:
    """The state of one scheduler."""
    path = indexed_name(SCHEDULER_NAME, index, ".bin")
    return Entry(
        path,
        capture=scheduler.state_dict,
        load=lambda saved: scheduler.load_state_dict(_cloned(saved)),
        check=lambda saved: _check_scheduler(path, scheduler, saved),
        revertible=True,
    )


def _check_scheduler(path: str, scheduler: Any, saved: Any) -> list[Problem]:
    if not isinstance(saved, dict):
        return [Problem(path, "corrupt", f"expected a scheduler's state, found {type(saved).__name__}")]
    live = {name for name in scheduler.state_dict() if not name.startswith("_")}
    theirs = {name for name in saved if not str(name).startswith("_")}
    # Releases of torch add and drop names; a state that both lacks and adds some is of another kind of scheduler.
    if live - theirs and theirs - live:
        kind = type(getattr(scheduler, "scheduler", scheduler)).__name__
        return [class_mismatch(path, "scheduler", kind, live - theirs, theirs - live)]
    texts = type_mismatches(scheduler.state_dict(), saved, type(getattr(scheduler, "scheduler", scheduler)).__name__)
    return [Problem(path, "corrupt", text) for text in texts]


def scaler_entry(scaler: torch.amp.GradScaler) -> Entry:
    """The state of the gradient scaler."""
    return Entry(
        SCALER_NAME,
        capture=scaler.state_dict,
        load=lambda saved: scaler.load_state_dict(_cloned(saved)),
        check=lambda saved: _check_scaler(scaler, saved),
        revertible=True,
    )


def _check_scaler(scaler: torch.amp.GradScaler, saved: Any) -> list[Problem]:
    live = scaler.state_dict()
    if not isinstance(saved, dict):
        return [Problem(SCALER_NAME, "corrupt", f"expected a scaler's state, found {type(saved).__name__}")]
    lost = [Problem(SCALER_NAME, "missing", f"no {key!r}") for key in sorted(live.keys() - saved.keys())]
    return lost or [Problem(SCALER_NAME, "corrupt", text) for text in type_mismatches(live, saved, "the scaler")]


def custom_entry(index: int, registered: Any) -> Entry:
    """The state of an object that the user registered."""
    name = type(registered).__name__
    return Entry(
        custom_file(index),
        capture=registered.state_dict,
        load=lambda saved: registered.load_state_dict(_cloned(saved)),
        revertible=True,
        needs=(
            f" It belongs to a registered {name}. Checkpoints are read without running code. If its state_dict holds "
            "objects of classes that you trust, allow these before loading: `torch.serialization.add_safe_globals([...])`; "
            "or let it return plain data and tensors."
        ),
    )
