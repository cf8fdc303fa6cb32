"""The entries of models and optimizers in each form that a checkpoint can have them in, to save and to load.

    whole      model.safetensors, pytorch_model.bin, optimizer.bin     one process, or several that hold the same
    gathered   pytorch_model_fsdp.bin, optimizer.bin                   sharded, FULL_STATE_DICT: rank 0 writes all
    shards     pytorch_model_fsdp_0/, optimizer_0/                     sharded, SHARDED_STATE_DICT: each rank its own

What is loaded is whichever form is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..sharded import local_state, reshard, state_reader
from ..sharded.compat import optimizer_class_name
from ..sharded.dcp_reader import METADATA_FILE
from ..sharded.dcp_writer import plan_writes, shard_file, write_items
from ..sharded.gathering import gather_full_state
from ..sharded.local_state import ExtraState
from ..sharded.shard_layout import local_shard
from ..sharded.state_reader import MODEL, OPTIMIZER
from ..storage.filenames import full_model_file, model_file, model_folder, optimizer_file, optimizer_folder
from .standard_items import model_entry, optimizer_entry
from .state_item import SAFETENSORS, TORCH, Entry, FileFormat


def saves_full_state(plugin: Any) -> bool:
    """Whether rank 0 is to save all of sharded models, by an FSDP plugin (or none); else each rank saves its own part."""
    kind = getattr(plugin, "state_dict_type", None)
    return bool(getattr(kind, "name", kind) == "FULL_STATE_DICT")


# To save ----------------------------------------------------------------------------------------------------------------


def shards_of_model(index: int, rank: int, state: Mapping[str, Any]) -> Entry:
    """A rank's shards of a model's state, as `live.model_state` gives it."""

    def capture() -> Any:
        own = {(MODEL, name): value for name, value in state.items() if not isinstance(value, ExtraState)}
        extra = {(MODEL, n): v.module.get_extra_state() for n, v in state.items() if isinstance(v, ExtraState)}
        return plan_writes({**own, **(extra if rank == 0 else {})})

    return _shards(model_folder(index), rank, capture)


def shards_of_optimizer(index: int, rank: int, optimizer: Any, models: Sequence[nn.Module]) -> Entry:
    """A rank's shards of an optimizer's state."""

    def capture() -> Any:
        groups, names = local_state.resolve_param_groups(optimizer, models)
        state: dict[tuple[Any, ...], Any] = {
            (OPTIMIZER, "state", *key): value for key, value in local_state.optimizer_state(optimizer, groups).items()
        }
        if rank == 0:
            for number, options in enumerate(_options(optimizer, local_state.group_fqns(groups, names))):
                for key, value in options.items():
                    state[OPTIMIZER, "param_groups", number, key] = (
                        local_shard(value) if hasattr(value, "dim") else value
                    )
        return plan_writes(state)

    return _shards(optimizer_folder(index), rank, capture, optimizer_class_name(optimizer))


def _shards(folder: str, rank: int, capture: Callable[[], Any], kind: str = "") -> Entry:
    file = shard_file(rank)
    form = FileFormat(functools.partial(write_items, file=file), TORCH.read)
    return Entry(f"{folder}/{file}", capture, load=_not_loaded, everywhere=True, format=form, kind=kind)


def _not_loaded(state: Any) -> None:
    raise AssertionError("this entry is for saving")


def gathered_model(index: int, state: dict[str, Any]) -> Entry:
    """The whole state of a model that rank 0 has gathered."""
    return Entry(full_model_file(index), capture=lambda: state or None, load=_not_loaded, fresh=True)


def gathered_optimizer(index: int, rank: int, optimizer: Any, models: Sequence[nn.Module]) -> Entry:
    """The whole state of an optimizer, which rank 0 gathers."""

    def capture() -> dict[str, Any] | None:
        groups, names = local_state.resolve_param_groups(optimizer, models)
        whole = gather_full_state(local_state.optimizer_state(optimizer, groups))
        if rank:
            return None
        state: dict[str, dict[str, Any]] = {}
        for (name, key), value in whole.items():
            state.setdefault(name, {})[key] = value
        return {"state": state, "param_groups": _options(optimizer, local_state.group_fqns(groups, names))}

    return Entry(
        optimizer_file(index),
        capture,
        load=_not_loaded,
        collective=True,
        fresh=True,
        kind=optimizer_class_name(optimizer),
    )


def _options(optimizer: Any, names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    groups = zip(optimizer.param_groups, names, strict=True)
    return [{**group, "params": list(called)} for group, called in groups]


# To load ----------------------------------------------------------------------------------------------------------------


def model_in(
    folder: Path,
    index: int,
    model: nn.Module,
    *,
    sharded: bool,
    full: bool = False,
    options: dict[str, Any] | None = None,
) -> Entry:
    """The weights of a model in whichever form they are there.

    Args:
        folder: The checkpoint.
        index: The model's place among the models.
        model: The module without containers of DistributedDataParallel.
        sharded: Ranks hold shards of it.
        full: The form looked for first among those of sharded models.
        options: For ``load_state_dict`` of a module that is whole.
    """
    whole = [model_file(index, safe=True), model_file(index, safe=False)]
    shared = [full_model_file(index), model_folder(index)][:: 1 if full else -1]
    path = _first(folder, [*shared, *whole] if sharded else [*whole, *shared])
    if path in whole and not sharded:
        return model_entry(index, model, safe=path == whole[0], options=options)
    in_file = SAFETENSORS if path == whole[0] else TORCH

    def read(at: Path, **how: Any) -> Any:
        return state_reader.read_dcp_weights(at) if at.is_dir() else state_reader.wrap_weights(in_file.read(at, **how))

    return Entry(
        path,
        capture=lambda: None,
        load=lambda found: reshard.load_weights(local_state.model_state(model), found),
        check=lambda found: reshard.check_weights(path, model, local_state.model_state(model), found),
        partial=lambda found: reshard.compatible_weights(local_state.model_state(model), found),
        format=FileFormat(in_file.write, read, in_file.takes_options),
    )


def optimizer_in(
    folder: Path, index: int, optimizer: Any, models: Sequence[nn.Module], *, sharded: bool, full: bool = False
) -> Entry:
    """The state of an optimizer in whichever form it is there; arguments as for `model_in`."""
    forms = [optimizer_file(index), optimizer_folder(index)]
    path = _first(folder, forms[:: 1 if full or not sharded else -1])
    plain = optimizer_entry(index, optimizer)

    def read(at: Path, **how: Any) -> Any:
        if at.is_dir():
            return state_reader.read_dcp_optimizer(at)
        state = TORCH.read(at, **how)
        return state if not sharded and not _is_named(state) else state_reader.wrap_optimizer_state(state)

    def target() -> reshard.OptimizerTarget:
        return reshard.OptimizerTarget(path, optimizer, models)

    def load(found: Any) -> None:
        target().load(found) if isinstance(found, state_reader.LazyOptimizerState) else plain.load(found)

    return Entry(
        path,
        capture=lambda: None,
        load=load,
        check=lambda found: (target() if isinstance(found, state_reader.LazyOptimizerState) else plain).check(found),
        format=FileFormat(TORCH.write, read, takes_options=True),
        kept=plain.kept and path == forms[0] and not sharded,
        kind=plain.kind,
    )


def _is_named(state: Any) -> bool:
    return (
        state_reader.wrap_optimizer_state(state).is_named
        if isinstance(state, dict) and "param_groups" in state
        else False
    )


def _first(folder: Path, paths: Sequence[str]) -> str:
    """The first path that is there; if none is, the first, to be told missing."""
    there = (path for path in paths if (folder / path).is_file() or (folder / path / METADATA_FILE).is_file())
    return next(there, paths[0])
