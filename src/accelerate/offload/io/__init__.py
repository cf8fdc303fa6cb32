"""Reads weights from disk: memory maps, direct I/O, safetensors files."""

from __future__ import annotations
