"""The manifest lists all files of a checkpoint with their checksums. It is written last; a folder without one is incomplete.

The file is the canonical serialization of its content plus a checksum, so that a change of any byte is detected.
"""

from __future__ import annotations

import datetime
import json
import platform
import zlib
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...runtime.system.file_names import FileNameError, file_size, parse_json, path_inside, read_bytes, short_repr
from ..errors import Problem
from .file_writer import BLOCK_SIZE, FileRecord, FileWriter, block_checksum, thread_map

NAME = "manifest.json"
FORMAT = 1
_THREADS = 4


@dataclass(frozen=True)
class Manifest:
    """Contents of a complete checkpoint.

    Attributes:
        files: All files, sorted by path.
        world_size: Number of processes that saved it.
        step: Value of `Accelerator.step`.
        iteration: Number of the checkpoint.
        format: Version of the layout.
        versions: Library -> version that saved it.
        saved_at: UTC time, as ISO 8601.
        kinds: Item -> class name of the object that it belongs to, for items that only that class can load.
    """

    files: tuple[FileRecord, ...]
    world_size: int
    step: int
    iteration: int
    format: int = FORMAT
    versions: dict[str, str] = field(default_factory=dict)
    saved_at: str = ""
    kinds: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, files: Iterable[FileRecord], *, world_size: int, step: int, iteration: int, kinds: Mapping[str, str]
    ) -> Manifest:
        """Creates the manifest of a checkpoint that is being saved."""
        return cls(
            tuple(sorted(files, key=lambda record: record.path)),
            world_size,
            step,
            iteration,
            versions=library_versions(),
            saved_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            kinds=kinds,
        )

    def to_bytes(self) -> bytes:
        """Serializes the manifest."""
        body = {
            "files": {record.path: {"crc32": list(record.checksums), "size": record.size} for record in self.files},
            "format": self.format,
            "iteration": self.iteration,
            "kinds": dict(self.kinds),
            "saved_at": self.saved_at,
            "step": self.step,
            "stretch": BLOCK_SIZE,
            "versions": self.versions,
            "world_size": self.world_size,
        }
        return _serialize(body)

    def write(self, writer: FileWriter) -> None:
        """Writes the manifest."""
        writer.write(self.to_bytes())

    @property
    def paths(self) -> frozenset[str]:
        """Paths of all files."""
        return frozenset(record.path for record in self.files)


def _serialize(body: dict[str, Any]) -> bytes:
    plain = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    whole = {**body, "checksum": f"{zlib.crc32(plain):08x}"}
    return json.dumps(whole, sort_keys=True, indent=1).encode() + b"\n"


