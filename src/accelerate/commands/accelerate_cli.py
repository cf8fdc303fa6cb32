"""The ``accelerate`` command: a table of subcommands, each imported on use."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

# name -> module with main(argv) -> exit code, and one line of help
COMMANDS = {
    "checkpoint": ("checkpoint", "verify a checkpoint, list those of a project"),
    "config": ("config", "write the configuration file that launch reads"),
    "env": ("env", "show versions, devices and configuration, for a report"),
    "estimate-memory": ("estimate", "estimate the memory that a model needs"),
    "launch": ("launch", "start a script, on one process or many"),
    "merge-weights": ("merge", "merge a sharded checkpoint into one"),
    "test": ("test", "check that this machine is set up well"),
    "to-fsdp2": ("to_fsdp2", "turn a configuration file for FSDP 1 into one for FSDP 2"),
    "tpu-config": ("tpu", "run commands on a pod of TPUs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        argv: The words after ``accelerate``; None takes this process's.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        from .. import __version__

        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        return _unknown(words[0])
    module = importlib.import_module(f".{COMMANDS[words[0]][0]}", __package__)
    try:
        code: int = module.main(words[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe: `accelerate launch -h | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: accelerate COMMAND [arguments]",
            "",
            *lines,
            "",
            "See `accelerate COMMAND --help` for each command.",
        ]
    )


def _unknown(word: str) -> int:
    import difflib

    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" Commands are {', '.join(COMMANDS)}."
    print(f"accelerate: unknown command {word}.{hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
