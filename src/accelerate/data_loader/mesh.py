"""Who reads which part of the data on a device mesh."""

from __future__ import annotations

from typing import Any

from ..runtime.world import DataShard

DATA_DIMENSIONS = ("dp_replicate", "dp_shard")
"""Dimensions along which ranks see different data; along all others they hold parts of one model."""


def data_ranks_of_mesh(mesh: Any) -> DataShard:
    """The part of the data that this process reads.

    Args:
        mesh: A `torch.distributed.device_mesh.DeviceMesh` with named dimensions.

    Returns:
        Its index counts along `DATA_DIMENSIONS`, outermost first; ranks which differ in other dimensions only share
        one. `group` is that of the ranks with the other parts; None where they are all ranks.

    Raises:
        ValueError: when the mesh's dimensions have no names, or this process is not on it.
    """
    names = mesh.mesh_dim_names
    coordinate = mesh.get_coordinate()
    if names is None or coordinate is None:
        problem = "its dimensions have no names" if names is None else "this process is not on it"
        raise ValueError(
            f"cannot tell from the device mesh which part of the data this process reads: {problem}. Name the dimensions "
            f"{' and '.join(DATA_DIMENSIONS)} (init_device_mesh(..., mesh_dim_names=...)), over all processes of the run."
        )
    index, count = 0, 1
    for dimension in DATA_DIMENSIONS:
        if dimension in names:
            place = names.index(dimension)
            size = mesh.size(place)
            index, count = index * size + coordinate[place], count * size
    require_batch = tuple(name for name in DATA_DIMENSIONS if name in names)
    if count in (1, mesh.size()):
        return DataShard(index, count)
    # Every rank of the mesh comes by here, so that the group of two dimensions can be made.
    group = mesh.get_group(require_batch[0]) if len(require_batch) == 1 else mesh[require_batch]._flatten().get_group()
    return DataShard(index, count, group)
