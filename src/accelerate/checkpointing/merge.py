"""Merges sharded weights to files for other programs: `merge_fsdp_weights`.

Tensors are copied one at a time (with pickled output, one file at a time).
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..runtime import world
from ..settings.enums import FSDP_MODEL_NAME
from .consensus import check_called_by_all_ranks, checkpoint_group, run_on_all_ranks
from .errors import LoadError, SaveError, bullet_list
from .model_files import atomic_write, shard_file_names, size_in_bytes, split, write_shard_index
from .sharded.dcp_reader import DCPReader
from .storage import manifest as manifests
from .storage.formats import write_safetensors, write_torch

_MODEL = "model"


def merge_fsdp_weights(
    checkpoint_dir: str,
    output_path: str,
    safe_serialization: bool = True,
    remove_checkpoint_dir: bool = False,
    max_shard_size: int | str = "10GB",
) -> None:
    """Merges the weights that several processes saved in shards (``SHARDED_STATE_DICT``).

    Every process of a run may call it: the main one merges, the others wait.

    Args:
        checkpoint_dir: The folder of shards, such as ``pytorch_model_fsdp_0`` in a checkpoint.
        output_path: Folder for the merged weights, made if it is not there: ``model.safetensors``, or several files with an
            index. Weights that an earlier call left there are replaced.
        safe_serialization: As safetensors; else as `torch.save` does (``pytorch_model.bin``).
        remove_checkpoint_dir: Remove `checkpoint_dir` when the merged weights are on disk.
        max_shard_size: Largest size of an output file.

    Raises:
        LoadError: when the folder holds no sharded model, or files of it are missing or damaged. Nothing is written then.
        SaveError: when the merged weights cannot be written, and when the folders contradict each other.

    Example:
        ```py
        merge_fsdp_weights("checkpoint_3/pytorch_model_fsdp_0", "merged")
        ```
    """
    source, target = Path(checkpoint_dir), Path(output_path)
    here = world.current()

    def act() -> None:
        if here.rank == 0:
            _merge(source, target, safe_serialization, remove_checkpoint_dir, size_in_bytes(max_shard_size))

    if here.size == 1:
        act()
        return
    if here.debug:
        check_called_by_all_ranks(here.collectives, "merge_fsdp_weights")
    run_on_all_ranks(checkpoint_group(here.collectives, SaveError), f"merging {source}", act, SaveError)


def _merge(source: Path, target: Path, safe: bool, remove: bool, limit: int) -> None:
    if target.is_file():
        raise SaveError(f"{target} is a file; the merged weights go into a folder.")
    if remove and (source.resolve() == target.resolve() or source.resolve() in target.resolve().parents):
        raise SaveError(f"{target} lies in {source}, which is to be removed: name another output folder, or keep it.")
    reader = DCPReader(source)
    weights = Weights(reader)
    if safe and weights.extra:
        raise SaveError(
            f"{source} holds more than safetensors files can: {', '.join(sorted(weights.extra)[:5])}. Write with "
            "safe_serialization=False (--unsafe_serialization)."
        )
    _verify(source)
    reader.verify()
    _write(weights, target, safe, limit)
    if remove:
        shutil.rmtree(source)


def _write(weights: Weights, target: Path, safe: bool, limit: int) -> None:
    described = weights.described()
    groups = split(described, limit) or [[]]
    names = shard_file_names(len(groups), safe)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, group in zip(names, groups, strict=True):
            if safe:
                part = {key: described[key] for key in group}
                atomic_write(target / name, functools.partial(write_safetensors, part, values=weights))
            else:
                extra = weights.read_extra() if name == names[-1] else {}
                atomic_write(target / name, functools.partial(write_torch, {**{k: weights[k] for k in group}, **extra}))
        write_shard_index(target, dict(zip(names, groups, strict=True)), described, safe)
    except OSError as error:
        raise SaveError(f"the merged weights cannot be written to {target}: {error}") from error


def _verify(source: Path) -> None:
    """Compares the shards with the manifest of their checkpoint, if there is one."""
    try:
        manifest = manifests.read(source.resolve().parent)
    except (OSError, ValueError):
        return
    inside = f"{source.resolve().name}/"
    problems = manifests.verify(source.resolve().parent, manifest, only=lambda path: path.startswith(inside))
    if problems:
        raise LoadError(f"{source} is damaged:\n{bullet_list(problems)}", problems)


class Weights(Mapping[str, torch.Tensor]):
    """The tensors of a model in a folder of shards, by the names they have in its state; each is read when asked for.

    Attributes:
        extra: Other entries of its state (``_extra_state`` of modules), with their paths.

    Raises:
        LoadError: when the folder holds something else than a model.
    """

    def __init__(self, reader: DCPReader) -> None:
        self._reader = reader
        of_model = {entry.path[1:]: name for name, entry in reader.entries.items() if entry.path[0] == _MODEL}
        found = {path: name for path, name in of_model.items() if path}
        if not found:  # a state that was saved without a name around it
            found = {entry.path: name for name, entry in reader.entries.items()}
        self._names = {path[0]: name for path, name in found.items() if len(path) == 1 and self._is_tensor(name)}
        self.extra = {name: path for path, name in found.items() if path[0] not in self._names}
        if not self._names:
            what = ", ".join(sorted({entry.path[0] for entry in reader.entries.values()})[:5])
            raise LoadError(
                f"{reader.folder} does not hold the weights of a model, but {what or 'nothing'}. They are in the folders "
                f"{FSDP_MODEL_NAME}_0, {FSDP_MODEL_NAME}_1 … of a checkpoint."
            )

    def _is_tensor(self, name: str) -> bool:
        return self._reader.entries[name].dtype is not None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._reader.read_tensor(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def described(self) -> dict[str, torch.Tensor]:
        """Returns the tensors without values, on the meta device."""
        entries = {name: self._reader.entries[key] for name, key in self._names.items()}
        return {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}

    def read_extra(self) -> dict[str, Any]:
        """Reads the entries that are not tensors, in their nested dictionaries."""
        state: dict[str, Any] = {}
        for name, path in self.extra.items():
            inner = state
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = self._reader.read_tensor(name) if self._is_tensor(name) else self._reader.read_value(name)
        return state
