"""Weights on disk: written to one file each, or read from the safetensors files of a checkpoint.

Files are mapped (copy-on-write), so reading makes no copy. Weights looked up by name stay mapped; those read for one
forward (`read_weights`) are unmapped with their last tensor.
"""

from __future__ import annotations

import functools
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..runtime.system.file_names import file_size, path_for_write, path_inside, read_json, replace_file, short_repr
from .io.direct_io import BufferPool
from .io.mmap_reader import MmapWindowCache, ReadInterruptedError, Span, Stop, never
from .io.safetensors_file import SafetensorsFile
from .io.tensor_reader import CachedFile, TensorRead
from .sizes import is_shape
from .tensors import set_module_tensor_to_device

Folder = str | os.PathLike[str]
Index = MutableMapping[str, Any]

INDEX_NAME = "index.json"


# Writing --------------------------------------------------------------------------------------------------------------


def offload_weight(weight: torch.Tensor, weight_name: str, offload_folder: Folder, index: Index | None = None) -> Any:
    """Writes one tensor to ``<folder>/<name>.dat`` and records its dtype and shape.

    Args:
        weight: The tensor.
        weight_name: Its name.
        offload_folder: An existing folder.
        index: Mapping that receives dtype and shape; may be None.

    Returns:
        `index`.

    Raises:
        ValueError: if the name leads out of the folder; nothing is written then.
    """
    path = path_for_write(Path(offload_folder), f"{weight_name}.dat")
    values = weight.detach().cpu().contiguous()
    data: Any = values.reshape(-1).view(torch.uint8).numpy() if values.numel() else b""
    replace_file(path, data)
    if index is not None:
        index[weight_name] = {"dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape)}
    return index


def save_offload_index(index: Mapping[str, Any] | None, offload_folder: Folder) -> None:
    """Merges entries into ``<folder>/index.json``; does nothing without any.

    Raises:
        ValueError: if the existing index is damaged, or a name leads out of the folder; nothing is written then.
    """
    if not index:
        return
    path = Path(offload_folder) / INDEX_NAME
    known = {} if file_size(path) is None else read_offload_index(offload_folder)
    _check_index(path, index)
    replace_file(path, json.dumps({**known, **index}, indent=2).encode())


def read_offload_index(offload_folder: Folder) -> dict[str, Any]:
    """Reads the index written by `save_offload_index`.

    Raises:
        ValueError: if it is damaged, or a name in it leads out of the folder.
    """
    path = Path(offload_folder) / INDEX_NAME
    try:
        found: dict[str, Any] = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not an index of offloaded weights: {error}") from error
    _check_index(path, found)
    return found


def _check_index(path: Path, index: Any) -> None:
    """Raises ValueError if an entry does not have the format of `offload_weight` or of safetensors entries."""
    if not isinstance(index, Mapping):
        raise ValueError(
            f"{path} is not an index of offloaded weights: expected entries by name, found {short_repr(index)}"
        )
    for name, info in index.items():
        if not isinstance(info, Mapping):
            raise ValueError(
                f"{path} is not an index of offloaded weights: its entry of {short_repr(name)} is {short_repr(info)}"
            )
        file = info.get("safetensors_file")
        if file is None:
            path_inside(path.parent, _file_of(name, info))
            _index_entry(name, info)
        elif not isinstance(file, str) or not isinstance(info.get("weight_name", name), str):
            raise ValueError(
                f"{path} is not an index of offloaded weights: its entry of {short_repr(name)} is {short_repr(info)}"
            )


def _file_of(name: str, info: Mapping[str, Any]) -> str:
    """Returns the name of the ``.dat`` file of a weight."""
    return f"{info.get('weight_name', name)}.dat"


def _index_entry(name: object, info: Mapping[str, Any]) -> tuple[torch.dtype, tuple[int, ...]]:
    """Returns the dtype and shape of an index entry.

    Raises:
        ValueError: if they are invalid.
    """
    dtype, shape = _dtype(info.get("dtype")), info.get("shape")
    if dtype is None or not isinstance(shape, (list, tuple)) or not is_shape(shape):
        raise ValueError(
            f"the entry of {short_repr(name)} is {short_repr(dict(info))}; expected the 'dtype' and 'shape' of a tensor"
        )
    return dtype, tuple(shape)


def offload_state_dict(save_dir: Folder, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Writes all tensors of a state dict to a folder, with an index.

    Args:
        save_dir: The folder; created if it does not exist.
        state_dict: The tensors.
    """
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {}
    for name, tensor in state_dict.items():
        offload_weight(tensor, name, save_dir, index)
    save_offload_index(index, save_dir)


# Reading --------------------------------------------------------------------------------------------------------------


def load_offloaded_weight(weight_file: Folder, weight_info: Mapping[str, Any]) -> torch.Tensor:
    """Maps the tensor in a ``.dat`` file.

    Args:
        weight_file: The file.
        weight_info: Its index entry: ``dtype`` and ``shape``.

    Raises:
        RuntimeError: if the file does not exist or is shorter than its entry requires.
        ValueError: if it is not a regular file, or the entry is invalid.
    """
    dtype, shape = _index_entry(weight_file, weight_info)
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    file_size(Path(weight_file))
    return torch.from_file(str(weight_file), shared=False, size=count, dtype=dtype).reshape(shape)


def load_offloaded_weights(model: nn.Module, index: Mapping[str, Any] | None, offload_folder: Folder) -> None:
    """Loads the weights listed in an index into a model, on the CPU.

    Args:
        model: The model.
        index: Entries in the format of `offload_weight`; None or empty: does nothing.
        offload_folder: Folder of the files.
    """
    if not index:
        return
    weights = OffloadedWeightsLoader(save_folder=offload_folder, index=index)
    for name in index:
        set_module_tensor_to_device(model, name, "cpu", value=weights[name])


class PrefixedDataset(Mapping[str, Any]):
    """View of the entries of a mapping whose keys start with a prefix, without the prefix.

    Args:
        dataset: The mapping.
        prefix: The prefix, with its trailing dot.
    """

    def __init__(self, dataset: Mapping[str, Any], prefix: str) -> None:
        self.dataset = dataset
        self.prefix = prefix

    def __getitem__(self, key: str) -> Any:
        return self.dataset[f"{self.prefix}{key}"]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self.prefix) for key in self.dataset if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class OffloadedWeightsLoader(Mapping[str, torch.Tensor]):
    """Maps names to weights in memory and on disk; those on disk are mapped on access.

    Args:
        state_dict: Weights in memory.
        save_folder: Folder with ``.dat`` files and an index.
        index: The index; None: that of the folder. An entry may name the stored tensor in ``weight_name``. One with a
            ``safetensors_file`` is read from that file, and converted to ``dtype`` if it has one.
        device: Device for weights from safetensors files; None: they stay mapped on the CPU.

    Raises:
        ValueError: without any of the first three.
    """

    def __init__(
        self,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_folder: Folder | None = None,
        index: Mapping[str, Any] | None = None,
        device: Any = None,
    ) -> None:
        if state_dict is None and save_folder is None and index is None:
            raise ValueError("OffloadedWeightsLoader needs a state_dict, a save_folder or an index to read from.")
        self.state_dict = {} if state_dict is None else state_dict
        self.save_folder = save_folder
        self.index = read_offload_index(save_folder) if index is None and save_folder is not None else (index or {})
        self.all_keys = [*self.state_dict, *(name for name in self.index if name not in self.state_dict)]
        self.device = device
        self._close()

    def _close(self) -> None:
        """Drops all open files."""
        self._buffers, self._windows = BufferPool(), MmapWindowCache()
        self._files: dict[str, tuple[SafetensorsFile, CachedFile, dict[str, Span]]] = {}
        self._plans: dict[tuple[str, ...], _Plan] = {}
        self._slow: deque[TensorRead] = deque()
        self._size = 0  # bytes of all files with weights

    def __getitem__(self, key: str) -> torch.Tensor:
        if key in self.state_dict:
            return self.state_dict[key]
        info = self.index[key]
        if info.get("safetensors_file") is not None:
            return self._from_safetensors(info["safetensors_file"], info.get("weight_name", key), info.get("dtype"))
        if self.save_folder is None:
            raise KeyError(f"{key} is in a .dat file: pass the save_folder that contains it.")
        return load_offloaded_weight(path_inside(Path(self.save_folder), _file_of(key, info)), info)

    def _from_safetensors(self, file: str, name: str, dtype: str | None) -> torch.Tensor:
        tensor = self._file(file)[0][name]
        return tensor.to(device=self.device, dtype=_dtype(dtype))

    def read(self, keys: Iterable[str], stop: Stop = never) -> dict[str, torch.Tensor]:
        """Reads several weights for one forward, as mappings or buffers that are released with their last tensor.

        Args:
            keys: Names of the weights.
            stop: Checked between chunks; returns true to interrupt.

        Raises:
            KeyError: for an unknown name.
            RuntimeError: if a file was truncated, or is no longer readable.
        """
        plan = self._plan(tuple(keys))
        found = {key: self[key] for key in plan.elsewhere}
        for reading, parts in plan.readings:
            for (key, dtype), value in zip(parts, reading.read(stop), strict=True):
                as_is = self.device is None and dtype is None
                found[key] = value if as_is else value.to(device=self.device, dtype=dtype)
        return found

    def is_resident(self, keys: Iterable[str]) -> bool:
        """Returns whether reading some weights takes negligible time."""
        try:
            return all(reading.is_resident() for reading, _ in self._plan(tuple(keys)).readings)
        except (KeyError, OSError, ValueError):
            return False  # `read` raises the error when the weights are needed

    @property
    def slow(self) -> bool:
        """Whether `remap_huge_pages` has something to do."""
        return bool(self._slow)

    def remap_huge_pages(self, stop: Stop) -> None:
        """Remaps, in huge pages, the files that proved slow to map.

        Args:
            stop: Checked between chunks; returns true to postpone the rest.
        """
        for _ in range(len(self._slow)):
            reading = self._slow.popleft()
            try:
                again = reading.remap_huge_pages(stop)
            except ReadInterruptedError:
                self._slow.appendleft(reading)
                return
            if again:
                self._slow.append(reading)

    def _plan(self, keys: tuple[str, ...]) -> _Plan:
        """Returns the cached read plan of some weights; rebuilt if the source of one has changed."""
        sources = [self.source(key) for key in keys]
        plan = self._plans.get(keys)
        if plan is None or any(one is not other for one, other in zip(plan.sources, sources, strict=True)):
            plan = self._plans[keys] = self._planned(keys, sources)
        return plan

    def _planned(self, keys: tuple[str, ...], sources: list[object]) -> _Plan:
        elsewhere: list[str] = []
        in_files: dict[Path, list[tuple[str, Span, torch.dtype | None]]] = {}
        for key in keys:
            place = self._place(key)
            if place is None:
                elsewhere.append(key)
            else:
                in_files.setdefault(place[0], []).append((key, *place[1:]))
        readings = []
        for path, entries in in_files.items():
            spans = [span for _, span, _ in entries]
            kept = self._files.get(os.fspath(path))
            # A .dat file has a single weight and is opened for each read.
            single = functools.partial(CachedFile, path, self._buffers, self._windows)
            opened = single if kept is None else functools.partial(_same, kept[1])
            reading = TensorRead(spans, opened, self._has_free_memory, self._slow.append, keep=kept is not None)
            readings.append((reading, [(key, dtype) for key, _, dtype in entries]))
        return _Plan(sources, elsewhere, readings)

    def _place(self, key: str) -> tuple[Path, Span, torch.dtype | None] | None:
        """Returns the file of a weight, its span and the dtype to convert it to; None if it is not read from a file here."""
        if key in self.state_dict:
            return None
        info = self.index[key]
        name = info.get("safetensors_file")
        if name is not None:
            span = self._file(name)[2].get(info.get("weight_name", key))
            return None if span is None else (Path(name), span, _dtype(info.get("dtype")))
        if self.save_folder is None:
            return None
        dtype, shape = _index_entry(key, info)
        whole = Span(0, torch.Size(shape).numel() * dtype.itemsize, dtype, shape)
        self._size += whole.stop
        return path_inside(Path(self.save_folder), _file_of(key, info)), whole, None

    def _has_free_memory(self) -> bool:
        """Returns whether free memory is at least twice the size of all weights in files."""
        import psutil

        return bool(psutil.virtual_memory().available > 2 * self._size)

    def _file(self, name: str) -> tuple[SafetensorsFile, CachedFile, dict[str, Span]]:
        """Opens a safetensors file, once; returns it with the spans of its tensors."""
        if name not in self._files:
            tensors = SafetensorsFile(Path(name))
            file = CachedFile(name, self._buffers, self._windows)
            self._files[name] = tensors, file, tensors.spans()
            self._size += file.size
        return self._files[name]

    def source(self, key: str) -> object:
        """Returns the object that a weight comes from, which changes with its source; None for an unknown name."""
        return self.state_dict[key] if key in self.state_dict else self.index.get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.all_keys)

    def __len__(self) -> int:
        return len(self.all_keys)

    def __getstate__(self) -> dict[str, Any]:
        # Open files belong to the process.
        return {name: value for name, value in self.__dict__.items() if name not in _OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._close()


def _same(file: CachedFile) -> CachedFile:
    return file


_OF_A_PROCESS = ("_buffers", "_windows", "_files", "_plans", "_slow", "_size")


class _Plan(NamedTuple):
    """How some weights are read.

    Attributes:
        sources: Their sources.
        elsewhere: Weights that are not read from a file here.
        readings: Groups of weights read together, each weight with the dtype to convert it to.
    """

    sources: list[object]
    elsewhere: list[str]
    readings: list[tuple[TensorRead, list[tuple[str, torch.dtype | None]]]]


def _dtype(name: Any) -> torch.dtype | None:
    if name is None:
        return None
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{short_repr(name)} is not a torch dtype")
    return found


def read_weights(weights: Mapping[str, Any], names: Sequence[str], stop: Stop = never) -> dict[str, torch.Tensor]:
    """Reads several weights of a mapping for one forward; see `OffloadedWeightsLoader.read`."""
    source, prefix = _behind(weights)
    if not isinstance(source, OffloadedWeightsLoader):
        return {name: source[prefix + name] for name in names}
    keys = [prefix + name for name in names]
    found = source.read(keys, stop)
    return {name: found[key] for name, key in zip(names, keys, strict=True)}


def are_resident(weights: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Returns whether reading some weights of a mapping takes negligible time."""
    source, prefix = _behind(weights)
    return not isinstance(source, OffloadedWeightsLoader) or source.is_resident([prefix + name for name in names])


def sources_of(weights: Mapping[str, Any], names: Iterable[str]) -> list[object] | None:
    """Returns objects that compare equal until a weight changes; None: the weights cannot be read on another thread.

    None stands for custom mappings, whose item access may not be thread-safe.
    """
    source, prefix = _behind(weights)
    if isinstance(source, OffloadedWeightsLoader):
        found = [source.source(prefix + name) for name in names]
    elif isinstance(source, dict):
        found = [source.get(prefix + name) for name in names]
    else:
        return None
    return [_TensorVersion(value) if isinstance(value, torch.Tensor) else _ObjectIdentity(value) for value in found]


class _ObjectIdentity:
    """Compares equal to another reference to the same object."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._value is other._value


class _TensorVersion(_ObjectIdentity):
    """Compares equal to another reference to the same tensor if neither was written to in between."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__(value)
        self._version = 0 if value.is_inference() else value._version

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and isinstance(other, _TensorVersion) and self._version == other._version


def loader_behind(weights: Mapping[str, Any] | None) -> OffloadedWeightsLoader | None:
    """Returns the loader that reads the weights of a mapping; None for other mappings."""
    source = None if weights is None else _behind(weights)[0]
    return source if isinstance(source, OffloadedWeightsLoader) else None


def _behind(weights: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Unwraps prefixed views; returns the underlying mapping and the prefix."""
    prefix = ""
    while type(weights) is PrefixedDataset:
        prefix = weights.prefix + prefix
        weights = weights.dataset
    return weights, prefix


def extract_submodules_state_dict(
    state_dict: Mapping[str, torch.Tensor], submodule_names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Selects the entries of a state dict that belong to some modules or are named themselves.

    Args:
        state_dict: The whole state dict.
        submodule_names: Names of modules or tensors.
    """
    names = list(submodule_names)
    return {
        key: value
        for key, value in state_dict.items()
        if any(not name or key == name or key.startswith(f"{name}.") for name in names)
    }
