"""Samplers, the order in which they draw indices, random states per sample, and worker processes."""

from __future__ import annotations
