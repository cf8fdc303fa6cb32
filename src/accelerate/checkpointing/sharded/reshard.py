"""Loads saved weights and optimizer states into local shards, whatever sharding they were saved with.

Each rank reads the chunks that overlap with its own shards. No communication is needed, and the number of ranks that saved
does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...runtime.tensors.dtensor import is_dtensor
from ..errors import Problem
from . import local_state
from .compat import (
    compare_optimizers,
    compare_weights,
    compatible_entries,
    has_param_shaped_state,
    missing_keys,
    optimizer_class_name,
    tied_names,
)
from .local_state import ExtraState, ParamInfo
from .shard_layout import LocalShard
from .state_reader import LazyOptimizerState, LazyStateDict, LazyTensor

# Weights ----------------------------------------------------------------------------------------------------------------


def check_weights(path: str, model: nn.Module, state: Mapping[str, Any], saved: LazyStateDict) -> list[Problem]:
    """Lists the differences between a model's state and a saved one."""
    return compare_weights(path, type(model).__name__, state, saved, tied_names(state), saved.tied)


def key_mismatches(state: Mapping[str, Any], saved: LazyStateDict) -> tuple[list[str], list[str]]:
    """Returns the FQNs that the saved state lacks, and the unexpected ones in it."""
    return missing_keys(state, saved, tied_names(state)), missing_keys(saved, state, saved.tied)


def compatible_weights(state: Mapping[str, Any], saved: LazyStateDict) -> LazyStateDict:
    """Returns the entries of a saved state that fit the model."""
    return LazyStateDict(compatible_entries(state, saved), [])


def load_weights(state: Mapping[str, Any], saved: LazyStateDict) -> None:
    """Copies a saved state into a model's state; a tied tensor is read once, under any of its FQNs."""
    tied = tied_names(state)
    done: set[int] = set()
    for name, value in state.items():
        source = next((saved[other] for other in (name, *sorted(tied.get(name, ()))) if other in saved), None)
        if source is None:
            continue
        if isinstance(value, ExtraState):
            value.set(source.read() if isinstance(source, LazyTensor) else source)
        elif id(value) not in done:
            done.add(id(value))
            _fill_shard(value, source)


def _fill_shard(target: LocalShard, source: LazyTensor) -> None:
    with torch.no_grad():
        for chunk, piece in target.chunk_views():
            source.copy_into(chunk.offsets, piece)


# Optimizers -------------------------------------------------------------------------------------------------------------


