"""Sharded state: local shards, global chunks, and the folders of `torch.distributed.checkpoint` (DCP).

`shard_layout` maps flat ranges of a local shard to chunks of the full tensor, `dcp_writer` and `dcp_reader` read and write
DCP folders, `reshard` fills local shards from a checkpoint saved with another layout.
"""

from __future__ import annotations
