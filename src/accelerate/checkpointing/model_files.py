"""Weights in files for other programs: `save_model`, `save` and `load`."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..offload.hooks import fill_offloaded
from ..runtime import world
from ..runtime.helpers import convert_file_size_to_int as size_in_bytes
from ..runtime.tensors.forward import extract_model_from_parallel
from ..settings.enums import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_PATTERN_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    WEIGHTS_PATTERN_NAME,
)
from .storage.file_writer import FileWriter, sync_folder, write_file
from .storage.filenames import is_url
from .storage.formats import (
    drop_shared_tensors,
    read_safetensors,
    read_torch,
    shared_tensor_names,
    write_safetensors,
    write_torch,
)
from .storage.remote import open_url

logger = logging.getLogger(__name__)  # works before a process has a rank


def clean_state_dict_for_safetensors(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Converts a state to one that the safetensors format can hold: each tensor once, contiguous, in memory of its own.

    Args:
        state_dict: A model's state. Tied weights are kept under their first name; loading into a model that ties them
            restores all.

    Returns:
        A new dictionary.
    """
    kept = drop_shared_tensors(state_dict)
    dropped = sorted(state_dict.keys() - kept.keys())
    if dropped:
        logger.warning("tied weights are saved once; left out are the names %s.", dropped)
    clean: dict[str, Any] = {}
    storages: set[int] = set()
    for name, value in kept.items():
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta:
            value = value.contiguous()
            storage = value.untyped_storage().data_ptr()
            if storage in storages and value.numel():  # a view of another name's tensor
                value = value.clone()
            storages.add(storage)
        clean[name] = value
    return clean


# One object ---------------------------------------------------------------------------------------------------------


def save(obj: Any, f: Any, save_on_each_node: bool = False, safe_serialization: bool = False) -> None:
    """Saves an object on the main process, or on the first of each machine. Other processes do nothing.

    An existing file is replaced only after the new one is complete and synced to disk.

    Args:
        obj: The object.
        f: A path, a URL, or a file opened for writing in binary mode.
        save_on_each_node: The first process of each machine saves.
        safe_serialization: Save `obj`, a dictionary of tensors, as safetensors. Otherwise use `torch.save`'s format.
    """
    here = world.current()
    if here.rank != 0 and not (save_on_each_node and here.local_rank == 0):
        return
    if safe_serialization:
        obj = clean_state_dict_for_safetensors(obj)
    if not isinstance(f, (str, os.PathLike)):
        _save_to_file(obj, f, safe_serialization)
        return
    if is_url(f):
        with open_url(str(f)) as file:
            _save_to_file(obj, file, safe_serialization)
        return
    write = write_safetensors if safe_serialization else write_torch
    atomic_write(Path(f), lambda writer: write(obj, writer))


def _save_to_file(obj: Any, file: Any, safe: bool) -> None:
    if safe:
        write_safetensors(obj, file)
    else:
        torch.save(obj, file)


