"""The number format a model computes in. `choose` gives the `Precision` for a run's settings."""

from .amp import Autocast, Precision, choose

__all__ = ["Autocast", "Precision", "choose"]
