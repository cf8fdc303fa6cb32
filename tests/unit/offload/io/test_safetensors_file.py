"""Whatever the header of a safetensors file says: opening the file gives its tensors or a ValueError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accelerate.offload.checkpoints import open_weights
from accelerate.offload.io import safetensors_file
from accelerate.offload.io.safetensors_file import SafetensorsFile

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
number = st.sampled_from([0, 1, 2, 4, 8, 2**31, 2**62, 2**63, 2**64, -1]) | plain
entry = plain | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "I64", "F8_E8M0", "F4", "X"]) | plain,
        "shape": st.lists(number, max_size=3) | plain,
        "data_offsets": st.tuples(number, number).map(list) | plain,
    }
)


def write(path: Path, header: Any, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def opened(path: Path) -> None:
    try:
        file = open_weights(path)
    except ValueError as error:
        assert len(str(error)) < 1000
    else:
        for name, shape in file.shapes.items():
            assert tuple(file[name].shape) == shape


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(header=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entry, max_size=3))
def test_any_header(tmp_path: Path, header: Any) -> None:
    opened(write(tmp_path / "m.safetensors", header))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=30), header=plain)
def test_any_content(tmp_path: Path, content: bytes, header: Any) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    opened(tmp_path / "m.safetensors")
    opened(write(tmp_path / "m.safetensors", header))


@pytest.mark.parametrize("shape", [[2**63, 0], [2**62, 2**62, 0], [2**64, 0]])
def test_dimensions_that_no_tensor_has(tmp_path: Path, shape: list[int]) -> None:
    path = write(tmp_path / "m.safetensors", {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}, b"")
    with pytest.raises(ValueError, match="no usable dtype, shape and offsets for 'a'"):
        SafetensorsFile(path)


@pytest.mark.parametrize("notes", [[], 3, None, "pt", {"format": 3}, {"format": ["pt"]}])
def test_notes_that_are_no_mapping_of_texts(tmp_path: Path, notes: Any) -> None:
    path = write(tmp_path / "m.safetensors", {"__metadata__": notes}, b"")
    with pytest.raises(
        ValueError, match="the '__metadata__' of its header is .*; expected a mapping of names to strings"
    ):
        SafetensorsFile(path)


def test_a_header_has_a_size(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    size = safetensors_file._LARGEST_HEADER + 1
    with open(path, "wb") as file:
        file.write(size.to_bytes(8, "little"))
        file.truncate(8 + size)
    with pytest.raises(ValueError, match="more than the 100000000 that the format allows"):
        SafetensorsFile(path)
    write(path, b"[" * 100_000)
    write(path, b'{"a":' + b"[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        SafetensorsFile(path)
    write(path, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
    assert torch.equal(SafetensorsFile(path)["a"], torch.zeros(2))
