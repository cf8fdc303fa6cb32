"""Context parallelism: shards sequences over ranks, by ring attention, KV all-gather or Ulysses."""

from __future__ import annotations
