"""Writes the exception that ends a rank to the error file of torch's elastic agent, for the launcher to quote.

``import accelerate`` installs the hook, since a script can fail before it creates `Accelerator`; imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ...settings import env

# "PID:FILE" of the rank: its child processes inherit the variable and must not write the file.
_OWNER = "ACCELERATE_ERROR_FILE_OWNER"
_installed: Callable[..., Any] | None = None


def record_errors() -> None:
    """Chains a hook to `sys.excepthook` that writes the exception to TORCHELASTIC_ERROR_FILE.

    Does nothing without that variable, or in a child process of a rank. A second call chains again if the hook has been
    replaced since.
    """
    global _installed
    file = env.get("TORCHELASTIC_ERROR_FILE")
    if not file or (_installed is not None and sys.excepthook is _installed):
        return
    process, _, owned = (env.get(_OWNER) or "").partition(":")
    if owned == file and process != str(os.getpid()):
        return
    env.publish({_OWNER: f"{os.getpid()}:{file}"})
    previous: Callable[[type[BaseException], BaseException, TracebackType | None], Any] = sys.excepthook
    owner = os.getpid()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, KeyboardInterrupt):
            previous(kind, error, trace)
            if os.getpid() == owner:  # not in a forked child
                with contextlib.suppress(OSError):  # a full disk, a removed folder; stderr has the traceback already
                    _write(file, error)
        elif env.integer("LOCAL_RANK", 0) == 0:  # Ctrl-C interrupts every rank: one traceback is enough
            previous(kind, error, trace)

    _installed = sys.excepthook = hook


def _write(file: str, error: BaseException) -> None:
    """Writes the error in the format of torch's `ErrorHandler`, atomically.

    Raises:
        OSError: if it cannot be written.
    """
    note = {
        "message": {
            "message": f"{type(error).__name__}: {error}",
            "extraInfo": {
                "py_callstack": "".join(traceback.format_exception(error)),
                "timestamp": str(int(time.time())),
            },
        }
    }
    unfinished = f"{file}.{os.getpid()}"
    with open(unfinished, "w") as stream:
        json.dump(note, stream)
    os.replace(unfinished, file)
