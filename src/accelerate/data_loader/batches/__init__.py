"""Operations on batches: sharding indices, slicing and concatenating, broadcasting from rank 0."""

from __future__ import annotations