def atomic_write(path: Path, write: Callable[[FileWriter], None]) -> None:
    """Writes a temporary file, syncs it to disk, and renames it to `path`."""
    unfinished = path.with_name(path.name + ".incomplete")
    unfinished.unlink(missing_ok=True)
    try:
        write_file(unfinished, path.name, write)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def load(f: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """Loads a file of `save`, `torch.save` or safetensors, without running code from it.

    Args:
        f: A path or an open file. A path that ends in ``.safetensors`` is read as that.
        map_location: Where tensors go, as in `torch.load`.
        **kwargs: For `torch.load`. ``weights_only`` cannot be turned off: allow types with
            `torch.serialization.add_safe_globals`.
    """
    if isinstance(f, (str, os.PathLike)):
        if str(f).endswith(".safetensors"):
            tensors = read_safetensors(Path(f))
            target = map_location if isinstance(map_location, (str, torch.device)) else "cpu"
            return {name: tensor.to(target, copy=True) for name, tensor in tensors.items()}
        kwargs = {"mmap": False, **kwargs}
        return read_torch(Path(f), map_location=map_location, **kwargs)
    kwargs.pop("weights_only", None)
    return torch.load(f, map_location=map_location, weights_only=True, **kwargs)


# A model, in pieces ---------------------------------------------------------------------------------------------------


def split(state: Mapping[str, torch.Tensor], limit: int) -> list[list[str]]:
    """Groups names by at most `limit` bytes. A larger tensor is a group of its own; tied ones stay together."""
    tied = {name: names for names in shared_tensor_names(state) for name in names}
    groups: list[list[str]] = []
    open_group: list[str] = []
    room = limit
    for name, tensor in state.items():
        unit = tied.get(name, [name])
        if unit[0] != name:
            continue
        size = tensor.numel() * tensor.element_size()
        if size > limit:
            groups.append(unit)
            continue
        if size > room:
            groups.append(open_group)
            open_group, room = [], limit
        open_group = [*open_group, *unit]
        room -= size
    return [*groups, open_group] if open_group else groups


def save_model(
    model: nn.Module, state: dict[str, Any], folder: Path, max_shard_size: int | str = "10GB", safe: bool = True
) -> list[str]:
    """Writes a model's weights: in one file, or in several of at most `max_shard_size` with an index.

    Args:
        model: Named in messages.
        state: Its full state.
        folder: The folder, created if needed. Files of an earlier call that are not replaced are removed.
        max_shard_size: Largest size of a file.
        safe: Write safetensors, otherwise `torch.save`'s format.

    Returns:
        The names of the files.

    Raises:
        RuntimeError: if a tensor is on the meta device and has no values.
    """
    state = fill_offloaded(extract_model_from_parallel(model), state)
    empty = [name for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta]
    if empty:
        raise RuntimeError(
            f"{type(model).__name__} cannot be saved: {len(empty)} of its tensors have no values (device meta), such as "
            f"{empty[0]!r}. Load its weights first."
        )
    state = clean_state_dict_for_safetensors(state) if safe else state
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    groups = split(tensors, size_in_bytes(max_shard_size)) or [[]]
    names = shard_file_names(len(groups), safe)
    contents = {name: {key: tensors[key] for key in group} for name, group in zip(names, groups, strict=True)}
    rest = {key: value for key, value in state.items() if key not in tensors}
    contents[names[-1]].update(rest)
    folder.mkdir(parents=True, exist_ok=True)
    write = write_safetensors if safe else write_torch
    for name, content in contents.items():
        atomic_write(folder / name, functools.partial(write, content))
    write_shard_index(folder, contents, tensors, safe)
    return names


def shard_file_names(count: int, safe: bool) -> list[str]:
    """Returns the names of the files of a model's weights in `count` shards."""
    if count < 2:
        return [SAFE_WEIGHTS_NAME if safe else WEIGHTS_NAME]
    pattern = SAFE_WEIGHTS_PATTERN_NAME if safe else WEIGHTS_PATTERN_NAME
    return [pattern.format(suffix=f"-{number:05d}-of-{count:05d}") for number in range(1, count + 1)]


def write_shard_index(
    folder: Path, pieces: Mapping[str, Iterable[str]], tensors: Mapping[str, torch.Tensor], safe: bool
) -> None:
    """Writes the index of several shards, after the shards themselves, and removes the files of an earlier call.

    Args:
        folder: The folder of the shards.
        pieces: Names of the tensors in each file.
        tensors: The tensors, with or without values.
        safe: Whether the files are safetensors.
    """
    index_name = SAFE_WEIGHTS_INDEX_NAME if safe else WEIGHTS_INDEX_NAME
    if len(pieces) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in drop_shared_tensors(tensors).values())
        places = {name: file for file, names in pieces.items() for name in names}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True) + "\n"
        atomic_write(folder / index_name, lambda writer: _write_text(writer, text))
    pattern = SAFE_WEIGHTS_PATTERN_NAME if safe else WEIGHTS_PATTERN_NAME
    stale = re.compile(re.escape(pattern).replace(re.escape("{suffix}"), r"(-\d{5}-of-\d{5})?"))
    for path in folder.iterdir():
        if path.name not in pieces and (stale.fullmatch(path.name) or (path.name == index_name and len(pieces) == 1)):
            path.unlink()


def _write_text(writer: FileWriter, text: str) -> None:
    writer.write(text.encode())
