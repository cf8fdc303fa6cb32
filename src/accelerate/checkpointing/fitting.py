"""Whether saved weights and optimizer states fit what ranks hold, and their way there: each rank reads its own part.

Nothing here talks to other ranks, so it does not matter how many saved the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import live
from .errors import Problem
from .live import ExtraState, Parameter
from .objects import SHAPED_LIKE_PARAMETERS, innermost
from .pieces import Held, is_dtensor
from .saved import Saved, SavedOptimizer, SavedWeights

# Weights ----------------------------------------------------------------------------------------------------------------


def check_weights(path: str, model: nn.Module, state: Mapping[str, Any], saved: SavedWeights) -> list[Problem]:
    """What does not fit between a model's state and a saved one."""
    kind = type(model).__name__
    problems = [
        Problem(path, "missing", f"no {name!r}{_of(state[name])}, which {kind} has") for name in lacking(state, saved)
    ]
    problems += [
        Problem(path, "extra", f"{name!r}{_of(saved[name])}, which {kind} does not have")
        for name in surplus(state, saved)
    ]
    for name, value in state.items():
        if name in saved and _shape(value) != _shape(saved[name]):
            problems.append(Problem(path, "shape", f"{name!r} is{_of(saved[name])}, and{_of(value)} in {kind}"))
    return problems


def lacking(state: Mapping[str, Any], saved: SavedWeights) -> list[str]:
    """The names that a model's state has and a saved one lacks, also under the names that are tied to them."""
    tied = _tied(state)
    return [name for name in state if name not in saved and not tied.get(name, set()) & saved.keys()]


def surplus(state: Mapping[str, Any], saved: SavedWeights) -> list[str]:
    """The names that a saved state has and a model's lacks."""
    return [name for name in saved if name not in state and not saved.tied.get(name, set()) & state.keys()]


def matching_weights(state: Mapping[str, Any], saved: SavedWeights) -> SavedWeights:
    """The part of a saved state that fits."""
    return SavedWeights({n: v for n, v in saved.items() if n in state and _shape(state[n]) == _shape(v)}, [])


def load_weights(state: Mapping[str, Any], saved: SavedWeights) -> None:
    """Fills a model's state; of names that are tied, any will do."""
    tied = _tied(state)
    done: set[int] = set()
    for name, value in state.items():
        source = next((saved[other] for other in (name, *sorted(tied.get(name, ()))) if other in saved), None)
        if source is None:
            continue
        if isinstance(value, ExtraState):
            value.set(source.read() if isinstance(source, Saved) else source)
        elif id(value) not in done:
            done.add(id(value))
            _fill(value, source)


def _fill(target: Held, source: Saved) -> None:
    with torch.no_grad():
        for box, piece in target.pieces():
            source.fill(box.offsets, piece)


def _tied(state: Mapping[str, Any]) -> dict[str, set[str]]:
    """Name -> all names of the same tensor, where there are several."""
    groups: dict[int, set[str]] = {}
    for name, value in state.items():
        if isinstance(value, Held):
            groups.setdefault(id(value), set()).add(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}


def _shape(value: Any) -> tuple[int, ...] | None:
    return value.layout.shape if isinstance(value, Held) else value.shape if isinstance(value, Saved) else None


def _of(value: Any) -> str:
    shape = _shape(value)
    return "" if shape is None else f" of shape {list(shape)}"


# Optimizers -------------------------------------------------------------------------------------------------------------


