"""Whether saved weights and optimizer states fit what ranks hold, and their way there: each rank reads its own part.

Nothing here talks to other ranks, so it does not matter how many saved the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...runtime.tensors.dtensor import is_dtensor
from ..errors import Problem
from . import local_state
from .compat import compare_optimizers, compare_weights, is_shaped_like_parameters, kind_of, lacking, matching, ties_in
from .local_state import ExtraState, Parameter
from .shard_layout import Held
from .state_reader import Saved, SavedOptimizer, SavedWeights

# Weights ----------------------------------------------------------------------------------------------------------------


def check_weights(path: str, model: nn.Module, state: Mapping[str, Any], saved: SavedWeights) -> list[Problem]:
    """What does not fit between a model's state and a saved one."""
    return compare_weights(path, type(model).__name__, state, saved, ties_in(state), saved.tied)


def misnamed(state: Mapping[str, Any], saved: SavedWeights) -> tuple[list[str], list[str]]:
    """The names that a saved state lacks, and those that it has and the model's lacks."""
    return lacking(state, saved, ties_in(state)), lacking(saved, state, saved.tied)


def matching_weights(state: Mapping[str, Any], saved: SavedWeights) -> SavedWeights:
    """The part of a saved state that fits."""
    return SavedWeights(matching(state, saved), [])


def load_weights(state: Mapping[str, Any], saved: SavedWeights) -> None:
    """Fills a model's state; of names that are tied, any will do."""
    tied = ties_in(state)
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
        self._shaped = is_shaped_like_parameters(optimizer)
        self._groups, self._names = local_state.groups_of(optimizer, models)
        self._called = local_state.called(self._groups, self._names)

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
        kind = kind_of(self._optimizer)
        sizes, live_sizes = [list(map(len, groups)) for groups in (saved.params, self._called)]
        differs = Problem(self.path, "shape", f"its groups have {sizes} parameters, and {live_sizes} in {kind}")
        if not saved.is_named and sizes != live_sizes:
            return [differs]
        if problems := compare_optimizers(self.path, self._optimizer, saved.groups, saved.state.values()):
            return problems
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

    mesh: Any = param.device_mesh
    return DTensor.from_local(value.to(param.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
