"""``accelerate checkpoint verify DIR`` and ``accelerate checkpoint list PROJECT_DIR``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .parsers import CommandParser, make_parser


def checkpoint_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Returns the command's parser."""
    parser = make_parser("checkpoint", "Verifies a checkpoint, or lists those of a project.", subparsers)
    actions = parser.add_subparsers(dest="action", required=True, parser_class=CommandParser)
    verify = actions.add_parser("verify", description="Reads a checkpoint whole and compares it with its manifest.")
    verify.add_argument("folder", type=Path, help="the checkpoint")
    listing = actions.add_parser("list", description="Lists the numbered checkpoints of a project, oldest first.")
    listing.add_argument("folder", type=Path, help="the project's folder")
    parser.set_defaults(func=checkpoint_command)
    return parser


def checkpoint_command(args: argparse.Namespace) -> int:
    """Prints the findings and returns the exit code: 0 if all is well, else 1."""
    return _verify(args.folder) if args.action == "verify" else _list(args.folder)


def _verify(folder: Path) -> int:
    from ..checkpointing.discovery import problems_of
    from ..checkpointing.storage import manifest as manifests
    from ..checkpointing.storage.filenames import describe_file

    problems = problems_of(folder)
    try:
        manifest = manifests.read(folder)
    except (OSError, ValueError):
        manifest = None
    print(folder)
    if manifest is not None:
        print(f"  saved     {_when(manifest.saved_at)}, {_processes(manifest.world_size)}")
        print(f"  versions  {', '.join(f'{name} {version}' for name, version in sorted(manifest.versions.items()))}\n")
        wrong = {problem.file: f"{problem.kind}: {problem.text}" for problem in problems}
        files = [
            (file.path, describe_file(file.path), _size(file.size), wrong.pop(file.path, "ok"))
            for file in manifest.files
        ]
        rest = [(name, describe_file(name), "", text) for name, text in wrong.items()]
        _print_table(("file", "holds", "size", "state"), [*files, *rest], right={2})
    elif not problems:
        print("  no manifest (another release saved it): its files can be read, and cannot be verified")
    for problem in problems if manifest is None else ():
        print(f"  {problem}")
    print(f"\n{'whole' if not problems else f'not whole: {len(problems)} problem(s)'}")
    return 1 if problems else 0


def _list(project: Path) -> int:
    from ..checkpointing.discovery import is_whole
    from ..checkpointing.storage import manifest as manifests
    from ..checkpointing.storage.filenames import numbered_checkpoints

    folders = numbered_checkpoints(project)
    if not folders:
        print(f"there are no checkpoints in {project / 'checkpoints'}", file=sys.stderr)
        return 1
    rows = []
    for folder in folders:
        try:
            manifest = manifests.read(folder)
            size = _size(sum(file.size for file in manifest.files))
            facts = (_when(manifest.saved_at), str(manifest.world_size), size)
        except FileNotFoundError:
            facts = ("no manifest", "?", "?")
        except (OSError, ValueError):
            facts = ("damaged manifest", "?", "?")
        rows.append((folder.name, *facts, "complete" if is_whole(folder) else "not whole"))
    _print_table(("checkpoint", "saved", "processes", "size", "state"), rows, right={2, 3})
    print(
        "\ncomplete: all files are there in the size they were saved with. Only `accelerate checkpoint verify` reads them."
    )
    return 0


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: set[int]) -> None:
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    for row in (headers, ["-" * width for width in widths], *rows):
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _when(moment: str) -> str:
    return moment.replace("T", " ").replace("+00:00", " UTC")


def _processes(count: int) -> str:
    return f"by {count} process{'' if count == 1 else 'es'}"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return checkpoint_command(checkpoint_command_parser().parse_args(argv))
