"""Weights and optimizer states of sharded models by themselves: whole in one file, or each rank's shards in a folder.

The files are those of a checkpoint (see `forms`), without its manifest. All ranks call these functions together.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ..runtime import world
from ..runtime.tensors.forward import unwrap_module
from . import loading
from .consensus import checkpoint_group, run_on_all_ranks
from .errors import LoadError, SaveError
from .items import model_items, transaction
from .items.state_item import Entry, Part
from .model_files import atomic_write
from .sharded import local_state, reshard
from .sharded.dcp_writer import write_metadata
from .sharded.gathering import gather_full_state
from .storage.formats import write_torch


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
        use_dcp: Accepted; shards always have the layout of torch.distributed.checkpoint.

    Raises:
        SaveError: on every rank, when one could not write its part.
    """
    here = world.current()
    state, full = _state(model, adapter_only), model_items.saves_full_state(fsdp_plugin)
    if full:
        _write(model_items.gathered_model(model_index, gather_full_state(state)), Path(output_dir))
    else:
        _write(model_items.shards_of_model(model_index, here.rank, state), Path(output_dir))


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

    Raises:
        LoadError: on every rank, when the weights do not fit, and nothing was changed; or when a file is damaged inside
            its tensors, which is found on the way (`Accelerator.load_state` compares checksums first).
    """
    folder, bare = Path(input_dir), unwrap_module(model)
    entry = model_items.model_in(
        folder, model_index, bare, sharded=True, full=model_items.saves_full_state(fsdp_plugin)
    )
    _load(entry, folder, strict=not adapter_only)
    state, saved = local_state.model_state(bare), entry.read(folder, {})
    return _IncompatibleKeys(*reshard.key_mismatches(state, saved))


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
    here, models, full = world.current(), [unwrap_module(model)], model_items.saves_full_state(fsdp_plugin)
    if full:
        entry = model_items.gathered_optimizer(optimizer_index, here.rank, optimizer, models)
    else:
        entry = model_items.shards_of_optimizer(optimizer_index, here.rank, optimizer, models)
    _write(entry, Path(output_dir))


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
    """Loads what `save_fsdp_optimizer` saved; arguments and errors as for `load_fsdp_model`."""
    folder, full = Path(input_dir), model_items.saves_full_state(fsdp_plugin)
    entry = model_items.optimizer_in(
        folder, optimizer_index, optimizer, [unwrap_module(model)], sharded=True, full=full
    )
    _load(entry, folder, strict=True)


def _state(model: nn.Module, adapter_only: bool) -> dict[str, Any]:
    state = local_state.model_state(unwrap_module(model))
    if not adapter_only:
        return state
    trained = local_state.trainable_params(unwrap_module(model))
    kept = {id(value) for name, value in state.items() if name in trained}
    return {name: value for name, value in state.items() if id(value) in kept}


def _write(entry: Entry, folder: Path) -> None:
    """Writes each rank's part, over what was there."""
    here, path, ranks = world.current(), folder / entry.path, checkpoint_group(SaveError)
    state = entry.capture()

    def clear() -> None:
        if here.rank == 0 and entry.everywhere and path.parent.exists():
            shutil.rmtree(path.parent)

    def write() -> list[Any]:
        if entry.everywhere:
            return Part(entry.path, state, entry.format).write(folder).places if state is not None else []
        if here.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda writer: write_torch(state, writer))
        return []

    run_on_all_ranks(ranks, f"preparing {path.parent}", clear, SaveError)
    places = run_on_all_ranks(ranks, f"writing {path}", write, SaveError)

    def close() -> None:
        if here.rank == 0 and entry.everywhere:
            write_metadata(path.parent, [place for own in places for place in own])

    run_on_all_ranks(ranks, f"describing {path.parent}", close, SaveError)


def _load(entry: Entry, folder: Path, strict: bool) -> None:
    here = dataclasses.replace(world.current(), collectives=checkpoint_group(LoadError))
    reading = loading.read_items(folder, [entry], None, {})
    loading.merge_problems(here, folder, [reading], strict)
    transaction.apply(here, folder, reading.states)
