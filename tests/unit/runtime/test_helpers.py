"""Small functions over plain values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerate.runtime.helpers import (
    convert_bytes,
    get_pretty_name,
    merge_dicts,
    recursive_getattr,
    wait_for_everyone,
)

UNITS = {"bytes": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40, "PB": 2**50}


@given(st.integers(-(2**55), 2**60))
def test_bytes_are_right_to_two_places(size):
    number, unit = convert_bytes(size).split()
    assert float(number) * UNITS[unit] == pytest.approx(size, abs=0.005001 * UNITS[unit], rel=1e-12)
    assert unit == "PB" or abs(float(number)) <= 1024


VALUES = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=6
)
DICTS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


@given(DICTS, DICTS)
def test_the_source_wins_and_nothing_else_is_lost(source, destination):
    def paths(tree, prefix=()):
        for key, value in tree.items():
            yield from paths(value, (*prefix, key)) if isinstance(value, dict) and value else [((*prefix, key), value)]

    wanted = dict(paths(source))
    merged = merge_dicts(source, destination)
    assert merged is destination
    have = dict(paths(merged))
    assert all(path in have and have[path] == value for path, value in wanted.items() if value != {})


def test_names():
    class Outer:
        def method(self):
            pass

    assert get_pretty_name(Outer.method).endswith("Outer.method")
    assert get_pretty_name(Outer()).endswith("Outer")
    assert get_pretty_name(len) == "len"


def test_a_missing_attribute_is_named():
    with pytest.raises(AttributeError, match="'int' object has no attribute 'nothing'"):
        recursive_getattr(3, "real.nothing")


def test_alone_nobody_waits():
    wait_for_everyone()
