"""Output of the launcher, on stderr, as stdout belongs to the script."""

from __future__ import annotations

import sys


def log_line(line: str, quiet: bool = False) -> None:
    """Prints a line to stderr, unless `quiet`."""
    if not quiet:
        print(f"accelerate launch: {line}", file=sys.stderr, flush=True)
