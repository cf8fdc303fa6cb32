"""Splits a collection between ranks by slicing, without communication."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def bounds(length: int, index: int, count: int) -> tuple[int, int]:
    """Returns start and end of slice `index` of `count`; if the division is uneven, the first slices have one item more."""
    base, extra = divmod(length, count)
    start = index * base + min(index, extra)
    return start, start + base + (index < extra)


def split(inputs: Any, index: int, count: int, *, apply_padding: bool = False) -> Any:
    """Returns slice `index` of `count` of a list, tuple, tensor, array or dataset, or of each value of a mapping.

    Args:
        inputs: The collection, which is not modified. A string is returned whole. The values of a mapping must have equal
            lengths.
        index: Index of the slice, 0 to ``count - 1``.
        count: Number of slices. With more slices than items the last ones are empty.
        apply_padding: Repeat the last item until all slices have equal length, so that they can be gathered.

    Raises:
        TypeError: for an object that cannot be sliced.
        ValueError: for a mapping whose values differ in length.
    """
    if count == 1 or isinstance(inputs, str):
        return inputs
    if isinstance(inputs, Mapping):
        lengths = {key: len(value) for key, value in inputs.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"a dict can be split between processes if its values have equal lengths; these have {lengths}."
            )
        parts = {key: split(value, index, count, apply_padding=apply_padding) for key, value in inputs.items()}
        return parts if type(inputs) is dict else _like(inputs, parts)
    if not hasattr(inputs, "__len__") or not (_is_dataset(inputs) or isinstance(inputs, _SLICEABLE)):
        raise TypeError(
            f"cannot split a {type(inputs).__name__} between processes: pass a list, a tuple, a tensor, an array, a "
            "datasets.Dataset, or a dict of these."
        )
    start, end = bounds(len(inputs), index, count)
    missing = -(-len(inputs) // count) - (end - start) if apply_padding else 0
    if _is_dataset(inputs):
        return inputs.select([*range(start, end), *[len(inputs) - 1] * missing])
    part = inputs[start:end]
    return _pad(part, inputs[-1:], missing) if missing else part


_SLICEABLE = (list, tuple, torch.Tensor, np.ndarray)


def _is_dataset(inputs: object) -> bool:
    # Duck-typed, in order not to import datasets.
    return hasattr(inputs, "select") and hasattr(inputs, "column_names")


def _like(original: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    try:
        return type(original)(parts)  # type: ignore[call-arg]
    except TypeError:  # the class has another constructor
        return parts


def _pad(part: Any, last: Any, missing: int) -> Any:
    if isinstance(part, torch.Tensor):
        return torch.cat([part, *[last.to(part.device)] * missing])
    if isinstance(part, np.ndarray):
        return np.concatenate([part, *[last] * missing])
    return part + last * missing
