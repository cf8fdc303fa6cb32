"""Seeding, and synchronization of random states across ranks."""

from __future__ import annotations

from ..runtime.rng import set_seed, synchronize_rng_state, synchronize_rng_states

__all__ = ["set_seed", "synchronize_rng_state", "synchronize_rng_states"]
