"""``accelerate checkpoint verify DIR`` and ``accelerate checkpoint list PROJECT_DIR``: is it whole, and what is in it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .parsers import CommandParser, make_parser


def checkpoint_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The command's parser."""
    parser = make_parser("checkpoint", "Verifies a checkpoint, or lists those of a project.", subparsers)
    actions = parser.add_subparsers(dest="action", required=True, parser_class=CommandParser)
    verify = actions.add_parser("verify", description="Reads a checkpoint whole and compares it with its manifest.")
    verify.add_argument("folder", type=Path, help="the checkpoint")
    listing = actions.add_parser("list", description="Lists the numbered checkpoints of a project, oldest first.")
    listing.add_argument("folder", type=Path, help="the project's folder")
    parser.set_defaults(func=checkpoint_command)
    return parser


def checkpoint_command(args: argparse.Namespace) -> int:
    """Prints the findings; the exit code: 0 where all is well, 1 where something is wrong."""
    return _verify(args.folder) if args.action == "verify" else _list(args.folder)


def _verify(folder: Path) -> int:
    from ..checkpointing import manifest as manifests
    from ..checkpointing.finding import problems_of

    problems = problems_of(folder)
    try:
        manifest = manifests.read(folder)
    except (OSError, ValueError):
        manifest = None
    if manifest is not None:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
        print(f"{folder}\nsaved {manifest.saved_at} by {manifest.world_size} process(es), {versions}\n")
        wrong = {problem.file: problem for problem in problems}
        width = max(len(record.path) for record in manifest.files)
        for record in manifest.files:
            state = f"{wrong[record.path].kind}: {wrong[record.path].text}" if record.path in wrong else "ok"
            print(f"  {record.path:<{width}}  {_size(record.size):>9}  {state}")
    elif not problems:
        print(f"{folder}\nno manifest (another release saved it): its files can be read, and cannot be verified")
    for problem in problems if manifest is None else ():
        print(problem, file=sys.stderr)
    print(f"\n{'whole' if not problems else f'{len(problems)} problem(s)'}")
    return 1 if problems else 0


def _list(project: Path) -> int:
    from ..checkpointing import manifest as manifests
    from ..checkpointing.finding import is_whole
    from ..checkpointing.names import numbered_folders

    folders = numbered_folders(project)
    if not folders:
        print(f"there are no checkpoints in {project / 'checkpoints'}", file=sys.stderr)
        return 1
    for folder in folders:
        try:
            manifest = manifests.read(folder)
            facts = f"{manifest.saved_at}  {manifest.world_size:>5}  {_size(sum(f.size for f in manifest.files)):>9}"
        except (OSError, ValueError):
            facts = f"{'no manifest':<25}  {'?':>5}  {'?':>9}"
        print(f"{folder.name:<16}  {facts}  {'whole' if is_whole(folder) else 'not whole'}")
    return 0


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return checkpoint_command(checkpoint_command_parser().parse_args(argv))