class OptimizerTarget:
    """Loads states into an optimizer whose parameters have FQNs.

    Args:
        path: Path of the item in the checkpoint, for problems.
        optimizer: The optimizer.
        models: The models that its parameters belong to.
    """

    def __init__(self, path: str, optimizer: Any, models: Sequence[nn.Module]) -> None:
        self.path = path
        self._optimizer = optimizer
        self._shaped = has_param_shaped_state(optimizer)
        self._groups, self._index = local_state.resolve_param_groups(optimizer, models)
        self._fqns = local_state.group_fqns(self._groups, self._index)

    def with_param_names(self, saved: LazyOptimizerState) -> LazyOptimizerState:
        """Returns the state keyed by this optimizer's FQNs, where it has numbers or aliases of tied parameters."""
        if saved.is_named:
            aliases = self._index.aliases
            params = [[aliases.get(name, name) for name in group] for group in saved.params]
            state = {aliases.get(name, name): values for name, values in saved.state.items()}
            return LazyOptimizerState(saved.groups, params, state)
        names = {
            number: name
            for numbers, group in zip(saved.params, self._fqns, strict=False)
            for number, name in zip(numbers, group, strict=False)
        }
        state = {names[number]: values for number, values in saved.state.items() if number in names}
        return LazyOptimizerState(
            saved.groups, [[names[n] for n in group if n in names] for group in saved.params], state
        )

    def check(self, saved: LazyOptimizerState) -> list[Problem]:
        """Lists the differences between the optimizer and a saved state."""
        kind = optimizer_class_name(self._optimizer)
        sizes, live_sizes = [list(map(len, groups)) for groups in (saved.params, self._fqns)]
        differs = Problem(self.path, "shape", f"its groups have {sizes} parameters, and {live_sizes} in {kind}")
        if not saved.is_named and sizes != live_sizes:
            return [differs]
        if problems := compare_optimizers(self.path, self._optimizer, saved.groups, saved.state.values()):
            return problems
        saved_groups, own_groups = _group_numbers(self.with_param_names(saved).params), _group_numbers(self._fqns)
        for name in own_groups.keys() - saved_groups.keys():
            problems.append(Problem(self.path, "missing", f"no state of {name!r}, a parameter of {kind}"))
        for name in saved_groups.keys() - own_groups.keys():
            problems.append(Problem(self.path, "extra", f"state of {name!r}, not a parameter of {kind}"))
        for name in saved_groups.keys() & own_groups.keys():
            if saved_groups[name] != own_groups[name]:
                text = f"{name!r} is in group {saved_groups[name]}, and in group {own_groups[name]} of {kind}"
                problems.append(Problem(self.path, "state", text))
        if not problems and len(sizes) != len(live_sizes):  # some are empty
            return [differs]
        return sorted(problems, key=str) or self._shape_problems(self.with_param_names(saved))

    def _shape_problems(self, saved: LazyOptimizerState) -> list[Problem]:
        problems = []
        for param, name, layout in self._originals():
            for key, value in saved.state.get(name, {}).items():
                known = self._shaped or self._is_shaped_like(param, key)
                if (
                    known
                    and isinstance(value, LazyTensor)
                    and value.shape != layout.shape
                    and value.shape not in ((), (1,))
                ):
                    text = f"{key!r} of {name!r} has shape {list(value.shape)}; expected {list(layout.shape)}"
                    problems.append(Problem(self.path, "shape", text))
        return problems

    def _is_shaped_like(self, param: ParamInfo, key: str) -> bool:
        value = self._optimizer.state.get(param.tensor, {}).get(key)
        return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == param.tensor.shape

    def _originals(self) -> Iterator[tuple[ParamInfo, str, Any]]:
        return ((p, name, layout) for group in self._groups for p in group for name, layout in p.originals)

    def load(self, saved: LazyOptimizerState) -> None:
        """Loads a state into the optimizer, reusing live tensors of the same shape and dtype."""
        saved = self.with_param_names(saved)
        state: dict[int, dict[str, Any]] = {}
        groups, number = [], 0
        for options, group in zip(saved.groups, self._groups, strict=True):
            groups.append({**options, "params": list(range(number, number + len(group)))})
            for param in group:
                if values := self._values(param, saved):
                    state[number] = values
                number += 1
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _values(self, param: ParamInfo, saved: LazyOptimizerState) -> dict[str, Any]:
        """Returns this rank's part of a parameter's state; empty if it holds no part of the parameter."""
        if not any(layout.chunks for _, layout in param.originals):
            return {}
        keys = dict.fromkeys(key for name, _ in param.originals for key in saved.state.get(name, {}))
        current = self._optimizer.state.get(param.tensor, {})
        return {key: self._value(param, current.get(key), key, saved) for key in keys}

    def _value(self, param: ParamInfo, current: Any, key: str, saved: LazyOptimizerState) -> Any:
        found = {name: saved.state[name][key] for name, _ in param.originals if key in saved.state.get(name, {})}
        first = next(iter(found.values()))
        if not isinstance(first, LazyTensor):
            return first
        layouts = dict(param.originals)
        if not all(value.shape == layouts[name].shape for name, value in found.items()) or not first.shape:
            return _replicate(first.read(), param.tensor)
        fits = (
            isinstance(current, torch.Tensor) and current.dtype == first.dtype and current.shape == param.tensor.shape
        )
        full: Any = current.detach() if fits else _empty_like(param, first.dtype)
        local = full.to_local() if is_dtensor(full) else full
        for name, layout in param.originals:
            if name in found:
                _fill_shard(LocalShard(layout, local), found[name])
        return full


def _group_numbers(groups: Sequence[Sequence[str]]) -> dict[str, int]:
    return {name: number for number, group in enumerate(groups) for name in group}


def _empty_like(param: ParamInfo, dtype: torch.dtype) -> torch.Tensor:
    """Returns zeros with the local shape of a parameter; elements of a flat parameter that are padding stay 0."""
    return torch.zeros_like(param.tensor, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format)


def _replicate(value: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Returns a replicated DTensor on the mesh of the parameter, or scalars and states of plain parameters unchanged."""
    if not value.dim() or not is_dtensor(param):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = param.device_mesh
    return DTensor.from_local(value.to(param.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
