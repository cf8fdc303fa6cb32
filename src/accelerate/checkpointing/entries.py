"""What is in a checkpoint: a list of `Entry` values, one a file. Saving and loading walk the same list.

    save:  capture (nothing written yet) -> write, on this thread or in the background
    load:  read and check every entry -> only then load them

A strategy gives the entries of models and optimizers (`Strategy.entries`); `run_entries` gives the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files
from .disk import FileRecord, FileWriter, write_file
from .errors import Problem

Check = Callable[[Any], list[Problem]]


@dataclass(frozen=True)
class FileFormat:
    """How a state becomes a file: ``write(state, writer)``, ``read(path, **options)``."""

    write: Callable[[Any, FileWriter], None]
    read: Callable[..., Any]
    takes_options: bool = False


TORCH = FileFormat(files.write_torch, files.read_torch, takes_options=True)
SAFETENSORS = FileFormat(files.write_safetensors, files.read_safetensors)
JSON = FileFormat(files.write_json, files.read_json)


def no_check(state: Any) -> list[Problem]:
    """Anything goes."""
    return []


@dataclass(frozen=True)
class Entry:
    """One part of a checkpoint: a state in a file.

    Attributes:
        path: The file's path in the checkpoint.
        capture: Gives the state, with references to live tensors; None: there is nothing to save this time.
        load: Puts a state that was read, and found to fit, in its place.
        check: What does not fit, found without changing anything.
        everywhere: Each rank has its own (the path names the rank); else rank 0 saves and all ranks load it.
        required: A checkpoint without it is incomplete.
        format: How it is written and read.
        partial: Makes what fits of a state that does not fit as a whole; None: it is left out as a whole.
        needs: Added to the message when the file cannot be read.
    """

    path: str
    capture: Callable[[], Any]
    load: Callable[[Any], None]
    check: Check = no_check
    everywhere: bool = False
    required: bool = True
    format: FileFormat = TORCH
    partial: Callable[[Any], Any] | None = None
    needs: str = ""

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

    def write(self, folder: Path) -> FileRecord:
        """Writes the file below `folder`, on disk when this returns."""
        return write_file(folder / self.path, self.path, lambda writer: self.format.write(self.state, writer))
