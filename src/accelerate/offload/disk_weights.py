"""Weights on disk: written one file each, or read in place from the safetensors files they came in.

Reading maps the file into memory: no copy is made until somebody writes. What is asked for by name stays mapped; what is
read for one forward (`read_weights`) is let go with its last tensor.
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
    """Writes one tensor to ``<folder>/<name>.dat`` and notes its dtype and shape.

    Args:
        weight: The tensor.
        weight_name: Its name.
        offload_folder: Where; the folder must be there.
        index: Where dtype and shape are noted; None: nowhere.

    Returns:
        `index`.

    Raises:
        ValueError: for a name that leads out of the folder; nothing is written then.
    """
    path = path_for_write(Path(offload_folder), f"{weight_name}.dat")
    values = weight.detach().cpu().contiguous()
    data: Any = values.reshape(-1).view(torch.uint8).numpy() if values.numel() else b""
    replace_file(path, data)
    if index is not None:
        index[weight_name] = {"dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape)}
    return index


def save_offload_index(index: Mapping[str, Any] | None, offload_folder: Folder) -> None:
    """Adds entries to ``<folder>/index.json``; with none, does nothing.

    Raises:
        ValueError: when the index that is there is damaged, or a name leads out of the folder; nothing is written then.
    """
    if not index:
        return
    path = Path(offload_folder) / INDEX_NAME
    known = {} if file_size(path) is None else read_offload_index(offload_folder)
    _check_index(path, index)
    replace_file(path, json.dumps({**known, **index}, indent=2).encode())


def read_offload_index(offload_folder: Folder) -> dict[str, Any]:
    """Reads what `save_offload_index` wrote.

    Raises:
        ValueError: when it is damaged, or a name in it leads out of the folder.
    """
    path = Path(offload_folder) / INDEX_NAME
    try:
        found: dict[str, Any] = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is no index of offloaded weights: {error}") from error
    _check_index(path, found)
    return found


def _check_index(path: Path, index: Any) -> None:
    """Raises ValueError for an index whose entries are not such as `offload_weight` and others make them."""
    if not isinstance(index, Mapping):
        raise ValueError(
            f"{path} is no index of offloaded weights: expected entries by name, found {short_repr(index)}"
        )
    for name, info in index.items():
        if not isinstance(info, Mapping):
            raise ValueError(
                f"{path} is no index of offloaded weights: its entry of {short_repr(name)} is {short_repr(info)}"
            )
        file = info.get("safetensors_file")
        if file is None:
            path_inside(path.parent, _file_of(name, info))
            _index_entry(name, info)
        elif not isinstance(file, str) or not isinstance(info.get("weight_name", name), str):
            raise ValueError(
                f"{path} is no index of offloaded weights: its entry of {short_repr(name)} is {short_repr(info)}"
            )


def _file_of(name: str, info: Mapping[str, Any]) -> str:
    """The file that holds a weight by itself, as a name in the folder."""
    return f"{info.get('weight_name', name)}.dat"


def _index_entry(name: object, info: Mapping[str, Any]) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype and the shape in an entry of an index.

    Raises:
        ValueError: where these are none.
    """
    dtype, shape = _dtype(info.get("dtype")), info.get("shape")
    if dtype is None or not isinstance(shape, (list, tuple)) or not is_shape(shape):
        raise ValueError(
            f"the entry of {short_repr(name)} is {short_repr(dict(info))}; expected the 'dtype' and 'shape' of a tensor"
        )
    return dtype, tuple(shape)


