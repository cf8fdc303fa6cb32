"""The number format a model computes in. `select_precision` gives the `Precision` for a run's settings."""

from .amp import Autocast, Precision, select_precision

__all__ = ["Autocast", "Precision", "select_precision"]
