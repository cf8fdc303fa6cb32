"""Items of objects with a ``state_dict``: models, optimizers, schedulers, the gradient scaler, registered objects.

Models and optimizers have three layouts on disk:

    whole      model.safetensors, pytorch_model.bin, optimizer.bin     one process, or replicas
    gathered   pytorch_model_fsdp.bin, optimizer.bin                   FULL_STATE_DICT: rank 0 gathers and saves
    sharded    pytorch_model_fsdp_0/, optimizer_0/                     SHARDED_STATE_DICT: each rank saves its shards

A load takes whichever layout the checkpoint has.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ...settings.enums import SCALER_NAME, SCHEDULER_NAME
from ..errors import Problem
from ..sharded import local_state, reshard, state_reader
from ..sharded.compat import (
    SCALARS,
    class_mismatch,
    compare_optimizers,
    compare_weights,
    compatible_entries,
    group_ties,
    has_param_shaped_state,
    optimizer_class_name,
)
from ..sharded.dcp_reader import METADATA_FILE
from ..sharded.dcp_writer import plan_writes, shard_file, write_items
from ..sharded.gathering import gather_full_state
from ..sharded.local_state import ExtraState
from ..sharded.shard_layout import local_shard
from ..sharded.state_reader import MODEL, OPTIMIZER, LazyOptimizerState
from ..storage.filenames import (
    custom_file,
    full_model_file,
    indexed_name,
    model_file,
    model_folder,
    optimizer_file,
    optimizer_folder,
)
from ..storage.formats import drop_shared_tensors, shared_tensor_names
from ..storage.schema import optimizer_state_error, type_mismatches
from ..storage.staging import can_copy, copy_tensors, is_dense_cpu
from .state_item import SAFETENSORS, TORCH, FileFormat, LoadItem, SaveItem


def saves_full_state(plugin: Any) -> bool:
    """Returns whether an FSDP plugin (or None) has rank 0 save the full state; otherwise each rank saves its shards."""
    kind = getattr(plugin, "state_dict_type", None)
    return bool(getattr(kind, "name", kind) == "FULL_STATE_DICT")


# Save -----------------------------------------------------------------------------------------------------------------


@dataclass
class SaveObject(SaveItem):
    """Saves the ``state_dict`` of an object that each process holds whole."""

    path: str
    object: Any
    class_name: str = ""

    def capture(self) -> Any:
        return self.object.state_dict()


@dataclass
class SaveModel(SaveItem):
    """Saves the weights of a model that each process holds whole."""

    path: str
    state: dict[str, Any]
    format: FileFormat

    def capture(self) -> dict[str, Any]:
        return drop_shared_tensors(self.state) if self.format is SAFETENSORS else self.state


@dataclass
class SaveGatheredModel(SaveItem):
    """Saves the full state of a sharded model, already gathered on rank 0."""

    path: str
    state: dict[str, Any]
    owns_memory = True

    def capture(self) -> dict[str, Any] | None:
        return self.state or None


@dataclass
class SaveGatheredOptimizer(SaveItem):
    """Saves the full state of a sharded model's optimizer, which `capture` gathers on rank 0."""

    path: str
    rank: int
    optimizer: Any
    models: Sequence[nn.Module]
    class_name: str = ""
    collective = True
    owns_memory = True

    def capture(self) -> dict[str, Any] | None:
        groups, index = local_state.resolve_param_groups(self.optimizer, self.models)
        full = gather_full_state(local_state.optimizer_state(self.optimizer, groups))
        if self.rank:
            return None
        state: dict[str, dict[str, Any]] = {}
        for (name, key), value in full.items():
            state.setdefault(name, {})[key] = value
        return {"state": state, "param_groups": _group_options(self.optimizer, local_state.group_fqns(groups, index))}


@dataclass
class SaveModelShards(SaveItem):
    """Saves the shards that this rank holds of a model, in a file of its own.

    Attributes:
        state: The state as `local_state.model_state` returns it.
    """

    path: str
    rank: int
    state: Mapping[str, Any]
    format: FileFormat
    per_rank = True

    def capture(self) -> Any:
        own = {(MODEL, name): value for name, value in self.state.items() if not isinstance(value, ExtraState)}
        extra = {(MODEL, n): v.module.get_extra_state() for n, v in self.state.items() if isinstance(v, ExtraState)}
        return plan_writes({**own, **(extra if self.rank == 0 else {})})


