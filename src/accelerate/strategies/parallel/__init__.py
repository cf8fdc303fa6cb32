"""Building blocks that strategies share: device meshes, gradient reduction, materialization, TP plans, compilation."""

from __future__ import annotations
