"""What is in a checkpoint: a list of `Entry` values, one a file or a folder of the ranks' files, to save and to load.

    save:  capture (nothing written yet) -> write, on this thread or in the background
    load:  read and check every entry -> only then load them

A strategy gives the entries of models and optimizers (`Strategy.entries`); `run_entries` gives the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Problem
from ..sharded.dcp_writer import WriteResult
from ..storage import formats
from ..storage.file_writer import FileRecord, FileWriter, write_file

Check = Callable[[Any], list[Problem]]


@dataclass(frozen=True)
class FileFormat:
    """How a state becomes a file: ``write(state, writer)``, ``read(path, **options)``.

    Of a folder in which each rank writes a file, ``write`` returns what is to be said of that file in the folder.
    """

    write: Callable[[Any, FileWriter], list[WriteResult] | None]
    read: Callable[..., Any]
    takes_options: bool = False


TORCH = FileFormat(formats.write_torch, formats.read_torch, takes_options=True)
SAFETENSORS = FileFormat(formats.write_safetensors, formats.read_safetensors)
JSON = FileFormat(formats.write_json, formats.read_json)


def no_check(state: Any) -> list[Problem]:
    """Anything goes."""
    return []


@dataclass(frozen=True)
class Entry:
    """One part of a checkpoint: a state in a file.

    Attributes:
        path: The file's path in the checkpoint; to load, it may be a folder.
        capture: Gives the state, with references to live tensors; None: there is nothing to save this time.
        load: Puts a state that was read, and found to fit, in its place.
        check: What does not fit, found without changing anything.
        everywhere: Each rank has its own (the path names the rank); else rank 0 saves and all ranks load it.
        collective: All ranks take part in `capture`, whoever saves the state.
        fresh: What `capture` gives is memory of its own, that nothing changes.
        kept: `load` keeps the tensors it is given, so that they are read into memory of their own.
        required: A checkpoint without it is incomplete.
        format: How it is written and read.
        partial: Makes what fits of a state that does not fit as a whole; None: it is left out as a whole.
        needs: Added to the message when the file cannot be read.
        kind: The class of what the state belongs to, where another class cannot have it; the manifest records it.
        revertible: `load` runs code of users, and may raise; `load` of what `capture` gave before undoes it. Such entries
            are loaded first.
    """

    path: str
    capture: Callable[[], Any]
    load: Callable[[Any], None]
    check: Check = no_check
    everywhere: bool = False
    collective: bool = False
    fresh: bool = False
    kept: bool = False
    required: bool = True
    format: FileFormat = TORCH
    partial: Callable[[Any], Any] | None = None
    needs: str = ""
    kind: str = ""
    revertible: bool = False

    def read(self, folder: Path, options: dict[str, Any]) -> Any:
        """The state in the file.

        Args:
            folder: The checkpoint.
            options: For `torch.load`.
        """
        return self.format.read(folder / self.path, **(options if self.format.takes_options else {}))


@dataclass(frozen=True)
class Part:
    """A captured state, ready to be written to its file."""

    path: str
    state: Any
    format: FileFormat
    kind: str = ""

    def write(self, folder: Path) -> Written:
        """Writes the file below `folder`, on disk when this returns."""
        said: list[list[WriteResult] | None] = []
        record = write_file(
            folder / self.path, self.path, lambda writer: said.append(self.format.write(self.state, writer))
        )
        return Written(record, said[0] or [])


@dataclass(frozen=True)
class Written:
    """A file that was written: its record, and what is to be said of it in its folder."""

    record: FileRecord
    places: list[WriteResult]
