"""What can go wrong with a checkpoint, and the list of findings that one error shows.

CheckpointError(RuntimeError)
├── SaveError            nothing was committed: what was there before is untouched
└── LoadError            `problems` lists everything that was found, `changed` what has been changed all the same
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or loaded."""


class SaveError(CheckpointError):
    """Saving failed on some rank. Raised on every rank; the checkpoint that was there before is untouched."""


class LoadError(CheckpointError, ValueError):
    """A checkpoint does not fit, or is damaged. Raised on every rank, as a rule before anything was changed.

    Attributes:
        problems: Everything that was found.
        changed: What has a new state, or a part of one, on some rank; empty where everything is as it was.
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
        kind: ``missing``, ``extra``, ``shape``, ``corrupt``, ``version`` or ``state`` (it does not fit in another way).
        text: What was found, and what was expected.
    """

    file: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}: {self.text}"


def bullet_list(problems: Sequence[object], most: int = 40) -> str:
    """Findings as lines of a message; of very many, the first ones and their number."""
    lines = [f"  - {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  - … and {len(problems) - most} more")
    return "\n".join(lines)
