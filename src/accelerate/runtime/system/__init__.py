"""The machine: its resources, its installed packages, its files and its page cache."""

from __future__ import annotations