def library_versions() -> dict[str, str]:
    """Returns the versions of libraries that affect the content of a checkpoint."""
    from ... import __version__

    return {
        "accelerate": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def read(folder: Path) -> Manifest:
    """Reads the manifest of a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, has an unsupported format, or names files outside the folder.
    """
    content = read_bytes(folder / NAME)
    try:
        body = parse_json(content)
        body.pop("checksum")
        intact = _serialize(body) == content
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError("it is damaged: its content does not match its checksum")
    _check_types(body)
    if body["format"] != FORMAT or body["stretch"] != BLOCK_SIZE:
        raise ValueError(
            f"it has format {body['format']}, saved by accelerate {body['versions'].get('accelerate')}; this version, "
            f"{library_versions()['accelerate']}, reads format {FORMAT}"
        )
    files = tuple(_parse_record(folder, path, fields) for path, fields in body["files"].items())
    rest = {name: body[name] for name in ("world_size", "step", "iteration", "format", "versions", "saved_at")}
    return Manifest(files, kinds=body.get("kinds", {}), **rest)


# Key -> minimum of integers, or type of the values of a mapping.
_NUMBERS = {"format": 0, "iteration": 0, "step": 0, "stretch": 1, "world_size": 1}
_MAPPINGS = {"files": dict, "versions": str, "kinds": str}


def _check_types(body: dict[str, Any]) -> None:
    """Raises ValueError for values of the wrong type in a manifest with a correct checksum."""
    for key, least in _NUMBERS.items():
        value = body.get(key)
        if type(value) is not int or not least <= value < 2**63:
            raise ValueError(f"its {key!r} is {short_repr(value)}; expected a number of at least {least}")
    for key, kind in _MAPPINGS.items():
        value = body.get(key, {} if key == "kinds" else None)
        if not isinstance(value, dict) or not all(isinstance(one, kind) for one in value.values()):
            raise ValueError(
                f"its {key!r} is {short_repr(value)}; expected a mapping of names to values of type {kind.__name__}"
            )
    if not isinstance(body.get("saved_at"), str):
        raise ValueError(f"its 'saved_at' is {short_repr(body.get('saved_at'))}; expected a time")


def _parse_record(folder: Path, path: str, fields: dict[str, Any]) -> FileRecord:
    """Parses the record of a file and checks its types and path."""
    path_inside(folder, path)
    size, checksums = fields.get("size"), fields.get("crc32")
    if path == NAME or type(size) is not int or not 0 <= size < 2**63 or not isinstance(checksums, list):
        raise ValueError(
            f"its entry of {short_repr(path)} is {short_repr(fields)}; expected a size and a list of checksums"
        )
    if len(checksums) != max(1, -(-size // BLOCK_SIZE)) or not all(isinstance(one, str) for one in checksums):
        raise ValueError(
            f"its entry of {short_repr(path)} has {len(checksums)} checksums, which does not match {size} bytes"
        )
    return FileRecord(path, size, tuple(checksums))


def verify(
    folder: Path,
    manifest: Manifest,
    *,
    share: tuple[int, int] = (0, 1),
    only: Callable[[str], bool] | None = None,
    size_only: Container[str] = (),
    locate: Callable[[str], Path] | None = None,
) -> list[Problem]:
    """Compares the files of a folder with its manifest, on several threads.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        share: (index, count): verifies this part of the blocks, to split the work among processes. Index 0 checks sizes.
        only: Selects files by path.
        size_only: Paths of files whose content is not read.
        locate: Maps the path of a file to its location; None: in `folder`.

    Returns:
        A `Problem` for each file that is missing or has another size or content.
    """
    index, count = share
    at = locate or (lambda path: folder / path)
    problems: list[Problem] = []
    jobs: list[tuple[FileRecord, int]] = []
    number = 0
    for record in manifest.files:
        if only is not None and not only(record.path):
            continue
        if problem := _size_problem(at(record.path), record):
            if index == 0:
                problems.append(problem)
            continue
        for block in range(len(record.checksums) if record.path not in size_only else 0):
            if number % count == index:
                jobs.append((record, block))
            number += 1

    def check(job: tuple[FileRecord, int]) -> str | None:
        record, block = job
        with open(at(record.path), "rb", buffering=0) as file:
            intact = block_checksum(file.fileno(), block * BLOCK_SIZE) == record.checksums[block]
        return None if intact else record.path

    damaged = sorted({path for path in thread_map(check, jobs, _THREADS) if path is not None})
    return problems + [
        Problem(path, "corrupt", "its content differs from what was saved (checksum)") for path in damaged
    ]


def _size_problem(path: Path, record: FileRecord) -> Problem | None:
    """Returns the problem of a file that is missing, irregular or of another size."""
    try:
        found = file_size(path)
    except FileNameError as error:
        return Problem(record.path, "corrupt", str(error))
    if found is None:
        return Problem(record.path, "missing", "the checkpoint was saved with this file")
    if found != record.size:
        return Problem(record.path, "corrupt", f"it has {found} bytes and was saved with {record.size}")
    return None


def has_all_files(folder: Path, manifest: Manifest) -> bool:
    """Returns True if a folder has all files of a manifest, with the recorded sizes. Their content is not read."""
    return not any(_size_problem(folder / record.path, record) for record in manifest.files)
