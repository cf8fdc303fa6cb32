"""Weights from files into a model whose parameters are shards (DTensors) on several processes.

What is wrong is told on every process, before anything was changed on any: nobody waits for one that has left.
"""

from __future__ import annotations

import inspect as reflection
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .checkpoints import Inspection, WeightFile, WeightsError, find_checkpoint, inspect
from .tied_weights import find_tied_parameters

_Described = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def is_shard(value: Any) -> bool:
    """Whether a tensor is one process's part of a larger one."""
    return hasattr(value, "device_mesh")


def load_sharded(
    model: nn.Module, checkpoint: str | os.PathLike[str], *, strict: bool, whole: bool, first_reads: bool
) -> list[str]:
    """Loads weights into a sharded model. All processes call it.

    Args:
        model: The model, with values.
        checkpoint: The files.
        strict: Names too few or too many are an error.
        whole: The files hold whole tensors, of which each process takes its part; else each process's own files hold its
            parts.
        first_reads: Only the first process reads, and sends what it read to the others.

    Returns:
        Names too few or too many.

    Raises:
        WeightsError: on all processes, when something is wrong on one.
    """
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    files: dict[str, WeightFile] = {}
    problems, loose = [f"{name} has no values here to load into" for name in state if state[name].is_meta], list[str]()
    described: _Described = {}
    if not first_reads or _rank() == 0:
        try:
            found = inspect(model, find_checkpoint(checkpoint), find_tied_parameters(model))
        except ValueError as error:  # there is no checkpoint: for the others to know as well
            found = Inspection(problems=[str(error)])
        files = {name: file for file in found.files for name in file.shapes if name in state}
        loose = [f"{name} is missing" for name in found.missing]
        loose += [f"{name} is in the files, and not in the model" for name in found.unexpected]
        problems += found.problems + _shape_mismatches(state, files, whole)
        if not problems:
            described = {name: (files[name][name].dtype, files[name].shapes[name]) for name in state if name in files}
    all_problems, all_loose, everything = _from_all(problems), _from_all(loose), _gathered(described)
    if all_problems or (strict and all_loose):
        raise WeightsError(checkpoint, [*all_problems, *all_loose])
    for name, (dtype, shape) in (everything[0] if first_reads else described).items():
        value = files[name][name] if name in files else torch.empty(shape, dtype=dtype)
        if first_reads:
            value = _broadcast(value, state[name])
        _fill(state[name], value, whole)
    return all_loose


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _gathered(value: Any) -> list[Any]:
    """What each process has, by rank."""
    if not torch.distributed.is_initialized():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def _from_all(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(line for each in _gathered(lines) for line in each))


def _shape_mismatches(state: Mapping[str, torch.Tensor], files: Mapping[str, WeightFile], whole: bool) -> list[str]:
    problems = []
    for name, file in files.items():
        wanted: Any = state[name]
        if is_shard(wanted):  # the others were compared already
            shape = tuple(wanted.shape if whole else wanted.to_local().shape)
            if file.shapes[name] != shape:
                kind = "the model" if whole else "this process's part"
                problems.append(f"{name} has the shape {file.shapes[name]} in {file.path.name}, and {shape} in {kind}")
    return problems


def _broadcast(value: torch.Tensor, target: Any) -> torch.Tensor:
    """The first process's value, on all; on the device that the processes' transport can reach."""
    local = target.to_local() if is_shard(target) else target
    value = value.to(local.device).contiguous()
    torch.distributed.broadcast(value, 0)
    return value


def _fill(target: Any, value: torch.Tensor, whole: bool) -> None:
    with torch.no_grad():
        if not is_shard(target):
            target.copy_(value)
        elif not whole:
            target.to_local().copy_(value)
        else:
            target.to_local().copy_(_local_slice(target, value))


def _local_slice(target: Any, value: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor."""
    from torch.distributed.tensor import distribute_tensor

    # Everybody has the value. Older versions of torch send it once more.
    options = {"src_data_rank": None} if "src_data_rank" in reflection.signature(distribute_tensor).parameters else {}
    shards: Any = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, **options)
    part: torch.Tensor = shards.to_local()
    return part
