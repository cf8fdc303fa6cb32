"""Trees of tensors: nested lists, tuples, named tuples and mappings with tensors and other objects as leaves.

Local functions without communication: apply, move, slice, concatenate, convert. Results have new containers of the input's
types; other leaves are returned unchanged. `torch.utils._pytree` treats unregistered subclasses of list, dict and Mapping
as leaves.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

_Tree = TypeVar("_Tree")

_HALF_DTYPES = (torch.float16, torch.bfloat16)
_Tensor = torch.Tensor


@dataclass
class TensorInformation:
    """Shape and dtype of a tensor.

    Attributes:
        shape: The shape.
        dtype: The dtype.
    """

    shape: torch.Size
    dtype: torch.dtype


# Type checks --------------------------------------------------------------------------------------------------------


def is_torch_tensor(tensor: Any) -> bool:
    """Returns whether an object is a `torch.Tensor`."""
    return isinstance(tensor, torch.Tensor)


def is_torch_xpu_tensor(tensor: Any) -> bool:
    """Returns whether an object is a `torch.Tensor` on an Intel GPU."""
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "xpu"


def is_tensor_information(tensor_info: Any) -> bool:
    """Returns whether an object is a `TensorInformation`."""
    return isinstance(tensor_info, TensorInformation)


def is_namedtuple(data: Any) -> bool:
    """Returns whether an object is a named tuple: a tuple whose class has ``_fields`` and ``_asdict``."""
    return isinstance(data, tuple) and hasattr(data, "_asdict") and hasattr(data, "_fields")


def contains_only_tensors(data: Any) -> bool:
    """Returns whether a tree has tensors, and no other leaves."""
    found: list[torch.Tensor] = []
    try:
        _apply(found.append, data, (), {}, is_torch_tensor, True)
    except _UnsupportedLeafError:
        return False
    return bool(found)


# Building containers ------------------------------------------------------------------------------------------------


def honor_type(obj: Any, generator: Iterable[Any]) -> Any:
    """Builds a list or tuple of the same class as `obj` from the items of `generator`.

    Args:
        obj: A list, a tuple, or an instance of a subclass, including named tuples.
        generator: The items; for a named tuple, one for each field.
    """
    kind = type(obj)
    if kind is list or kind is tuple:
        return kind(generator)
    return kind(*generator) if is_namedtuple(obj) else kind(generator)


def _like_mapping(data: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    kind = type(data)
    if kind is dict:
        return items
    if isinstance(data, defaultdict):
        return kind(data.default_factory, items)  # type: ignore[call-arg]  # Mapping's own __init__ takes nothing
    try:
        return kind(items)  # type: ignore[call-arg]
    except TypeError as error:
        raise TypeError(
            f"a {kind.__name__} cannot be rebuilt with new values: {error}. Its constructor must accept a mapping; else "
            "pass a plain dict."
        ) from error


# Applying a function ------------------------------------------------------------------------------------------------


class _UnsupportedLeafError(Exception):
    """Carries an unsupported leaf to the function that has the whole tree and can report its path."""

    def __init__(self, leaf: Any) -> None:
        super().__init__()
        self.leaf = leaf


def recursively_apply(
    func: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] = is_torch_tensor,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """Applies `func` to every leaf of `data` that passes `test_type`.

    Args:
        func: Called as ``func(leaf, *args, **kwargs)``.
        data: A tree.
        *args: Passed to `func`.
        test_type: Returns whether to apply `func` to a leaf.
        error_on_other_type: Raise for other leaves instead of returning them unchanged.
        **kwargs: Passed to `func`.

    Returns:
        The tree with the results of `func` as leaves.

    Raises:
        TypeError: for such a leaf, with its path in `data`.

    Example:
        ```python
        recursively_apply(lambda t: t + 1, {"a": torch.ones(2), "b": [torch.zeros(1), "text"]})
        ```
    """
    try:
        return _apply(func, data, args, kwargs, test_type, error_on_other_type)
    except _UnsupportedLeafError as found:
        name = getattr(func, "__name__", type(func).__name__)
        raise TypeError(_leaf_error(name, data, found.leaf, getattr(test_type, "__name__", "test_type"))) from None


def map_tensors(operation: str, func: Callable[..., Any], data: Any, *args: Any) -> Any:
    """Applies `func` to every leaf of a tree, which must be tensors; `operation` is its name in errors.

    Raises:
        TypeError: if a leaf is not a tensor.
    """
    if isinstance(data, torch.Tensor):
        return func(data, *args)
    try:
        return _apply(func, data, args, {}, is_torch_tensor, True)
    except _UnsupportedLeafError as found:
        raise TypeError(_leaf_error(operation, data, found.leaf, "is_torch_tensor")) from None


def _apply(
    func: Callable[..., Any],
    data: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    test_type: Callable[[Any], bool],
    strict: bool,
) -> Any:
    if isinstance(data, (list, tuple)):
        return honor_type(data, [_apply(func, item, args, kwargs, test_type, strict) for item in data])
    if isinstance(data, Mapping):
        items = {key: _apply(func, value, args, kwargs, test_type, strict) for key, value in data.items()}
        return _like_mapping(data, items)
    if test_type(data):
        return func(data, *args, **kwargs)
    if strict:
        raise _UnsupportedLeafError(data)
    return data


def _leaf_error(operation: str, data: Any, leaf: Any, test: str) -> str:
    wanted = "a tensor" if test == "is_torch_tensor" else f"leaves that pass `{test}`"
    where = _path_to(leaf, data)
    return (
        f"{operation} was given a {type(leaf).__name__} ({_short_repr(leaf)}){f' at {where}' if where else ''}; it "
        f"takes {wanted}, or lists, tuples and mappings of these. For other objects use gather_object or "
        "broadcast_object_list."
    )


def _short_repr(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _path_to(leaf: Any, data: Any) -> str | None:
    """Returns the path of a leaf in a tree as an index expression (``["a"][0]``)."""
    if data is leaf:
        return ""
    if isinstance(data, Mapping):
        children: Iterable[tuple[Any, Any]] = data.items()
    elif isinstance(data, (list, tuple)):
        children = enumerate(data)
    else:
        return None
    for key, child in children:
        rest = _path_to(leaf, child)
        if rest is not None:
            return f"[{key!r}]{rest}"
    return None


# Moving -------------------------------------------------------------------------------------------------------------


def send_to_device(
    tensor: _Tree,
    device: torch.device | str | int,
    non_blocking: bool = False,
    skip_keys: str | Sequence[str] | None = None,
) -> _Tree:
    """Moves every tensor of a tree, and every object with a ``to`` method, to a device.

    Args:
        tensor: A tensor, an object with ``to`` (a module, a transformers ``BatchEncoding``, a ``PackedSequence`` …), or
            lists, tuples and mappings of these. Other objects are returned unchanged.
        device: The device.
        non_blocking: Copy asynchronously if possible (from pinned memory to an accelerator). Passed to ``to`` methods that
            accept it.
        skip_keys: Key or keys of mappings, at any depth, whose values are not moved.

    Returns:
        The same containers with the moved tensors. A tensor that is on the device already is the same object.

    Example:
        ```python
        batch = send_to_device({"ids": ids, "labels": labels, "id": "a7"}, "cuda", non_blocking=True)
        ```
    """
    if isinstance(device, str):
        device = torch.device(device)
    if skip_keys is not None:
        skip_keys = (skip_keys,) if isinstance(skip_keys, str) else tuple(skip_keys)
    return _move(tensor, device, non_blocking, skip_keys)


def _move(
    data: Any,
    device: torch.device | int,
    non_blocking: bool,
    skip: tuple[str, ...] | None,
) -> Any:
    # Exact classes first: the common case, by the cheapest check. Tensors that are on the device already are skipped
    # inline, since a call would dominate the time of a small batch.
    kind = type(data)
    if kind is _Tensor:
        return data if data.device == device else data.to(device, non_blocking=non_blocking)
    if kind is dict and skip is None:
        return {
            key: value
            if type(value) is _Tensor and value.device == device
            else _move(value, device, non_blocking, None)
            for key, value in data.items()
        }
    if kind is list or kind is tuple:
        moved = [
            item if type(item) is _Tensor and item.device == device else _move(item, device, non_blocking, skip)
            for item in data
        ]
        return moved if kind is list else tuple(moved)
    is_mapping = isinstance(data, Mapping)
    # A mapping with a key to skip is traversed even if it has `to`, which would move all of it.
    skips_here = is_mapping and skip is not None and any(key in data for key in skip)
    if not skips_here and not isinstance(data, type) and hasattr(data, "to"):
        takes_it = _to_takes_non_blocking(kind)
        return data.to(device, non_blocking=non_blocking) if takes_it else data.to(device)
    if is_mapping:
        items = {k: v if skip and k in skip else _move(v, device, non_blocking, skip) for k, v in data.items()}
        return _like_mapping(data, items)
    if isinstance(data, (list, tuple)):
        return honor_type(data, [_move(item, device, non_blocking, skip) for item in data])
    return data


# Cached per class, since `inspect.signature` takes longer than a small copy.
_TAKES_NON_BLOCKING: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _to_takes_non_blocking(kind: type) -> bool:
    known = _TAKES_NON_BLOCKING.get(kind)
    if known is None:
        known = _TAKES_NON_BLOCKING[kind] = _declares_non_blocking(kind)
    return known


def _declares_non_blocking(kind: type) -> bool:
    method = getattr(kind, "to", None)
    if method is None:  # an instance attribute, or from __getattr__
        return False
    if issubclass(kind, (torch.Tensor, torch.nn.Module)):
        return True
    try:
        parameters = inspect.signature(method).parameters
    except ValueError:  # a C method without a signature
        return False
    return "non_blocking" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def find_device(data: Any) -> torch.device | None:
    """Returns the device of the first tensor in a tree, or None if there is none."""
    found = _find_first(data, is_torch_tensor)
    return None if found is None else found.device


def _find_first(data: Any, test: Callable[[Any], bool]) -> torch.Tensor | None:
    if isinstance(data, Mapping):
        children: Iterable[Any] = data.values()
    elif isinstance(data, (list, tuple)):
        children = data
    else:
        return data if test(data) else None
    for child in children:
        found = _find_first(child, test)
        if found is not None:
            return found
    return None


# Sizes, slices ------------------------------------------------------------------------------------------------------


def find_batch_size(data: Any) -> int:
    """Returns the size of dimension 0 of the first tensor in a tree that has a dimension.

    Raises:
        ValueError: if `data` is an empty container.
        TypeError: if it has no such tensor.
    """
    found = _find_first(data, _has_dimension)
    if found is not None:
        return int(found.shape[0])
    if isinstance(data, (list, tuple, Mapping)) and not data:
        raise ValueError(f"an empty {type(data).__name__} has no batch size.")
    raise TypeError(
        f"no batch size in a {type(data).__name__} ({_short_repr(data)}): expected a tensor with at least one "
        "dimension, or lists, tuples and mappings with one."
    )


def ignorant_find_batch_size(data: Any) -> int | None:
    """Returns `find_batch_size` of a tree, or None if it has no tensor with a dimension."""
    found = _find_first(data, _has_dimension)
    return None if found is None else int(found.shape[0])


def _has_dimension(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


def slice_tensors(
    data: _Tree,
    tensor_slice: Any,
    process_index: int | None = None,
    num_processes: int | None = None,
) -> _Tree:
    """Takes ``tensor[tensor_slice]`` of every tensor in a tree.

    Args:
        data: A tensor, or lists, tuples and mappings of tensors. Other leaves are returned unchanged.
        tensor_slice: An index of a tensor, usually a `slice` of dimension 0.
        process_index: Unused; accepted for compatibility.
        num_processes: Unused; accepted for compatibility.
    """
    return _apply(_index, data, (tensor_slice,), {}, is_torch_tensor, False)


def _index(tensor: torch.Tensor, tensor_slice: Any) -> torch.Tensor:
    return tensor[tensor_slice]


def concatenate(data: Sequence[Any], dim: int = 0) -> Any:
    """Concatenates the tensors of several trees of one structure along `dim`.

    Args:
        data: At least one tree; all have the same containers, lengths and keys.
        dim: The dimension along which tensors are concatenated.

    Returns:
        One tree of that structure.

    Raises:
        ValueError: if `data` is empty, or lengths or keys differ.
        TypeError: if a leaf is not a tensor.

    Example:
        ```python
        concatenate([{"a": torch.ones(1, 2)}, {"a": torch.zeros(2, 2)}])["a"].shape  # (3, 2)
        ```
    """
    if len(data) == 0:
        raise ValueError("concatenate needs at least one tree of tensors, and was given none.")
    first = data[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(data), dim=dim)
    if isinstance(first, (list, tuple)):
        lengths = [len(tree) for tree in data]
        if len(set(lengths)) > 1:
            raise ValueError(f"concatenate needs trees of one structure, but these have lengths {lengths}.")
        return honor_type(
            first,
            [concatenate([tree[i] for tree in data], dim) for i in range(len(first))],
        )
    if isinstance(first, Mapping):
        for tree in data:
            if tree.keys() != first.keys():
                raise ValueError(
                    f"concatenate needs trees of one structure, but keys are {list(first)} and {list(tree)}."
                )
        return _like_mapping(
            first,
            {key: concatenate([tree[key] for tree in data], dim) for key in first},
        )
    raise TypeError(
        f"concatenate was given a {type(first).__name__} ({_short_repr(first)}); it takes tensors, or lists, tuples and "
        "mappings of tensors."
    )


# Structure ----------------------------------------------------------------------------------------------------------


def get_data_structure(data: Any) -> Any:
    """Replaces every tensor of a tree by its `TensorInformation`."""
    return _apply(_describe, data, (), {}, is_torch_tensor, False)


def _describe(tensor: torch.Tensor) -> TensorInformation:
    return TensorInformation(shape=tensor.shape, dtype=tensor.dtype)


def initialize_tensors(data_structure: Any) -> Any:
    """Replaces every `TensorInformation` of a tree by an uninitialized CPU tensor of that shape and dtype."""
    return _apply(_allocate, data_structure, (), {}, is_tensor_information, False)


def _allocate(information: TensorInformation) -> torch.Tensor:
    return torch.empty(information.shape, dtype=information.dtype)


def get_shape(data: Any) -> Any:
    """Replaces every tensor of a tree by its shape, as a list."""
    return _apply(_shape, data, (), {}, is_torch_tensor, False)


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def listify(data: Any) -> Any:
    """Replaces every tensor of a tree by nested lists of Python numbers; a scalar becomes a number."""
    return _apply(torch.Tensor.tolist, data, (), {}, is_torch_tensor, False)


# Precision ----------------------------------------------------------------------------------------------------------


def convert_to_fp32(tensor: Any) -> Any:
    """Converts every float16 and bfloat16 tensor of a tree to float32; other leaves are returned unchanged."""
    if type(tensor) is torch.Tensor:
        return tensor.float() if tensor.dtype in _HALF_DTYPES else tensor
    return _apply(torch.Tensor.float, tensor, (), {}, _is_half, False)


def _is_half(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype in _HALF_DTYPES


class ConvertOutputsToFp32:
    """Wraps a function to convert its results by `convert_to_fp32`. Can be pickled if the function can.

    Args:
        model_forward: The function; stored as ``model_forward`` and ``__wrapped__``.
    """

    def __init__(self, model_forward: Callable[..., Any]) -> None:
        self.model_forward = model_forward
        functools.update_wrapper(self, model_forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return convert_to_fp32(self.model_forward(*args, **kwargs))


def convert_outputs_to_fp32(model_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: converts half-precision results of a function to float32.

    Args:
        model_forward: Any function; the result has it as ``__wrapped__``.

    Example:
        ```python
        @convert_outputs_to_fp32
        def scores(x):
            return x.bfloat16()  # returned as float32
        ```
    """
    converted = ConvertOutputsToFp32(model_forward)

    @functools.wraps(model_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return converted(*args, **kwargs)

    return forward
