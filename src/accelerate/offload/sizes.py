"""Sizes of a model in bytes: of each tensor, of each module, of the largest layer, and in total.

A tied tensor counts once, under its first name. Values are never read, so models on the meta device have the same sizes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..settings.enums import CustomDtype
from .module_tree import ModuleTree, build_tree, split_points

Dtype = str | torch.dtype | CustomDtype
Sizes = defaultdict[str, int]

_SUB_BYTE = {CustomDtype.FP8: 1.0, CustomDtype.INT4: 0.5, CustomDtype.INT2: 0.25, torch.bool: 0.125}


def is_shape(dimensions: Sequence[object]) -> bool:
    """True if torch can have a tensor of these dimensions: integers whose product, zeros aside, fits into 64 bits."""
    if not all(type(size) is int and 0 <= size < 2**63 for size in dimensions):
        return False
    sizes = [size for size in dimensions if isinstance(size, int) and size]
    return math.prod(sizes) < 2**63


def dtype_byte_size(dtype: torch.dtype | CustomDtype) -> float:
    """Returns the bytes per element of a dtype: 0.5 for ``CustomDtype.INT4``, 0.125 for a boolean.

    Raises:
        ValueError: for anything but a dtype.
    """
    if dtype in _SUB_BYTE:
        return _SUB_BYTE[dtype]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected a torch.dtype or a CustomDtype; got {dtype!r}.")
    return dtype.itemsize


def as_dtype(dtype: Dtype | None) -> torch.dtype | CustomDtype | None:
    """Returns the dtype of a name (``"float16"``, ``"torch.float16"``, ``"int4"``); returns a dtype unchanged.

    Raises:
        ValueError: for an unknown name.
    """
    if not isinstance(dtype, str):
        return dtype
    name = dtype.removeprefix("torch.")
    found = getattr(torch, name, None)
    if isinstance(found, torch.dtype):
        return found
    try:
        return CustomDtype(name)
    except ValueError:
        known = ", ".join(member.value for member in CustomDtype)
        raise ValueError(
            f"unknown dtype {dtype!r}: expected the name of a torch dtype such as 'float16', or {known}."
        ) from None


class SizeMeasure:
    """Computes sizes of tensors as if they were converted.

    Args:
        dtype: Convert floating-point tensors to this dtype if that makes them smaller; None: do not convert.
        special_dtypes: Dtypes of single tensors by name, applied in any case.

    Raises:
        ValueError: for an unknown dtype.
    """

    def __init__(self, dtype: Dtype | None = None, special_dtypes: Mapping[str, Dtype] | None = None) -> None:
        wanted = as_dtype(dtype)
        self._limit = math.inf if wanted is None else dtype_byte_size(wanted)
        self._special: dict[str, float] = {}
        for name, given in (special_dtypes or {}).items():
            special = as_dtype(given)
            assert special is not None, name
            self._special[name] = dtype_byte_size(special)

    def all(self, tree: ModuleTree) -> list[int]:
        """Returns the bytes of each tensor of a tree; repeated occurrences of a tied tensor count 0."""
        sizes = tree.sizes.copy()
        if self._limit < math.inf:
            for position, tensor in enumerate(tree.tensors):
                each = tensor.itemsize
                if each > self._limit and (tensor.is_floating_point() or tensor.is_complex()):
                    sizes[position] = math.ceil(sizes[position] // each * self._limit)
        if self._special:
            for position, name in enumerate(tree.tensor_names):
                if name in self._special:
                    sizes[position] = math.ceil(tree.tensors[position].numel() * self._special[name])
        for positions in tree.repeated.values():
            for position in positions[1:]:
                sizes[position] = 0
        return sizes


def compute_module_sizes(
    model: nn.Module,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    buffers_only: bool = False,
) -> Sizes:
    """Returns the bytes of every tensor and module of a model, by dotted name; the model itself is ``""``.

    Args:
        model: The model, on any device.
        dtype: Compute sizes as if floating-point tensors were converted to this dtype, if that makes them smaller.
        special_dtypes: Compute sizes as if these tensors, by name, were converted to these dtypes.
        buffers_only: Count buffers only.

    Returns:
        Sizes by name; 0 for unknown names.
    Example:
        ```python
        compute_module_sizes(torch.nn.Linear(10, 2))  # {"weight": 80, "bias": 8, "": 88}
        ```
    """
    return sizes_of(build_tree(model, parameters=not buffers_only, sizes=True), SizeMeasure(dtype, special_dtypes))


def sizes_of(tree: ModuleTree, measure: SizeMeasure) -> Sizes:
    """Implements `compute_module_sizes` for an existing tree."""
    each = measure.all(tree)
    again = {position for positions in tree.repeated.values() for position in positions[1:]}
    totals = [0] * len(tree)
    held = [False] * len(tree)
    sizes: Sizes = defaultdict(int)
    for here in range(len(tree)):
        for position in range(tree.starts[here], tree.starts[here + 1]):
            if position not in again:
                sizes[tree.tensor_names[position]] = each[position]
                totals[here] += each[position]
                held[here] = True
    for here in range(len(tree) - 1, 0, -1):
        parent = tree.parents[here]
        totals[parent] += totals[here]
        held[parent] = held[parent] or held[here]
    sizes.update((name, total) for name, total, any_there in zip(tree.names, totals, held, strict=True) if any_there)
    return sizes


def compute_module_total_buffer_size(
    model: nn.Module, dtype: Dtype | None = None, special_dtypes: Mapping[str, Dtype] | None = None
) -> int:
    """Returns the bytes of all buffers of a model; arguments as for `compute_module_sizes`."""
    return compute_module_sizes(model, dtype, special_dtypes, buffers_only=True)[""]


def get_module_leaves(module_sizes: Mapping[str, object]) -> list[str]:
    """Returns the names of modules and tensors that contain no others.

    Args:
        module_sizes: Sizes from `compute_module_sizes`.
    """
    around = {name.rpartition(".")[0] for name in module_sizes if name}
    return [name for name in module_sizes if name not in around]


def get_max_layer_size(
    modules: Iterable[tuple[str, torch.nn.Module | torch.Tensor]],
    module_sizes: Mapping[str, int],
    no_split_module_classes: Sequence[str] | str | None,
) -> tuple[int, list[str]]:
    """Returns the size of the largest layer among some modules and their submodules, and the names of all that large.

    A layer is a unit that stays on one device: a module without children or of a class that is not split, or a tensor.

    Args:
        modules: Pairs of name and module (or tensor).
        module_sizes: Sizes from `compute_module_sizes`.
        no_split_module_classes: Names of classes whose modules are not split.
    """
    whole = split_points(no_split_module_classes)
    largest, names = 0, list[str]()
    pending = list(modules)[::-1]
    while pending:
        name, module = pending.pop()
        children = list(module.named_children()) if isinstance(module, nn.Module) and not whole(module) else []
        if not children:
            size = module_sizes.get(name, 0)
            if size > largest:
                largest, names = size, []
            if size == largest:
                names.append(name)
            continue
        assert isinstance(module, nn.Module)
        inside: list[tuple[str, torch.nn.Module | torch.Tensor]] = [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
            *children,
        ]
        pending += [(f"{name}.{key}" if name else key, value) for key, value in inside[::-1]]
    return largest, names


def calculate_maximum_sizes(model: nn.Module) -> tuple[int, tuple[int, list[str]]]:
    """Returns the bytes of a model, and those of its largest layer with the names of all layers of that size.

    Args:
        model: The model; classes in its ``_no_split_modules``, as in transformers, count as one layer each.
    """
    sizes = compute_module_sizes(model)
    kept_whole = getattr(model, "_no_split_modules", None) or []
    return sizes[""], get_max_layer_size([("", model)], sizes, list(kept_whole))
