"""Compares saved states with live ones: weights by FQN and shape, optimizers and schedulers by class and options.

Pure functions over mappings whose values may be tensors, local shards or lazy tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ...runtime.system.file_names import short_repr
from ..errors import Problem
from ..storage.schema import is_tensor, type_mismatches, value_types

EXTRA_STATE_KEY = "_extra_state"
"""Last part of the FQN of a module's extra state."""
Ties = Mapping[str, set[str]]
"""FQN -> all FQNs of the same tensor, for tied tensors."""

# Weights ----------------------------------------------------------------------------------------------------------------


def tied_names(state: Mapping[str, Any]) -> Ties:
    """Finds tied tensors: values of a state that are one object under several FQNs."""
    groups: dict[int, list[str]] = {}
    for name, value in state.items():
        groups.setdefault(id(value), []).append(name)
    return group_ties(groups.values())


def group_ties(groups: Iterable[Iterable[str]]) -> Ties:
    """Builds `Ties` from groups of FQNs."""
    return {name: set(group) for group in map(list, groups) if len(group) > 1 for name in group}


def compare_weights(
    path: str, kind: str, live: Mapping[str, Any], saved: Mapping[str, Any], live_ties: Ties, saved_ties: Ties
) -> list[Problem]:
    """Lists the differences between a model's state and a saved one.

    Args:
        path: Path of the item in the checkpoint, for problems.
        kind: Class name of the model.
        live, saved: The states.
        live_ties, saved_ties: Their tied tensors.
    """
    return [
        *(
            Problem(path, "missing", f"no {name!r}{_described(live[name])}, which {kind} has")
            for name in missing_keys(live, saved, live_ties)
        ),
        *(
            Problem(path, "extra", f"{name!r}{_described(saved[name])}, which {kind} does not have")
            for name in missing_keys(saved, live, saved_ties)
        ),
        *(
            Problem(path, "shape", f"{name!r} is{_described(saved[name])}, and{_described(value)} in {kind}")
            for name, value in live.items()
            if name in saved and not _is_compatible(name, value, saved[name])
        ),
    ]


def missing_keys(one: Mapping[str, Any], other: Mapping[str, Any], one_ties: Ties) -> list[str]:
    """Returns the keys of one state that another lacks, under their tied names too."""
    return [name for name in one if name not in other and not one_ties.get(name, set()) & other.keys()]


