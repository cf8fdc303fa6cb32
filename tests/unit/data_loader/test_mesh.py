"""Shards of the data on a device mesh."""

from __future__ import annotations

from typing import Any

import pytest

from accelerate.data_loader import data_shard_of_mesh


class Mesh:
    """What is asked of a `DeviceMesh`; the real one is in tests/processes."""

    def __init__(self, names: tuple[str, ...] | None, shape: tuple[int, ...], place: list[int] | None) -> None:
        self.mesh_dim_names = names
        self.shape = shape
        self.place = place

    def get_coordinate(self) -> list[int] | None:
        return self.place

    def size(self, dimension: int | None = None) -> int:
        if dimension is not None:
            return self.shape[dimension]
        total = 1
        for size in self.shape:
            total *= size
        return total

    def get_group(self, name: str) -> str:
        return f"group of {name}"


@pytest.mark.parametrize(
    ("names", "shape", "place", "expected"),
    [
        (("dp_replicate", "dp_shard"), (2, 3), [1, 2], (5, 6, None)),
        (("dp_shard", "tp"), (2, 4), [1, 3], (1, 2, "group of dp_shard")),
        (("dp_replicate", "tp"), (2, 4), [1, 3], (1, 2, "group of dp_replicate")),
        (("tp",), (4,), [2], (0, 1, None)),
    ],
)
def test_mesh_determines_the_shard(names: Any, shape: Any, place: Any, expected: tuple[int, int, Any]) -> None:
    ranks = data_shard_of_mesh(Mesh(names, shape, place))
    assert (ranks.index, ranks.count, ranks.group) == expected


def test_a_mesh_without_names_is_rejected() -> None:
    with pytest.raises(ValueError, match="its dimensions have no names"):
        data_shard_of_mesh(Mesh(None, (2,), [0]))
    with pytest.raises(ValueError, match="this process is not part of it"):
        data_shard_of_mesh(Mesh(("dp_shard",), (2,), None))
