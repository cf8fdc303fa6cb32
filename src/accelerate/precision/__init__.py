"""Mixed precision: `select_precision` returns the `Precision` for the settings of a run."""

from .amp import Autocast, Precision, select_precision

__all__ = ["Autocast", "Precision", "select_precision"]
