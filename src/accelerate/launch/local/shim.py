"""What a rank is before it is the script: asks Linux to kill it with its launcher, then becomes the script.

Run as ``python -I -S shim.py LAUNCHER_PID COMMAND…``; knows the standard library only, so that it costs little.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Has the kernel kill this process when `parent`, its parent process, ends in whatever way; kept over exec."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we could ask
        os._exit(128 + signal.SIGKILL)


def main(launcher: str, *command: str) -> None:
    """Becomes `command`, in a process group of its own."""
    die_with(int(launcher))
    if os.getpgid(0) != os.getpid():
        os.setsid()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main(*sys.argv[1:])