def compatible_entries(live: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the saved entries that exist in the live state with the same shape."""
    return {name: value for name, value in saved.items() if name in live and _is_compatible(name, live[name], value)}


def _is_compatible(name: str, live: Any, saved: Any) -> bool:
    # The module checks its extra state itself.
    return (_shape(live) == _shape(saved) and not _is_numpy(saved)) or name.split(".")[-1] == EXTRA_STATE_KEY


def _shape(value: Any) -> tuple[int, ...] | None:
    """Returns the shape of a tensor, local shard or lazy tensor; None for other values."""
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _described(value: Any) -> str:
    shape = _shape(value)
    if _is_numpy(value):
        return f" of type {type(value).__name__}"
    return "" if shape is None else f" of shape {list(shape)}"


def _is_numpy(value: Any) -> bool:
    """Returns True for numpy arrays, which have shapes but are not tensors."""
    return isinstance(value, (np.ndarray, np.generic))


# Optimizers and schedulers ----------------------------------------------------------------------------------------------

# torch optimizers whose states are scalars or have the shape of the parameter -> keys that every state has.
_STATE_KEYS = {
    "SGD": frozenset[str](),
    "Adam": frozenset({"step", "exp_avg", "exp_avg_sq"}),
    "AdamW": frozenset({"step", "exp_avg", "exp_avg_sq"}),
    "NAdam": frozenset({"step", "mu_product", "exp_avg", "exp_avg_sq"}),
    "RAdam": frozenset({"step", "exp_avg", "exp_avg_sq"}),
    "Adamax": frozenset({"step", "exp_avg", "exp_inf"}),
    "Adadelta": frozenset({"step", "square_avg", "acc_delta"}),
    "Adagrad": frozenset({"step", "sum"}),
    "RMSprop": frozenset({"step", "square_avg"}),
    "Rprop": frozenset({"step", "prev", "step_size"}),
    "ASGD": frozenset({"step", "eta", "ax", "mu"}),
}
SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
"""Keys of scalar states of these optimizers."""
_PARAM_KEYS = {"params", "param_names"}
_ALL_STATE_KEYS = frozenset[str]().union(*_STATE_KEYS.values())
# Keys that schedulers add to parameter groups.
_SCHEDULER_KEYS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}


def unwrap_optimizer(optimizer: Any) -> Any:
    """Removes all wrappers around an optimizer."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def optimizer_class_name(optimizer: Any) -> str:
    """Returns the class name that a checkpoint records: of the closest torch class for subclasses of torch's optimizers."""
    classes = type(unwrap_optimizer(optimizer)).__mro__
    return next(filter(_is_torch_optimizer, classes), classes[0]).__name__


def has_param_shaped_state(optimizer: Any) -> bool:
    """Returns True if all states of an optimizer are scalars or have the shape of the parameter."""
    return _state_keys(optimizer) is not None


def _state_keys(optimizer: Any) -> frozenset[str] | None:
    kind = type(unwrap_optimizer(optimizer))
    return _STATE_KEYS[kind.__name__] if _is_torch_optimizer(kind) else None


def _is_torch_optimizer(kind: type) -> bool:
    return kind.__name__ in _STATE_KEYS and kind.__module__.startswith("torch.optim.")


def compare_optimizers(
    path: str, optimizer: Any, groups: Iterable[Mapping[str, Any]], states: Iterable[Any]
) -> list[Problem]:
    """Lists signs that a state was saved by another class of optimizer, judged by its options and state keys.

    Args:
        path: Path of the item in the checkpoint, for problems.
        optimizer: The optimizer.
        groups: Options of each saved parameter group.
        states: Saved state of each parameter.
    """
    groups, states = list(groups), list(states)
    expected, saved = _state_keys(optimizer), _keys(states)
    if expected is None:  # only its current state shows its keys, and they may vary
        ways = [(live - saved, saved - live) for live in _current_state_keys(optimizer)]
        lacks, foreign = ways[0]
        differs = all(less and more for less, more in ways)
    else:
        lacks, foreign = set(expected - saved), saved & _ALL_STATE_KEYS - expected
        differs = bool(lacks or foreign)
    if saved and differs:
        return [class_mismatch(path, "optimizer", optimizer_class_name(optimizer), lacks, foreign)]
    defaults = getattr(unwrap_optimizer(optimizer), "defaults", {})
    # Releases of torch add options that are booleans or None.
    needed = {key for key, value in defaults.items() if value is not None and not isinstance(value, bool)}
    known, found = _keys(optimizer.param_groups) | defaults.keys(), _keys(groups)
    foreign = found - known - _SCHEDULER_KEYS - _PARAM_KEYS
    if needed - found and foreign:
        return [class_mismatch(path, "optimizer", optimizer_class_name(optimizer), needed - found, foreign)]
    texts = [
        text
        for number, (live, group) in enumerate(zip(optimizer.param_groups, groups, strict=False))
        for text in type_mismatches(
            {k: v for k, v in live.items() if k not in _PARAM_KEYS}, group, f"param_groups[{number}]"
        )
    ]
    texts += [text for state in states for text in _mistyped_values(expected, state)]
    return [Problem(path, "corrupt", text) for text in dict.fromkeys(texts)]


def _mistyped_values(expected: frozenset[str] | None, state: Any) -> Iterator[str]:
    """Yields errors for values that no optimizer with scalar or tensor states has."""
    for key, value in state.items() if expected is not None and isinstance(state, Mapping) else ():
        floats = is_tensor(value) and (value.dtype.is_floating_point or value.dtype.is_complex)
        if value is not None and key not in SCALARS and not floats and key in _ALL_STATE_KEYS:
            yield f"{key!r} of a parameter is {short_repr(value)}; expected a tensor of floating-point numbers"
        elif value is not None and not value_types(value) & {"a number", "a tensor", "a boolean"}:
            yield f"{key!r} of a parameter is {short_repr(value)}; expected a number or a tensor"


def _current_state_keys(optimizer: Any) -> list[set[str]]:
    """Returns the keys of live states and those of ``state_dict``, which differ in bitsandbytes."""
    state = optimizer.state_dict().get("state", {})
    return [_keys(optimizer.state.values()), _keys(state.values())]


def _keys(mappings: Iterable[Any]) -> set[str]:
    return {str(key) for mapping in mappings if isinstance(mapping, Mapping) for key in mapping}


def class_mismatch(path: str, what: str, kind: str, lacks: Iterable[str], has: Iterable[str]) -> Problem:
    """Returns the problem that a state was saved by another class."""
    text = f"it is of another kind of {what} than {kind}: no {sorted(lacks)}, but {sorted(has)}"
    return Problem(path, "state", text)
