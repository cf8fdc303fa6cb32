"""State items of a checkpoint: models, optimizers, schedulers, loaders, random states and registered objects."""

from __future__ import annotations
