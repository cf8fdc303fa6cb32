"""Trees of tensors, DTensors, modules and their forwards."""

from __future__ import annotations