def offload_state_dict(save_dir: Folder, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Writes every tensor of a state to a folder, with an index.

    Args:
        save_dir: The folder; made if it is not there.
        state_dict: The tensors.
    """
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {}
    for name, tensor in state_dict.items():
        offload_weight(tensor, name, save_dir, index)
    save_offload_index(index, save_dir)


# Reading --------------------------------------------------------------------------------------------------------------


def load_offloaded_weight(weight_file: Folder, weight_info: Mapping[str, Any]) -> torch.Tensor:
    """The tensor in a ``.dat`` file, over a memory map.

    Args:
        weight_file: The file.
        weight_info: Its entry in the index: ``dtype`` and ``shape``.

    Raises:
        RuntimeError: when the file is not there or shorter than the entry says.
        ValueError: when it is no regular file, or the entry describes no tensor.
    """
    dtype, shape = _index_entry(weight_file, weight_info)
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    file_size(Path(weight_file))
    return torch.from_file(str(weight_file), shared=False, size=count, dtype=dtype).reshape(shape)


def load_offloaded_weights(model: nn.Module, index: Mapping[str, Any] | None, offload_folder: Folder) -> None:
    """Gives a model the weights that an index lists, on the CPU.

    Args:
        model: The model.
        index: Entries as `offload_weight` makes them; with none, nothing is done.
        offload_folder: Where the files are.
    """
    if not index:
        return
    weights = OffloadedWeightsLoader(save_folder=offload_folder, index=index)
    for name in index:
        set_module_tensor_to_device(model, name, "cpu", value=weights[name])


class PrefixedDataset(Mapping[str, Any]):
    """The part of a mapping whose keys begin with a prefix, seen without it.

    Args:
        dataset: The whole mapping.
        prefix: The prefix, with its dot.
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
    """Weights in memory and on disk under one roof; those on disk are mapped when they are asked for.

    Args:
        state_dict: Weights in memory.
        save_folder: A folder with ``.dat`` files and an index.
        index: The index; None: the folder's. An entry may say under which ``weight_name`` a weight is kept. One with a
            ``safetensors_file`` is read there, and converted to ``dtype`` if it has that.
        device: Where weights from safetensors files go; None: they stay mapped on the CPU.

    Raises:
        ValueError: without any of the three.
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
        """Begins without open files."""
        self._buffers, self._windows = BufferPool(), MmapWindowCache()
        self._files: dict[str, tuple[SafetensorsFile, CachedFile, dict[str, Span]]] = {}
        self._plans: dict[tuple[str, ...], _Plan] = {}
        self._slow: deque[TensorRead] = deque()
        self._size = 0  # bytes of the files that weights are read from

    def __getitem__(self, key: str) -> torch.Tensor:
        if key in self.state_dict:
            return self.state_dict[key]
        info = self.index[key]
        if info.get("safetensors_file") is not None:
            return self._from_safetensors(info["safetensors_file"], info.get("weight_name", key), info.get("dtype"))
        if self.save_folder is None:
            raise KeyError(f"{key} is in a .dat file, and no save_folder says where that is.")
        return load_offloaded_weight(path_inside(Path(self.save_folder), _file_of(key, info)), info)

    def _from_safetensors(self, file: str, name: str, dtype: str | None) -> torch.Tensor:
        tensor = self._file(file)[0][name]
        return tensor.to(device=self.device, dtype=_dtype(dtype))

    def read(self, keys: Iterable[str], stop: Stop = never) -> dict[str, torch.Tensor]:
        """Several weights at once, those on disk read into memory: mappings or buffers that end with their last tensor.

        Args:
            keys: Their names.
            stop: Asked between pieces; true gives up.

        Raises:
            KeyError: for a name that is not here.
            RuntimeError: when a file has become shorter, or cannot be read.
        """
        plan = self._plan(tuple(keys))
        found = {key: self[key] for key in plan.elsewhere}
        for reading, parts in plan.readings:
            for (key, dtype), value in zip(parts, reading.read(stop), strict=True):
                as_is = self.device is None and dtype is None
                found[key] = value if as_is else value.to(device=self.device, dtype=dtype)
        return found

    def is_resident(self, keys: Iterable[str]) -> bool:
        """Whether reading some weights now takes no time worth mentioning."""
        try:
            return all(reading.is_resident() for reading, _ in self._plan(tuple(keys)).readings)
        except (KeyError, OSError, ValueError):
            return False  # `read` will say what is wrong, when they are needed

    @property
    def slow(self) -> bool:
        """Whether `remap_huge_pages` has something to do."""
        return bool(self._slow)

    def remap_huge_pages(self, stop: Stop) -> None:
        """Makes faster what reading has found to be slower than it could be, at leisure.

        Args:
            stop: Asked between pieces; true leaves the rest for another time.
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
        """How to read some weights; made anew when one comes from elsewhere now."""
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
            # One of many files with a single weight each is opened when it is read.
            single = functools.partial(CachedFile, path, self._buffers, self._windows)
            opened = single if kept is None else functools.partial(_same, kept[1])
            reading = TensorRead(spans, opened, self._has_free_memory, self._slow.append, keep=kept is not None)
            readings.append((reading, [(key, dtype) for key, _, dtype in entries]))
        return _Plan(sources, elsewhere, readings)

    def _place(self, key: str) -> tuple[Path, Span, torch.dtype | None] | None:
        """The file that a weight is in, where, and the format to convert it to; None for one that is not read so."""
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
        """Whether memory has room for all that is read from files, and for as much of anything else."""
        import psutil

        return bool(psutil.virtual_memory().available > 2 * self._size)

    def _file(self, name: str) -> tuple[SafetensorsFile, CachedFile, dict[str, Span]]:
        """A file, and where what lies in it; kept open, so that its header is read once."""
        if name not in self._files:
            tensors = SafetensorsFile(Path(name))
            file = CachedFile(name, self._buffers, self._windows)
            self._files[name] = tensors, file, tensors.spans()
            self._size += file.size
        return self._files[name]

    def source(self, key: str) -> object:
        """What a weight comes from: another object, once it comes from elsewhere. None for a name that is not here."""
        return self.state_dict[key] if key in self.state_dict else self.index.get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.all_keys)

    def __len__(self) -> int:
        return len(self.all_keys)

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay with the process.
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
        sources: What they come from.
        elsewhere: Those that are not read from a file here.
        readings: What is read together, and of each its weights with the format to convert them to.
    """

    sources: list[object]
    elsewhere: list[str]
    readings: list[tuple[TensorRead, list[tuple[str, torch.dtype | None]]]]


def _dtype(name: Any) -> torch.dtype | None:
    if name is None:
        return None
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{short_repr(name)} is no dtype of torch")
    return found


def read_weights(weights: Mapping[str, Any], names: Sequence[str], stop: Stop = never) -> dict[str, torch.Tensor]:
    """Several weights of a mapping, for use in one forward; see `OffloadedWeightsLoader.read`."""
    source, prefix = _behind(weights)
    if not isinstance(source, OffloadedWeightsLoader):
        return {name: source[prefix + name] for name in names}
    keys = [prefix + name for name in names]
    found = source.read(keys, stop)
    return {name: found[key] for name, key in zip(names, keys, strict=True)}


def are_resident(weights: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether reading some weights of a mapping now takes no time worth mentioning."""
    source, prefix = _behind(weights)
    return not isinstance(source, OffloadedWeightsLoader) or source.is_resident([prefix + name for name in names])


