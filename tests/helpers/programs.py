"""Programs that tests put in the place of others."""

from __future__ import annotations

import re
import sys


def shebang() -> str:
    """Returns the first lines of a Python program that this interpreter runs, wherever it is.

    A kernel takes a path with a space for two words. So a shell starts the interpreter; to Python the line is a string.
    """
    interpreter = re.sub(r'(["\\$`])', r"\\\1", sys.executable)
    return f'#!/bin/sh\n"exec" "{interpreter}" "$0" "$@"\n'
