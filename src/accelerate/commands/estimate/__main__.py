"""Runs ``python -m accelerate.commands.estimate``."""

from __future__ import annotations

import sys

from .command import main

sys.exit(main())