@dataclass
class SaveOptimizerShards(SaveItem):
    """Saves the shards that this rank holds of an optimizer's state, in a file of its own."""

    path: str
    rank: int
    optimizer: Any
    models: Sequence[nn.Module]
    format: FileFormat
    class_name: str = ""
    per_rank = True

    def capture(self) -> Any:
        groups, index = local_state.resolve_param_groups(self.optimizer, self.models)
        shards = local_state.optimizer_state(self.optimizer, groups)
        state: dict[tuple[Any, ...], Any] = {(OPTIMIZER, "state", *key): value for key, value in shards.items()}
        if self.rank == 0:
            options = _group_options(self.optimizer, local_state.group_fqns(groups, index))
            for number, group in enumerate(options):
                for key, value in group.items():
                    wrapped = local_shard(value) if hasattr(value, "dim") else value
                    state[OPTIMIZER, "param_groups", number, key] = wrapped
        return plan_writes(state)


def _group_options(optimizer: Any, names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    groups = zip(optimizer.param_groups, names, strict=True)
    return [{**group, "params": list(group_names)} for group, group_names in groups]


def save_model(index: int, state: dict[str, Any], safe: bool) -> SaveItem:
    """Creates the item that saves a whole model, as safetensors or in `torch.save`'s format."""
    return SaveModel(model_file(index, safe), state, SAFETENSORS if safe else TORCH)


def save_optimizer(index: int, optimizer: Any) -> SaveItem:
    """Creates the item that saves the optimizer of whole models."""
    return SaveObject(optimizer_file(index), optimizer, optimizer_class_name(optimizer))


def save_sharded_model(index: int, rank: int, state: dict[str, Any], full: bool) -> SaveItem:
    """Creates the item that saves a sharded model.

    Args:
        index: Index of the model.
        rank: This rank.
        state: The gathered state if `full`, else the shards of this rank.
        full: Rank 0 saves the full state, instead of each rank its shards.
    """
    if full:
        return SaveGatheredModel(full_model_file(index), state)
    return SaveModelShards(f"{model_folder(index)}/{shard_file(rank)}", rank, state, _shard_format(rank))


def save_sharded_optimizer(index: int, rank: int, optimizer: Any, models: Sequence[nn.Module], full: bool) -> SaveItem:
    """Creates the item that saves the optimizer of sharded models; arguments as for `save_sharded_model`."""
    name = optimizer_class_name(optimizer)
    if full:
        return SaveGatheredOptimizer(optimizer_file(index), rank, optimizer, models, name)
    path = f"{optimizer_folder(index)}/{shard_file(rank)}"
    return SaveOptimizerShards(path, rank, optimizer, models, _shard_format(rank), name)


def _shard_format(rank: int) -> FileFormat:
    return FileFormat(functools.partial(write_items, file=shard_file(rank)), TORCH.read)


# Load a model ---------------------------------------------------------------------------------------------------------


@dataclass
class LoadModel(LoadItem):
    """Loads the weights of a whole model from a whole file.

    Attributes:
        options: For ``load_state_dict``.
    """

    path: str
    model: nn.Module
    format: FileFormat
    options: dict[str, Any]

    def read(self, path: Path, options: dict[str, Any]) -> Any:
        return self.format.read(path, **options) if self.format is TORCH else self.format.read(path)

    def check(self, state: Any) -> list[Problem]:
        if not isinstance(state, dict):
            text = f"expected a mapping of names to tensors, found {type(state).__name__}"
            return [Problem(self.path, "corrupt", text)]
        live = self.model.state_dict()
        tied = group_ties(shared_tensor_names(live)), group_ties(shared_tensor_names(state))
        return compare_weights(self.path, type(self.model).__name__, live, state, *tied)

    def matching(self, state: Any) -> dict[str, Any]:
        return compatible_entries(self.model.state_dict(), state if isinstance(state, dict) else {})

    def load(self, state: dict[str, Any]) -> None:
        values = state if self.options.get("assign") else self._copy_in_place(state)
        # strict=False: `check` has accepted names that are missing, because they are tied or the caller allows it.
        self.model.load_state_dict(values, **{**self.options, "strict": False})

    def _copy_in_place(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Copies tensors that need no conversion; returns the state with the live tensors in their place."""
        live = self.model.state_dict(keep_vars=True)
        copied = {name: live[name] for name, value in saved.items() if can_copy(live.get(name), value)}
        copy_tensors((target, saved[name]) for name, target in copied.items())
        return {**saved, **copied}


@dataclass
class LoadShardedModel(LoadItem):
    """Loads the weights of a model that is sharded, or whose checkpoint is: each rank reads the parts that it holds."""

    path: str
    model: nn.Module
    format: FileFormat

    def read(self, path: Path, options: dict[str, Any]) -> Any:
        if path.is_dir():
            return state_reader.read_dcp_weights(path)
        state = self.format.read(path, **options) if self.format is TORCH else self.format.read(path)
        return state_reader.wrap_weights(state)

    def check(self, state: Any) -> list[Problem]:
        return reshard.check_weights(self.path, self.model, local_state.model_state(self.model), state)

    def matching(self, state: Any) -> Any:
        return reshard.compatible_weights(local_state.model_state(self.model), state)

    def load(self, state: Any) -> None:
        reshard.load_weights(local_state.model_state(self.model), state)


def load_model(
    folder: Path,
    index: int,
    model: nn.Module,
    *,
    sharded: bool,
    full: bool = False,
    options: dict[str, Any] | None = None,
) -> LoadItem:
    """Creates the item that loads a model from the layout that the checkpoint has.

    Args:
        folder: The checkpoint.
        index: Index of the model.
        model: The module without the container of DistributedDataParallel.
        sharded: Ranks hold shards of it.
        full: Prefer the gathered file over the folder of shards, if there are both.
        options: For ``load_state_dict`` of a whole module.
    """
    whole = [model_file(index, safe=True), model_file(index, safe=False)]
    shards = [full_model_file(index), model_folder(index)][:: 1 if full else -1]
    path = _first_present(folder, [*shards, *whole] if sharded else [*whole, *shards])
    file_format = SAFETENSORS if path == whole[0] else TORCH
    if path in whole and not sharded:
        return LoadModel(path, model, file_format, options or {})
    return LoadShardedModel(path, model, file_format)


def _first_present(folder: Path, paths: Sequence[str]) -> str:
    """Returns the first path that exists; if none does, the first, which is then reported as missing."""
    present = (path for path in paths if (folder / path).is_file() or (folder / path / METADATA_FILE).is_file())
    return next(present, paths[0])


# Load an optimizer ----------------------------------------------------------------------------------------------------


@dataclass
class LoadOptimizer(LoadItem):
    """Loads an optimizer: by parameter numbers from a whole file, by parameter names from a gathered file or shards.

    Attributes:
        models: Models that its parameters belong to.
        sharded: Ranks hold shards of its state.
        keeps_tensors: The optimizer has no state yet, and keeps the tensors of the file.
    """

    path: str
    optimizer: Any
    models: Sequence[nn.Module]
    sharded: bool
    keeps_tensors: bool
    class_name: str

    def read(self, path: Path, options: dict[str, Any]) -> Any:
        if path.is_dir():
            return state_reader.read_dcp_optimizer(path)
        state = TORCH.read(path, **options)
        has_names = False
        if not self.sharded and isinstance(state, dict) and "param_groups" in state:
            has_names = state_reader.wrap_optimizer_state(state).is_named
        return state_reader.wrap_optimizer_state(state) if self.sharded or has_names else state

    def check(self, state: Any) -> list[Problem]:
        if isinstance(state, LazyOptimizerState):
            return reshard.OptimizerTarget(self.path, self.optimizer, self.models).check(state)
        return check_optimizer(self.path, self.optimizer, state)

    def load(self, state: Any) -> None:
        if isinstance(state, LazyOptimizerState):
            reshard.OptimizerTarget(self.path, self.optimizer, self.models).load(state)
        else:
            self.optimizer.load_state_dict(state if self.keeps_tensors else _copy_state(self.optimizer, state))


def load_optimizer(
    folder: Path, index: int, optimizer: Any, models: Sequence[nn.Module], *, sharded: bool, full: bool = False
) -> LoadItem:
    """Creates the item that loads an optimizer; arguments as for `load_model`."""
    layouts = [optimizer_file(index), optimizer_folder(index)]
    path = _first_present(folder, layouts[:: 1 if full or not sharded else -1])
    keeps = not any(optimizer.state.values()) and path == layouts[0] and not sharded
    return LoadOptimizer(path, optimizer, models, sharded, keeps, optimizer_class_name(optimizer))


def check_optimizer(path: str, optimizer: Any, saved: Any) -> list[Problem]:
    """Returns the mismatches between an optimizer and a state by parameter numbers."""
    if text := optimizer_state_error(saved):
        return [Problem(path, "corrupt", text)]
    groups, live_groups = saved["param_groups"], optimizer.param_groups
    sizes, live_sizes = ([len(group["params"]) for group in some] for some in (groups, live_groups))
    if sizes != live_sizes:
        text = f"its groups have {sizes} parameters, and {live_sizes} in {optimizer_class_name(optimizer)}"
        return [Problem(path, "shape", text)]
    if problems := compare_optimizers(path, optimizer, groups, saved["state"].values()):
        return problems
    for key, parameter in _numbered_params(optimizer, saved):
        values = saved["state"].get(key, {})
        for name, value in values.items():
            live = optimizer.state.get(parameter, {}).get(name)
            label = f"{name!r} of parameter {key}"
            problems += [Problem(path, "corrupt", text) for text in type_mismatches(live, value, label)]
            expected = _expected_shape(optimizer, parameter, name)
            is_scalar = isinstance(value, torch.Tensor) and value.numel() == 1
            if (
                isinstance(value, torch.Tensor)
                and expected is not None
                and value.shape != expected
                and not (is_scalar and (name in SCALARS or not has_param_shaped_state(optimizer)))
            ):
                text = f"{label} has shape {list(value.shape)}; expected {list(expected)}"
                problems.append(Problem(path, "shape", text))
    return problems


def _numbered_params(optimizer: Any, saved: dict[str, Any]) -> Iterator[tuple[Any, torch.Tensor]]:
    """Pairs each parameter's key in a saved state with the parameter."""
    keys = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
    return zip(keys, itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups), strict=True)


def _expected_shape(optimizer: Any, parameter: torch.Tensor, name: str) -> torch.Size | None:
    live = optimizer.state.get(parameter, {}).get(name)
    if isinstance(live, torch.Tensor):
        return live.shape
    return parameter.shape if has_param_shaped_state(optimizer) else None


def _copy_state(optimizer: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """Copies a mapped state into the live tensors where they match, so that memory never holds it twice."""
    own: dict[int, torch.Tensor] = {}
    pairs = []
    for key, parameter in _numbered_params(optimizer, saved):
        live, values = optimizer.state.get(parameter, {}), saved["state"].get(key)
        for name, value in values.items() if isinstance(values, dict) else ():
            target = live.get(name)
            if is_dense_cpu(value) and id(value) not in own:
                own[id(value)] = target.detach() if can_copy(target, value) else torch.empty_like(value)
                pairs.append((own[id(value)], value))
            elif isinstance(value, torch.Tensor) and _can_hold(target, value):
                own[id(value)] = target.detach().copy_(value)
    copy_tensors(pairs)
    return {**saved, "state": _clone(saved["state"], own), "param_groups": _clone(saved["param_groups"])}


def _can_hold(live: Any, value: torch.Tensor) -> bool:
    """Returns whether the live tensor can take a value of another device or memory format."""
    alike = isinstance(live, torch.Tensor) and live.shape == value.shape and live.dtype == value.dtype
    return alike and live.is_contiguous() and not live.is_meta


def _clone(tree: Any, own: Mapping[int, torch.Tensor] = MappingProxyType({})) -> Any:
    """Clones the tensors of a tree, except those that `own` maps by identity to a copy."""
    if isinstance(tree, torch.Tensor):
        return own[id(tree)] if id(tree) in own else tree.clone()
    if isinstance(tree, dict):
        return {key: _clone(value, own) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_clone(value, own) for value in tree)
    return tree


# Load other objects ---------------------------------------------------------------------------------------------------


@dataclass
class LoadObject(LoadItem):
    """Loads an object that the user registered."""

    path: str
    object: Any
    hint: str = ""
    revertible = True

    def backup(self) -> Any:
        return self.object.state_dict()

    def load(self, state: Any) -> None:
        self.object.load_state_dict(_clone(state))


class LoadScheduler(LoadObject):
    """Loads a learning rate scheduler."""

    def check(self, state: Any) -> list[Problem]:
        if not isinstance(state, dict):
            return [Problem(self.path, "corrupt", f"expected a scheduler's state, found {type(state).__name__}")]
        live, name = self.object.state_dict(), type(self.object).__name__
        own = {key for key in live if not key.startswith("_")}
        saved = {key for key in state if not str(key).startswith("_")}
        # Releases of torch add and remove keys; only a state that both lacks and adds some is of another class.
        if own - saved and saved - own:
            return [class_mismatch(self.path, "scheduler", name, own - saved, saved - own)]
        return [Problem(self.path, "corrupt", text) for text in type_mismatches(live, state, name)]


class LoadScaler(LoadObject):
    """Loads the gradient scaler."""

    def check(self, state: Any) -> list[Problem]:
        live = self.object.state_dict()
        if not isinstance(state, dict):
            return [Problem(SCALER_NAME, "corrupt", f"expected a scaler's state, found {type(state).__name__}")]
        lost = [Problem(SCALER_NAME, "missing", f"no {key!r}") for key in sorted(live.keys() - state.keys())]
        return lost or [Problem(SCALER_NAME, "corrupt", text) for text in type_mismatches(live, state, "the scaler")]


def scheduler_file(index: int) -> str:
    """Returns the file of a scheduler."""
    return indexed_name(SCHEDULER_NAME, index, ".bin")


def load_registered(index: int, registered: Any) -> LoadItem:
    """Creates the item that loads a registered object."""
    name = type(registered).__name__
    hint = (
        f" It belongs to a registered {name}. Checkpoints are read without running code. If its state_dict holds "
        "objects of classes that you trust, allow these before loading: `torch.serialization.add_safe_globals([...])`; "
        "or let it return plain data and tensors."
    )
    return LoadObject(custom_file(index), registered, hint)