def sources_of(weights: Mapping[str, Any], names: Iterable[str]) -> list[object] | None:
    """What weights come from, to tell later whether that is still so. None: they cannot be read in another thread.

    That holds of mappings that others wrote: nobody knows what they do when an entry is asked for.
    """
    source, prefix = _behind(weights)
    if isinstance(source, OffloadedWeightsLoader):
        found = [source.source(prefix + name) for name in names]
    elif isinstance(source, dict):
        found = [source.get(prefix + name) for name in names]
    else:
        return None
    return [_MappingDataset(value) if isinstance(value, torch.Tensor) else _IdentityDataset(value) for value in found]


class _IdentityDataset:
    """Equal as long as it stands for one and the same object."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._value is other._value


class _MappingDataset(_IdentityDataset):
    """Equal as long as it stands for one tensor that nobody wrote to."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__(value)
        self._version = 0 if value.is_inference() else value._version

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and isinstance(other, _MappingDataset) and self._version == other._version


def loader_behind(weights: Mapping[str, Any] | None) -> OffloadedWeightsLoader | None:
    """What reads the weights of a mapping, where we know it."""
    source = None if weights is None else _behind(weights)[0]
    return source if isinstance(source, OffloadedWeightsLoader) else None


def _behind(weights: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The whole mapping behind a part of it, and the prefix of that part."""
    prefix = ""
    while type(weights) is PrefixedDataset:
        prefix = weights.prefix + prefix
        weights = weights.dataset
    return weights, prefix


def extract_submodules_state_dict(
    state_dict: Mapping[str, torch.Tensor], submodule_names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """The entries of a state that belong to some modules (or are the tensors named).

    Args:
        state_dict: The whole state.
        submodule_names: Dotted names.
    """
    names = list(submodule_names)
    return {
        key: value
        for key, value in state_dict.items()
        if any(not name or key == name or key.startswith(f"{name}.") for name in names)
    }
