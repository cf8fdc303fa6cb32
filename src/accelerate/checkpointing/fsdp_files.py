"""Weights and optimizer states of fully sharded models, whole in one file or each rank's shards in a folder.

The states come from `torch.distributed.checkpoint.state_dict`, which gives them the names of the plain model, whichever
version of FSDP shards it. All ranks call these functions together.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..runtime import world
from ..runtime.forward import extract_model_from_parallel
from ..settings.enums import FSDP_MODEL_NAME, OPTIMIZER_NAME
from .dcp import StoredFolder
from .files import read_torch, write_torch
from .model_files import write_whole


def save_fsdp_model(
    fsdp_plugin: Any,
    accelerator: Any,
    model: nn.Module,
    output_dir: str | os.PathLike[str],
    model_index: int = 0,
    adapter_only: bool = False,
    use_dcp: bool = True,
) -> None:
    """Saves a sharded model's weights.

    Args:
        fsdp_plugin: Says by its ``state_dict_type`` whether in one file or in shards.
        accelerator: Not needed; part of the documented signature.
        model: The model.
        output_dir: The folder.
        model_index: Number of the model among several.
        adapter_only: Only parameters that are trained.
        use_dcp: Accepted; states always come from `torch.distributed.checkpoint`.
    """
    full = _is_full(fsdp_plugin)
    state = get_model_state_dict(_bare(model), options=_options(full, adapter_only))
    _write(state, "model", Path(output_dir), FSDP_MODEL_NAME, model_index, full)


def load_fsdp_model(
    fsdp_plugin: Any,
    accelerator: Any,
    model: nn.Module,
    input_dir: str | os.PathLike[str],
    model_index: int = 0,
    adapter_only: bool = False,
    use_dcp: bool = True,
) -> Any:
    """Loads what `save_fsdp_model` saved; arguments as there.

    Returns:
        The names that were missing and unexpected, as ``load_state_dict`` does.
    """
    full, bare = _is_full(fsdp_plugin), _bare(model)
    options = _options(full, adapter_only)
    wanted = {} if full else get_model_state_dict(bare, options=options)
    state = _read(wanted, "model", Path(input_dir), FSDP_MODEL_NAME, model_index, full)
    return set_model_state_dict(bare, state, options=StateDictOptions(full_state_dict=full, strict=not adapter_only))


def save_fsdp_optimizer(
    fsdp_plugin: Any,
    accelerator: Any,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    output_dir: str | os.PathLike[str],
    optimizer_index: int = 0,
    use_dcp: bool = True,
) -> None:
    """Saves the state of a sharded model's optimizer; arguments as for `save_fsdp_model`."""
    full = _is_full(fsdp_plugin)
    state = get_optimizer_state_dict(_bare(model), _inner(optimizer), options=_options(full))
    _write(state, "optimizer", Path(output_dir), OPTIMIZER_NAME, optimizer_index, full)


def load_fsdp_optimizer(
    fsdp_plugin: Any,
    accelerator: Any,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    input_dir: str | os.PathLike[str],
    optimizer_index: int = 0,
    adapter_only: bool = False,
    use_dcp: bool = True,
) -> None:
    """Loads what `save_fsdp_optimizer` saved; arguments as for `load_fsdp_model`."""
    full, bare, inner = _is_full(fsdp_plugin), _bare(model), _inner(optimizer)
    options = _options(full)
    wanted = {} if full else get_optimizer_state_dict(bare, inner, options=options)
    state = _read(wanted, "optimizer", Path(input_dir), OPTIMIZER_NAME, optimizer_index, full)
    set_optimizer_state_dict(bare, inner, state, options=StateDictOptions(full_state_dict=full))


def _bare(model: nn.Module) -> nn.Module:
    found: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return found


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _is_full(plugin: Any) -> bool:
    """Whether the plugin asks for one file.

    Raises:
        ValueError: for each rank's own flat state, which torch cannot load again.
    """
    kind = getattr(plugin.state_dict_type, "name", plugin.state_dict_type)
    if kind == "LOCAL_STATE_DICT":
        raise ValueError(
            "state_dict_type LOCAL_STATE_DICT cannot be loaded again: use SHARDED_STATE_DICT, which is as fast."
        )
    return kind == "FULL_STATE_DICT"


def _options(full: bool, adapter_only: bool = False) -> StateDictOptions:
    # Without cpu_offload: with it, FSDP 1 takes a path that crashes on the CPU.
    return StateDictOptions(full_state_dict=full, ignore_frozen_params=adapter_only)


def _write(state: dict[str, Any], kind: str, folder: Path, name: str, index: int, full: bool) -> None:
    here = world.current()
    if full:
        if here.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(_file(folder, name, index), lambda writer: write_torch(state, writer))
        here.collectives.barrier()
        return
    shards = folder / f"{name}_{index}"
    shards.mkdir(parents=True, exist_ok=True)
    dcp.save({kind: state}, checkpoint_id=shards)


def _read(wanted: dict[str, Any], kind: str, folder: Path, name: str, index: int, full: bool) -> dict[str, Any]:
    if full:
        state: dict[str, Any] = read_torch(_file(folder, name, index))
        return state
    shards = folder / f"{name}_{index}"
    StoredFolder(shards)  # torch would run code from a description; this refuses one that has any
    dcp.load({kind: wanted}, checkpoint_id=shards)
    return wanted


def _file(folder: Path, name: str, index: int) -> Path:
    return folder / (f"{name}_{index}.bin" if index else f"{name}.bin")
