"""Loads weight files into a model whose parameters are DTensor shards.

Problems are exchanged and raised on every rank before anything is changed on any, so that no rank blocks in a collective.
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
    """Returns whether a tensor is a DTensor."""
    return hasattr(value, "device_mesh")


def load_sharded(
    model: nn.Module, checkpoint: str | os.PathLike[str], *, strict: bool, whole: bool, first_reads: bool
) -> list[str]:
    """Loads weights into a sharded model. A collective call.

    Args:
        model: The model, with values.
        checkpoint: The files.
        strict: Raise for missing or unexpected names.
        whole: The files contain full tensors, of which each rank takes its shard; otherwise each rank reads its own shards.
        first_reads: Only rank 0 reads the files; it broadcasts the tensors.

    Returns:
        Missing and unexpected names.

    Raises:
        WeightsError: on all ranks, if there is a problem on any.
    """
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    files: dict[str, WeightFile] = {}
    problems = [f"{name} has no values to overwrite in the model" for name in state if state[name].is_meta]
    loose: list[str] = []
    described: _Described = {}
    if not first_reads or _rank() == 0:
        try:
            found = inspect(model, find_checkpoint(checkpoint), find_tied_parameters(model))
        except ValueError as error:  # no checkpoint; the error is exchanged with the other ranks below
            found = Inspection(problems=[str(error)])
        files = {name: file for file in found.files for name in file.shapes if name in state}
        loose = [f"{name} is missing" for name in found.missing]
        loose += [f"{name} is in the files, but not in the model" for name in found.unexpected]
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
    """All-gathers an object; returns one per rank."""
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
        if is_shard(wanted):  # inspect has compared the others
            shape = tuple(wanted.shape if whole else wanted.to_local().shape)
            if file.shapes[name] != shape:
                kind = "the model" if whole else "this rank's shard"
                problems.append(f"{name} has shape {file.shapes[name]} in {file.path.name}, and {shape} in {kind}")
    return problems


def _broadcast(value: torch.Tensor, target: Any) -> torch.Tensor:
    """Broadcasts a tensor from rank 0, on the device of the target, which the process group's backend supports."""
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
    """Returns this rank's shard of a full tensor."""
    from torch.distributed.tensor import distribute_tensor

    # All ranks have the tensor. Older versions of torch scatter it once more.
    options = {"src_data_rank": None} if "src_data_rank" in reflection.signature(distribute_tensor).parameters else {}
    shards: Any = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, **options)
    part: torch.Tensor = shards.to_local()
    return part
