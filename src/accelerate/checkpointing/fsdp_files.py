"""Saves and loads weights and optimizer states of sharded models: full in one file, or as each rank's shards in a folder.

The files are those of a checkpoint (see `items.model_items`), without a manifest. All functions are collective.
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
from .items import model_items
from .items.state_item import LoadItem, SaveItem
from .model_files import atomic_write
from .sharded import local_state, reshard
from .sharded.dcp_writer import WriteResult, write_metadata
from .sharded.gathering import gather_full_state
from .storage.file_writer import write_file
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
        fsdp_plugin: Its ``state_dict_type`` selects one file or shards.
        accelerator: Not needed; part of the documented signature.
        model: The model.
        output_dir: The folder.
        model_index: Number of the model among several.
        adapter_only: Only parameters that are trained.
        use_dcp: Accepted; shards always have the layout of torch.distributed.checkpoint.

    Raises:
        SaveError: on every rank, when one could not write its part.
    """
    here, state, full = world.current(), _state(model, adapter_only), model_items.saves_full_state(fsdp_plugin)
    state = gather_full_state(state) if full else state
    _write(model_items.save_sharded_model(model_index, here.rank, state, full), Path(output_dir))


def load_fsdp_model(
    fsdp_plugin: Any,
    accelerator: Any,
    model: nn.Module,
    input_dir: str | os.PathLike[str],
    model_index: int = 0,
    adapter_only: bool = False,
    use_dcp: bool = True,
) -> Any:
    """Loads the files of `save_fsdp_model`, with the same arguments.

    Returns:
        The names that were missing and unexpected, as ``load_state_dict`` does.

    Raises:
        LoadError: on every rank, when the weights do not fit, and nothing was changed; or when a file is damaged inside
            its tensors, which is found on the way (`Accelerator.load_state` compares checksums first).
    """
    folder, bare = Path(input_dir), unwrap_module(model)
    item = model_items.load_model(
        folder, model_index, bare, sharded=True, full=model_items.saves_full_state(fsdp_plugin)
    )
    _load(item, folder, strict=not adapter_only)
    state, saved = local_state.model_state(bare), item.read(folder / item.path, {})
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
    item = model_items.save_sharded_optimizer(optimizer_index, here.rank, optimizer, models, full)
    _write(item, Path(output_dir))


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
    """Loads the files of `save_fsdp_optimizer`; arguments and errors as for `load_fsdp_model`."""
    folder, full = Path(input_dir), model_items.saves_full_state(fsdp_plugin)
    models = [unwrap_module(model)]
    item = model_items.load_optimizer(folder, optimizer_index, optimizer, models, sharded=True, full=full)
    _load(item, folder, strict=True)


def _state(model: nn.Module, adapter_only: bool) -> dict[str, Any]:
    state = local_state.model_state(unwrap_module(model))
    if not adapter_only:
        return state
    trained = local_state.trainable_params(unwrap_module(model))
    kept = {id(value) for name, value in state.items() if name in trained}
    return {name: value for name, value in state.items() if id(value) in kept}


def _write(item: SaveItem, folder: Path) -> None:
    """Writes each rank's file, replacing the files of an earlier save."""
    here, path = world.current(), folder / item.path
    ranks = checkpoint_group(here.collectives, SaveError)
    state = item.capture()

    def clear() -> None:
        if here.rank == 0 and item.per_rank and path.parent.exists():
            shutil.rmtree(path.parent)

    def write() -> list[WriteResult]:
        results: list[list[WriteResult] | None] = []
        if item.per_rank and state is not None:
            write_file(path, item.path, lambda writer: results.append(item.format.write(state, writer)))
        elif not item.per_rank and here.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda writer: write_torch(state, writer))
        return (results[0] or []) if results else []

    run_on_all_ranks(ranks, f"preparing {path.parent}", clear, SaveError)
    results = run_on_all_ranks(ranks, f"writing {path}", write, SaveError)

    def finish() -> None:
        if here.rank == 0 and item.per_rank:
            write_metadata(path.parent, [result for own in results for result in own])

    run_on_all_ranks(ranks, f"describing {path.parent}", finish, SaveError)


def _load(item: LoadItem, folder: Path, strict: bool) -> None:
    here = world.current()
    here = dataclasses.replace(here, collectives=checkpoint_group(here.collectives, LoadError))
    result = loading.read_items(folder, [item], None, {})
    loading.merge_problems(here, folder, [result], strict)
    loading.apply(here, folder, result.states)
