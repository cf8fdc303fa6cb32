"""File formats: serializes states, and reads them without running code from the file.

Tensors are written from live memory and read through memory maps. The CRCs of `torch.save` are turned off, since the
manifest has checksums.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...runtime.system import file_names
from .file_writer import FileRecord, FileWriter
from .staging import byte_view
from .verified_reader import ChecksummedReader

# Alignment of torch's allocator: kernels then compute bit-identical results on mapped tensors and copies.
_ALIGNMENT = 64


def write_torch(state: Any, writer: FileWriter) -> None:
    """Writes any state with `torch.save`."""
    with _without_crc():
        torch.save(state, writer)  # type: ignore[arg-type]  # torch.save needs write and flush only


_crc_lock = threading.Lock()
_crc_users = 0
_crc_before = True


@contextmanager
def _without_crc() -> Iterator[None]:
    global _crc_users, _crc_before
    if not hasattr(torch.serialization, "set_crc32_options"):  # torch before 2.6
        yield
        return
    with _crc_lock:
        if not _crc_users:
            _crc_before = torch.serialization.get_crc32_options()
            torch.serialization.set_crc32_options(False)
        _crc_users += 1
    try:
        yield
    finally:
        with _crc_lock:
            _crc_users -= 1
            if not _crc_users:
                torch.serialization.set_crc32_options(_crc_before)


def read_torch(path: Path, *, record: FileRecord | None = None, **kwargs: Any) -> Any:
    """Reads a file of `torch.save`, with tensors memory-mapped on the CPU. Never runs code from the file.

    Args:
        path: The file.
        record: Verifies the file against this record while reading; tensors then have their own memory.
        **kwargs: Arguments of `torch.load`.

    Raises:
        CorruptFileError: if the file differs from its record.
        pickle.UnpicklingError: if the file contains a type that is not allowed.
        RuntimeError, EOFError …: if the file has another format.
    """
    kwargs = {"map_location": "cpu", "mmap": True, **kwargs}
    kwargs.pop("weights_only", None)
    with torch.serialization.safe_globals(_numpy_types()):
        if record is not None:
            with ChecksummedReader(path, record) as file:
                try:
                    state = torch.load(file, weights_only=True, **{**kwargs, "mmap": False})  # type: ignore[arg-type]
                except Exception:
                    file.verify_rest()  # reports a damaged file as such, whatever torch raised
                    raise
                file.verify_rest()
                return state
        try:
            return torch.load(path, weights_only=True, **kwargs)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):  # files of torch before 1.6
                raise
            return torch.load(path, weights_only=True, **{**kwargs, "mmap": False})


def _numpy_types() -> list[Any]:
    """Returns the types in pickles of numeric numpy arrays, under the names of numpy 1 and 2."""
    import _codecs

    import numpy as np

    rebuild = np.ndarray.__reduce__(np.empty(0))[0]
    types: list[Any] = [np.ndarray, np.dtype, _codecs.encode]
    types += [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    types += [type(np.dtype(code)) for code in ("u4", "u8", "i4", "i8", "f4", "f8", "u1", "i1", "?")]
    scalar = np.float64(0).__reduce__()[0]
    types += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return types


# safetensors


def _region(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Identifies a tensor's memory, dtype, shape and strides; None if it has no memory (empty, meta, sparse)."""
    if tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return None
    try:
        pointer = tensor.data_ptr()
    except RuntimeError:  # a wrapper without memory of its own
        return None
    return tensor.device, pointer, tensor.dtype, tuple(tensor.shape), tensor.stride()


def shared_tensor_names(state: Mapping[str, Any]) -> list[list[str]]:
    """Groups the names in a state that share one tensor (tied weights)."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, value in state.items():
        region = _region(value) if isinstance(value, torch.Tensor) else None
        if region is not None:
            groups.setdefault(region, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def drop_shared_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state with the first name of each tensor only."""
    dropped = {name for names in shared_tensor_names(state) for name in names[1:]}
    return {name: value for name, value in state.items() if name not in dropped}


_SAFE_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


def write_safetensors(
    state: Mapping[str, torch.Tensor], writer: FileWriter, values: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes tensors in the safetensors format, from live memory.

    Args:
        state: The tensors.
        writer: The file.
        values: Source of the values, read one tensor at a time, if `state` is on device meta.

    Raises:
        ValueError: for a value that the format cannot hold.
    """
    wide_first = sorted(state, key=lambda name: (-_check_supported(name, state[name]).element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in wide_first:
        tensor = state[name]
        size = tensor.numel() * tensor.element_size()
        dtype = _SAFE_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    writer.write(struct.pack("<Q", len(text)) + text)
    for name in wide_first:
        if state[name].numel():
            tensor = state[name] if values is None else values[name]
            writer.write(byte_view(tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()))


def _check_supported(name: str, value: Any) -> torch.Tensor:
    known = isinstance(value, torch.Tensor) and str(value.dtype).removeprefix("torch.") in _SAFE_DTYPES
    if not known or value.layout is not torch.strided:
        what = (
            f"a {value.dtype} tensor of layout {value.layout}" if isinstance(value, torch.Tensor) else repr(type(value))
        )
        raise ValueError(
            f"{name!r} is {what}, which the safetensors format cannot hold: save with safe_serialization=False."
        )
    return value


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file, memory-mapped on the CPU."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is not a mapping


def write_json(state: Any, writer: FileWriter) -> None:
    """Writes plain data as JSON."""
    writer.write(json.dumps(state, indent=1, sort_keys=True).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Reads plain data from JSON."""
    return file_names.read_json(path)
