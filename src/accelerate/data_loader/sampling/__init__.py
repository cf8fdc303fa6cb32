"""Samplers, their random state, and the order in which indices are drawn."""

from __future__ import annotations
