"""Starts a rank: ties its lifetime to the launcher's, then replaces itself with the script.

Run as ``python -I -S shim.py LAUNCHER_PID COMMAND…``; imports the standard library only, to start fast.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def set_parent_death_signal(parent: int) -> None:
    """Requests SIGKILL from the kernel when `parent`, the parent process, exits; the request survives exec."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(128 + signal.SIGKILL)


def main(launcher: str, *command: str) -> None:
    """Replaces this process with `command`, in a process group of its own."""
    set_parent_death_signal(int(launcher))
    if os.getpgid(0) != os.getpid():
        os.setsid()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main(*sys.argv[1:])
