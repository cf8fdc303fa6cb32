"""Dividing collections over ranks."""

from __future__ import annotations

from collections import UserDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate.runtime.cluster import partition


@given(st.integers(0, 40), st.integers(1, 9))
def test_bounds_cover_everything_once_and_evenly(length, count):
    ranges = [partition.bounds(length, index, count) for index in range(count)]
    assert [i for start, end in ranges for i in range(start, end)] == list(range(length))
    sizes = [end - start for start, end in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
def test_padding_makes_all_parts_equal(items, count):
    parts = [partition.split(items, index, count, apply_padding=True) for index in range(count)]
    assert len({len(part) for part in parts}) == 1
    if items:
        plain = [partition.split(items, index, count) for index in range(count)]
        for padded, part in zip(parts, plain, strict=True):
            assert padded[: len(part)] == part
            assert set(padded[len(part) :]) <= {items[-1]}


def test_kinds_of_input():
    assert partition.split((1, 2, 3), 1, 2, apply_padding=True) == (3, 3)
    assert partition.split(torch.arange(3), 1, 2, apply_padding=True).tolist() == [2, 2]
    assert partition.split(np.arange(3), 1, 2, apply_padding=True).tolist() == [2, 2]
    assert partition.split("abc", 1, 2) == "abc"
    mapping = UserDict(a=[1, 2, 3])
    part = partition.split(mapping, 0, 2)
    assert type(part) is UserDict and part["a"] == [1, 2]
    assert mapping["a"] == [1, 2, 3], "the input is left as it was"
    assert partition.split([5], 2, 3) == []


def test_a_dataset_is_selected_from():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": [0, 1, 2]})
    assert partition.split(data, 1, 2)["x"][:] == [2]
    assert partition.split(data, 1, 2, apply_padding=True)["x"][:] == [2, 2]


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(TypeError, match="cannot split a int"):
        partition.split(5, 0, 2)
    with pytest.raises(TypeError, match="cannot split a set"):
        partition.split({1, 2}, 0, 2)
    with pytest.raises(ValueError, match=r"\{'a': 3, 'b': 1\}"):
        partition.split({"a": [1, 2, 3], "b": [1]}, 0, 2)
