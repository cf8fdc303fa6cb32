"""Reading any manifest, with a valid checksum or not, returns a `Manifest` or raises ValueError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accelerate import Accelerator
from accelerate.checkpointing import LoadError
from accelerate.checkpointing.discovery import is_whole, problems_of
from accelerate.checkpointing.storage import manifest as manifests
from tests.helpers import hostile

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("files", "format", "iteration", "kinds", "saved_at", "step", "stretch", "versions", "world_size")


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    folder = Path(Accelerator(cpu=True).save_state(tmp_path_factory.mktemp("c") / "ckpt"))
    found = json.loads((folder / manifests.NAME).read_bytes())
    del found["checksum"]
    yield folder, found


def read(folder: Path) -> None:
    """Reads a manifest through every public path; all raise the same errors."""
    try:
        found = manifests.read(folder)
    except ValueError as error:
        assert "\n" not in str(error)
        assert [problem.file for problem in problems_of(folder)] == [manifests.NAME] and not is_whole(folder)
    else:
        assert isinstance(found.world_size, int) and problems_of(folder) is not None


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(key=st.sampled_from(KEYS), value=plain)
def test_arbitrary_values(body: Any, key: str, value: Any) -> None:
    folder, whole = body
    hostile.write_body(folder / manifests.NAME, {**whole, key: value})
    read(folder)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.text(max_size=8), record=plain, size=plain, sums=plain)
def test_arbitrary_records(body: Any, name: str, record: Any, size: Any, sums: Any) -> None:
    folder, whole = body
    for entry in (record, {"size": size, "crc32": sums}, {"size": 0, "crc32": sums}, {"size": size, "crc32": ["0"]}):
        hostile.write_body(folder / manifests.NAME, {**whole, "files": {**whole["files"], name: entry}})
        read(folder)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=40) | plain.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_content(body: Any, content: bytes) -> None:
    folder, _ = body
    (folder / manifests.NAME).write_bytes(content)
    read(folder)


@pytest.mark.parametrize("value", ["two", None, 0, -1, 2.0, True, [1], 2**70])
def test_invalid_world_size(body: Any, value: Any) -> None:
    folder, whole = body
    hostile.write_body(folder / manifests.NAME, {**whole, "world_size": value})
    with pytest.raises(LoadError, match="its 'world_size' is .*; expected a number of at least 1"):
        Accelerator(cpu=True).load_state(folder)