class Target:
    """An optimizer to load a state into, whose parameters have names.

    Args:
        path: Of the part of the checkpoint, for findings.
        optimizer: The optimizer.
        models: Those that its parameters belong to.
    """

    def __init__(self, path: str, optimizer: Any, models: Sequence[nn.Module]) -> None:
        self.path = path
        self._optimizer = optimizer
        self._shaped = type(innermost(optimizer)) in SHAPED_LIKE_PARAMETERS
        self._groups, self._names = live.groups_of(optimizer, models)
        self._called = live.called(self._groups, self._names)

    def named(self, saved: SavedOptimizer) -> SavedOptimizer:
        """The state with this optimizer's names, where it has numbers or names of tied parameters."""
        if saved.is_named:
            aliases = self._names.aliases
            params = [[aliases.get(name, name) for name in group] for group in saved.params]
            state = {aliases.get(name, name): values for name, values in saved.state.items()}
            return SavedOptimizer(saved.groups, params, state)
        names = {
            number: name
            for numbers, group in zip(saved.params, self._called, strict=False)
            for number, name in zip(numbers, group, strict=False)
        }
        state = {names[number]: values for number, values in saved.state.items() if number in names}
        return SavedOptimizer(saved.groups, [[names[n] for n in group if n in names] for group in saved.params], state)

    def check(self, saved: SavedOptimizer) -> list[Problem]:
        """What does not fit."""
        kind = type(innermost(self._optimizer)).__name__
        sizes, live_sizes = [list(map(len, groups)) for groups in (saved.params, self._called)]
        differs = Problem(self.path, "shape", f"its groups have {sizes} parameters, and {live_sizes} in {kind}")
        if not saved.is_named and sizes != live_sizes:
            return [differs]
        problems = []
        theirs, mine = _numbered(self.named(saved).params), _numbered(self._called)
        for name in mine.keys() - theirs.keys():
            problems.append(Problem(self.path, "missing", f"no state of {name!r}, which {kind} has"))
        for name in theirs.keys() - mine.keys():
            problems.append(Problem(self.path, "extra", f"a state of {name!r}, which {kind} does not have"))
        for name in theirs.keys() & mine.keys():
            if theirs[name] != mine[name]:
                text = f"{name!r} is in group {theirs[name]}, and in group {mine[name]} of {kind}"
                problems.append(Problem(self.path, "state", text))
        if not problems and len(sizes) != len(live_sizes):  # some are empty
            return [differs]
        return sorted(problems, key=str) or self._misshaped(self.named(saved))

    def _misshaped(self, saved: SavedOptimizer) -> list[Problem]:
        problems = []
        for param, name, layout in self._parts():
            for key, value in saved.state.get(name, {}).items():
                known = self._shaped or self._is_shaped_like(param, key)
                if known and isinstance(value, Saved) and value.shape != layout.shape and value.shape not in ((), (1,)):
                    text = f"{key!r} of {name!r} has shape {list(value.shape)}; expected {list(layout.shape)}"
                    problems.append(Problem(self.path, "shape", text))
        return problems

    def _is_shaped_like(self, param: Parameter, key: str) -> bool:
        value = self._optimizer.state.get(param.tensor, {}).get(key)
        return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == param.tensor.shape

    def _parts(self) -> Iterator[tuple[Parameter, str, Any]]:
        return ((p, name, layout) for group in self._groups for p in group for name, layout in p.parts)

    def load(self, saved: SavedOptimizer) -> None:
        """Gives the optimizer the state; live memory is used again where it fits."""
        saved = self.named(saved)
        state: dict[int, dict[str, Any]] = {}
        groups, number = [], 0
        for options, group in zip(saved.groups, self._groups, strict=True):
            groups.append({**options, "params": list(range(number, number + len(group)))})
            for param in group:
                if values := self._values(param, saved):
                    state[number] = values
                number += 1
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _values(self, param: Parameter, saved: SavedOptimizer) -> dict[str, Any]:
        """This rank's part of a parameter's state; none where it holds nothing of the parameter."""
        if not any(layout.boxes for _, layout in param.parts):
            return {}
        keys = dict.fromkeys(key for name, _ in param.parts for key in saved.state.get(name, {}))
        current = self._optimizer.state.get(param.tensor, {})
        return {key: self._value(param, current.get(key), key, saved) for key in keys}

    def _value(self, param: Parameter, current: Any, key: str, saved: SavedOptimizer) -> Any:
        found = {name: saved.state[name][key] for name, _ in param.parts if key in saved.state.get(name, {})}
        one = next(iter(found.values()))
        if not isinstance(one, Saved):
            return one
        layouts = dict(param.parts)
        if not all(value.shape == layouts[name].shape for name, value in found.items()) or not one.shape:
            return _spread(one.read(), param.tensor)
        fits = isinstance(current, torch.Tensor) and current.dtype == one.dtype and current.shape == param.tensor.shape
        whole: Any = current.detach() if fits else _empty_like(param, one.dtype)
        local = whole.to_local() if is_dtensor(whole) else whole
        for name, layout in param.parts:
            if name in found:
                _fill(Held(layout, local), found[name])
        return whole


def _numbered(groups: Sequence[Sequence[str]]) -> dict[str, int]:
    return {name: number for number, group in enumerate(groups) for name in group}


def _empty_like(param: Parameter, dtype: torch.dtype) -> torch.Tensor:
    """A state as large as this rank's part of a parameter; what belongs to no parameter in it is 0."""
    return torch.zeros_like(param.tensor, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format)


def _spread(value: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """A tensor that all ranks hold as a whole; as the parameter is, if it is more than a number."""
    if not value.dim() or not is_dtensor(param):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = param.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(value.to(param.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
