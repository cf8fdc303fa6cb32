"""Operations on batches: arithmetic of sharding them, slicing and concatenation, broadcast from the reading rank."""

from __future__ import annotations
