"""The manifest: what belongs to a checkpoint, byte for byte. It is written last; a folder without one was never finished.

The file is its own canonical form with a checksum of itself, so that a change of any byte shows.
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

from .disk import STRETCH, FileRecord, FileWriter, sum_of_stretch
from .errors import Problem
from .parallel import in_parallel

NAME = "manifest.json"
FORMAT = 1
_THREADS = 4


@dataclass(frozen=True)
class Manifest:
    """What one finished checkpoint consists of.

    Attributes:
        files: Every file, in order of its path.
        world_size: Number of processes that saved it.
        step: `Accelerator.step` when it was saved.
        iteration: Its number.
        format: Version of the layout.
        versions: Library -> version that saved it.
        saved_at: When, in UTC, as ISO 8601.
        kinds: Part -> the class of what it is the state of, for parts that no other class can have.
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
        """The manifest of a checkpoint that is being saved now, by these libraries."""
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
        """The file's content."""
        body = {
            "files": {record.path: {"crc32": list(record.sums), "size": record.size} for record in self.files},
            "format": self.format,
            "iteration": self.iteration,
            "kinds": dict(self.kinds),
            "saved_at": self.saved_at,
            "step": self.step,
            "stretch": STRETCH,
            "versions": self.versions,
            "world_size": self.world_size,
        }
        return _serialised(body)

    def write(self, writer: FileWriter) -> None:
        """Writes the file's content."""
        writer.write(self.to_bytes())

    @property
    def paths(self) -> frozenset[str]:
        """The paths of all files."""
        return frozenset(record.path for record in self.files)


def _serialised(body: dict[str, Any]) -> bytes:
    plain = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    whole = {**body, "checksum": f"{zlib.crc32(plain):08x}"}
    return json.dumps(whole, sort_keys=True, indent=1).encode() + b"\n"


def library_versions() -> dict[str, str]:
    """The libraries whose version may matter to what a checkpoint holds."""
    from .. import __version__

    return {
        "accelerate": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def read(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is damaged, or of a format that this version does not know.
    """
    content = (folder / NAME).read_bytes()
    try:
        body = json.loads(content)
        body.pop("checksum")
        intact = _serialised(body) == content
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise ValueError("it is damaged: its content and its checksum do not agree")
    if body["format"] != FORMAT or body["stretch"] != STRETCH:
        raise ValueError(
            f"it has format {body['format']}, saved by accelerate {body['versions'].get('accelerate')}; this version, "
            f"{library_versions()['accelerate']}, reads format {FORMAT}"
        )
    files = tuple(FileRecord(path, facts["size"], tuple(facts["crc32"])) for path, facts in body["files"].items())
    rest = {name: body[name] for name in ("world_size", "step", "iteration", "format", "versions", "saved_at")}
    return Manifest(files, kinds=body.get("kinds", {}), **rest)


def verify(
    folder: Path,
    manifest: Manifest,
    *,
    share: tuple[int, int] = (0, 1),
    only: Callable[[str], bool] | None = None,
    unread: Container[str] = (),
) -> list[Problem]:
    """Compares the files of a folder with its manifest, by several threads.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        share: (index, count): check this part of the bytes only, for processes that check one checkpoint together. Sizes
            are checked by the first.
        only: Leave out files whose path this is false for.
        unread: Of these files only the size is compared.

    Returns:
        A `Problem` for each file that is missing, of another size or of another content.
    """
    index, count = share
    problems: list[Problem] = []
    jobs: list[tuple[FileRecord, int]] = []
    number = 0
    for record in manifest.files:
        if only is not None and not only(record.path):
            continue
        found = _size(folder / record.path)
        if found != record.size:
            if index == 0:
                problems.append(_sized(record, found))
            continue
        for stretch in range(len(record.sums) if record.path not in unread else 0):
            if number % count == index:
                jobs.append((record, stretch))
            number += 1

    def check(job: tuple[FileRecord, int]) -> str | None:
        record, stretch = job
        with open(folder / record.path, "rb", buffering=0) as file:
            intact = sum_of_stretch(file.fileno(), stretch * STRETCH) == record.sums[stretch]
        return None if intact else record.path

    damaged = sorted({path for path in in_parallel(check, jobs, _THREADS) if path is not None})
    return problems + [Problem(path, "corrupt", "its content is not what was saved (checksum)") for path in damaged]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _sized(record: FileRecord, found: int | None) -> Problem:
    if found is None:
        return Problem(record.path, "missing", "the checkpoint was saved with this file")
    return Problem(record.path, "corrupt", f"it has {found} bytes and was saved with {record.size}")
