"""Trees of tensors, DTensors, and modules with their forwards."""

from __future__ import annotations
