"""This rank's shard of the data on a device mesh."""

from __future__ import annotations

from typing import Any

from ..runtime.world import DataShard

DATA_DIMENSIONS = ("dp_replicate", "dp_shard")
"""Dimensions along which ranks read different data; along all others they hold shards of one model."""


def data_shard_of_mesh(mesh: Any) -> DataShard:
    """Returns which shard of the data this process reads.

    Args:
        mesh: A `torch.distributed.device_mesh.DeviceMesh` with named dimensions.

    Returns:
        The index counts along `DATA_DIMENSIONS`, outermost first; ranks that differ in other dimensions only have the
        same index. `group` contains the ranks with the other shards; None if these are all ranks.

    Raises:
        ValueError: If the mesh's dimensions have no names, or this process is not part of it.
    """
    names = mesh.mesh_dim_names
    coordinate = mesh.get_coordinate()
    if names is None or coordinate is None:
        problem = "its dimensions have no names" if names is None else "this process is not part of it"
        raise ValueError(
            f"the device mesh does not determine which shard of the data this process reads: {problem}. Name the dimensions "
            f"{' and '.join(DATA_DIMENSIONS)} (init_device_mesh(..., mesh_dim_names=...)), over all processes of the run."
        )
    index, count = 0, 1
    for dimension in DATA_DIMENSIONS:
        if dimension in names:
            position = names.index(dimension)
            size = mesh.size(position)
            index, count = index * size + coordinate[position], count * size
    require_batch = tuple(name for name in DATA_DIMENSIONS if name in names)
    if count in (1, mesh.size()):
        return DataShard(index, count)
    # Flattening two dimensions creates a group, which every rank of the mesh does here.
    group = mesh.get_group(require_batch[0]) if len(require_batch) == 1 else mesh[require_batch]._flatten().get_group()
    return DataShard(index, count, group)
