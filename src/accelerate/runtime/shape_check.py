"""Debug mode: compares the inputs of a collective across processes before it runs.

On a mismatch every process raises `DistributedOperationException` with all shapes, where the collective itself would hang
or return wrong values. The comparison is an all-gather of objects, whose form does not depend on the inputs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch

from .collective_backend import Collectives
from .world import current

_F = TypeVar("_F", bound=Callable[..., Any])

_PUBLIC = "accelerate.utils.operations"


class DistributedOperationException(Exception):
    """Raised on every process if their inputs to an operation do not match; the message has all shapes."""


def verify_operation(function: _F) -> _F:
    """Decorator: in debug mode, checks that the first argument has the same structure, shapes and dtypes on all processes.

    Raises:
        DistributedOperationException: on every process if they differ, with all of them.
    """
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def verified(*args: Any, **kwargs: Any) -> Any:
        here = current()
        if here.debug and here.size > 1:
            check_all_equal(here.collectives, function.__name__, summarize(args[0] if args else kwargs.get(first)))
        return function(*args, **kwargs)

    return verified  # type: ignore[return-value]  # same signature


def chained_operation(function: _F) -> _F:
    """Decorator: adds the function's name to a `DistributedOperationException` raised inside it."""

    @functools.wraps(function)
    def chained(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except DistributedOperationException as error:
            raise DistributedOperationException(f"while calling `{_PUBLIC}.{function.__name__}`: {error}") from error

    return chained  # type: ignore[return-value]  # same signature


def summarize(data: Any) -> Any:
    """Summarizes a tree for the comparison: containers, shapes and dtypes as picklable tuples, in order of traversal."""
    if isinstance(data, torch.Tensor):
        shape = "nested" if data.is_nested else tuple(data.shape)
        return ("tensor", shape, str(data.dtype).removeprefix("torch."))
    if isinstance(data, Mapping):
        return ("mapping", tuple((repr(key), summarize(value)) for key, value in data.items()))
    if isinstance(data, (list, tuple)):
        return ("sequence", tuple(summarize(item) for item in data))
    return ("other", type(data).__name__)


def ndim_only(summary: Any) -> Any:
    """Reduces a summary to the numbers of dimensions of its tensors."""
    kind, content = summary[:2]
    if kind == "tensor":
        return (kind, content if content == "nested" else len(content))
    if kind == "mapping":
        return (kind, tuple((key, ndim_only(value)) for key, value in content))
    if kind == "sequence":
        return (kind, tuple(ndim_only(item) for item in content))
    return summary


def check_all_equal(comm: Collectives, operation: str, summary: Any, key: Callable[[Any], Any] = lambda it: it) -> None:
    reports: list[tuple[str, Any]] = comm.all_gather_object((operation, summary))
    if any(name != operation or key(other) != key(summary) for name, other in reports):
        raise_mismatch(reports)


def raise_mismatch(reports: list[tuple[str, Any]]) -> NoReturn:
    names = [name for name, _ in reports]
    lines = [f"  - Process {rank}: {_format(summary)}" for rank, (_, summary) in enumerate(reports)]
    if len(set(names)) > 1:
        called = ", ".join(f"process {rank} `{_PUBLIC}.{name}`" for rank, name in enumerate(names))
        title = "The processes called different operations; all must call the same ones, in the same order."
        raise DistributedOperationException(f"{title}\n\nOperations: {called}\nInput shapes:\n" + "\n".join(lines))
    if names[0] == "pad_across_processes":
        title = "Padding needs tensors with the same number of dimensions on every process."
    else:
        title = "The operation needs tensors of the same shape and dtype, in the same structure, on every process."
    raise DistributedOperationException(
        f"{title}\n\nOperation: `{_PUBLIC}.{names[0]}`\nInput shapes:\n" + "\n".join(lines) + f"\n\n{_advice(reports)}"
    )


def _advice(reports: list[tuple[str, Any]]) -> str:
    tensors = [list(_tensors_of(summary)) for _, summary in reports]
    if len({_structure(summary) for _, summary in reports}) > 1:
        return "Pass the same containers, with the same keys in the same order, on every process."
    if any(len({len(shape) for shape, _ in leaf}) > 1 for leaf in zip(*tensors, strict=True)):
        return "Give the tensors the same number of dimensions on every process (reshape, squeeze, unsqueeze)."
    if any(len({shape for shape, _ in leaf}) > 1 for leaf in zip(*tensors, strict=True)):
        return "Pad them to one size first: `pad_across_processes(tensor, dim=...)`."
    return "Convert them to one dtype first: `tensor.to(dtype)`."


def _structure(summary: Any) -> Any:
    kind, content = summary[:2]
    if kind == "mapping":
        return (kind, tuple((key, _structure(value)) for key, value in content))
    if kind == "sequence":
        return (kind, tuple(_structure(item) for item in content))
    return kind if kind == "tensor" else summary


def _tensors_of(summary: Any) -> Iterator[tuple[Any, str]]:
    kind, content = summary[:2]
    if kind == "tensor":
        yield content, summary[2]
    elif kind != "other":
        for item in content:
            yield from _tensors_of(item[1] if kind == "mapping" else item)


def _format(summary: Any) -> str:
    kind, content = summary[:2]
    if kind == "tensor":
        return f"{list(content) if content != 'nested' else 'nested'} {summary[2]}"
    if kind == "mapping":
        return "{" + ", ".join(f"{key}: {_format(value)}" for key, value in content) + "}"
    if kind == "sequence":
        return "(" + ", ".join(_format(item) for item in content) + ")"
    return str(content)
