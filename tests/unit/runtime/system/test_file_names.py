"""A name out of a file is a path only once it was shown to stay inside its folder; what is no regular file is not opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from accelerate.runtime.system import file_names
from accelerate.runtime.system.file_names import (
    FileNameError,
    file_size,
    path_for_write,
    path_inside,
    read_bytes,
    replace_file,
)
from tests.helpers import hostile


@pytest.mark.parametrize("name", [*hostile.NAMES.values(), None, 3, b"a", ["a"]])
def test_hostile_names_are_refused(tmp_path: Path, name: Any) -> None:
    name = name.replace("{outside}", str(tmp_path)) if isinstance(name, str) else name
    for join in (path_inside, path_for_write):
        with pytest.raises(FileNameError) as caught:
            join(tmp_path / "folder", name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "name",
    ["a.bin", "a/b-1.bin", ".metadata", "..hidden", "h.0.attn/weight.dat", "Grüße (1).txt", "-x", "a" * 255, "~"],
)
def test_other_names_are_joined(tmp_path: Path, name: str) -> None:
    assert path_inside(tmp_path, name) == path_for_write(tmp_path, name) == tmp_path / name


def test_links_are_read_through_and_not_changed_through(tmp_path: Path) -> None:
    """The hub's cache lays a snapshot out as links to ``../../blobs``."""
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    (blobs / "abc").write_bytes(b"weights")
    (snapshot / "model.bin").symlink_to("../../blobs/abc")
    (snapshot / "more").symlink_to("../../blobs")
    assert read_bytes(path_inside(snapshot, "model.bin")) == read_bytes(path_inside(snapshot, "more/abc")) == b"weights"
    with pytest.raises(FileNameError, match="a link that leads out of"):
        path_for_write(snapshot, "more/abc")
    replace_file(path_for_write(snapshot, "model.bin"), b"new")
    assert (blobs / "abc").read_bytes() == b"weights" and (snapshot / "model.bin").read_bytes() == b"new"
    assert os.listdir(snapshot) == ["model.bin", "more"] or os.listdir(snapshot) == ["more", "model.bin"]


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    for number, (kind, make) in enumerate(hostile.special_files(tmp_path).items()):
        path = tmp_path / f"f{number}"
        make(path)
        for read in (file_size, read_bytes):
            with pytest.raises(FileNameError):
                read(path)
                pytest.fail(kind)
        if kind != "folder":
            replace_file(path, b"new")
            assert path.read_bytes() == b"new" and not path.is_symlink()
    assert file_size(tmp_path / "none") is None
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")


def test_sizes_are_sane(tmp_path: Path) -> None:
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(file_names.MAX_METADATA_BYTES + 1)
    with pytest.raises(FileNameError, match="the limit for such a file"):
        read_bytes(tmp_path / "huge.json")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        file_names.read_json(tmp_path / "deep.json")


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left.*a\.dat"):
        replace_file(tmp_path / "a.dat", b"1")
    assert list(tmp_path.iterdir()) == []
