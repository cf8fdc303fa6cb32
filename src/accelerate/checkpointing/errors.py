"""Errors of checkpoints, each with the list of all findings.

CheckpointError(RuntimeError)
├── SaveError            nothing was committed, and existing checkpoints are untouched
└── LoadError            `problems` lists all findings, `changed` everything that has changed nevertheless
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or loaded."""


class SaveError(CheckpointError):
    """A save failed on some rank. Raised on every rank; existing checkpoints are untouched."""


class LoadError(CheckpointError, ValueError):
    """A checkpoint is damaged or does not match the run. Raised on every rank, usually before anything changes.

    Attributes:
        problems: All findings.
        changed: Objects that have a new state, or part of one, on some rank; empty if nothing has changed.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = (), changed: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)
        self.changed = list(changed)


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        file: The file it is about, by its path in the checkpoint.
        kind: ``missing``, ``extra``, ``shape``, ``corrupt``, ``version`` or ``state`` (any other mismatch).
        text: The value found, and the value expected.
    """

    file: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}: {self.text}"


def bullet_list(problems: Sequence[object], most: int = 40) -> str:
    """Formats findings as lines of a message: the first ones, and the number of the others."""
    lines = [f"  - {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  - … and {len(problems) - most} more")
    return "\n".join(lines)
