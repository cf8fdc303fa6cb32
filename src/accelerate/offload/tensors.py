"""Lists, identifies, moves and replaces single tensors of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..runtime.devices import with_index
from ..runtime.memory import clear_device_cache
from .sizes import as_dtype

Place = int | str | torch.device
TiedMap = dict[int, dict[torch.device, torch.Tensor]]


def named_module_tensors(
    module: nn.Module, include_buffers: bool = True, recurse: bool = False, remove_non_persistent: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a module's parameters, then its buffers, with their names.

    Args:
        module: The module.
        include_buffers: Include buffers.
        recurse: Include submodules.
        remove_non_persistent: Skip buffers that are not in the module's state dict.
    """
    yield from module.named_parameters(recurse=recurse)
    if include_buffers:
        left_out = get_non_persistent_buffers(module, recurse=recurse, fqns=True) if remove_non_persistent else ()
        yield from ((name, buffer) for name, buffer in module.named_buffers(recurse=recurse) if name not in left_out)


def get_non_persistent_buffers(module: nn.Module, recurse: bool = False, fqns: bool = False) -> set[str]:
    """Returns the names of buffers that are not in a module's state dict.

    Args:
        module: The module.
        recurse: Include submodules.
        fqns: Return full names; otherwise names local to each submodule.
    """
    if not recurse:
        return set(module._non_persistent_buffers_set)
    return {
        f"{prefix}.{name}" if fqns and prefix else name
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """Returns device, address and size of a tensor's storage; tensors that share memory have equal results."""
    storage = tensor.untyped_storage()
    if tensor.is_meta:  # meta tensors have no address; the storage object identifies them
        return tensor.device, storage._cdata, storage.nbytes()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def check_device_same(first_device: Place, second_device: Place) -> bool:
    """Returns whether two devices are the same; ``"cuda"`` is the current CUDA device."""
    first, second = with_index(first_device), with_index(second_device)
    return first.type == second.type and (first.index or 0) == (second.index or 0)


def owner_of(module: nn.Module, tensor_name: str) -> tuple[nn.Module, str]:
    """Returns the module that has a tensor, and the tensor's name in it.

    Raises:
        AttributeError: if there is no such module.
        ValueError: if that module has no such parameter or buffer.
    """
    path, _, key = tensor_name.rpartition(".")
    owner = module.get_submodule(path) if path else module
    if key not in owner._parameters and key not in owner._buffers:
        raise ValueError(f"{type(owner).__name__} has no parameter or buffer {key!r} (looked for {tensor_name!r}).")
    return owner, key


def set_module_tensor_to_device(
    module: nn.Module,
    tensor_name: str,
    device: Place,
    value: torch.Tensor | None = None,
    dtype: str | torch.dtype | None = None,
    fp16_statistics: torch.Tensor | None = None,
    tied_params_map: TiedMap | None = None,
    non_blocking: bool = False,
    clear_cache: bool = True,
) -> None:
    """Moves a parameter or buffer of a module to a device, or sets its value there.

    Args:
        module: The module.
        tensor_name: Dotted name of the tensor.
        device: Target device.
        value: New value. None: the present one.
        dtype: Convert to this dtype. None: keep the dtype of the present tensor, if both are floating-point.
        fp16_statistics: Row statistics of an 8-bit weight, stored with it.
        tied_params_map: Copies of tied tensors by address and device; an existing copy is used, a new one is added.
        non_blocking: Copy without blocking the host, where memory is pinned.
        clear_cache: Empty the allocator's cache if a tensor leaves an accelerator.

    Raises:
        AttributeError, ValueError: if there is no such tensor, if the value has another shape, or if the tensor is on the
            meta device and no value is given.
    """
    owner, key = owner_of(module, tensor_name)
    is_buffer = key in owner._buffers
    old = (owner._buffers if is_buffer else owner._parameters)[key]
    target = with_index(device)
    _check(type(owner).__name__, tensor_name, old, value, target)
    shared = _shared_copies(tied_params_map, value, old)
    if shared is not None and target in shared:
        new: torch.Tensor = shared[target]
    elif value is None and old is not None and dtype is None and old.device == target:
        return
    else:
        source = old if value is None else value
        assert source is not None
        moved = source.detach().to(target, _wanted_dtype(source, old, dtype), non_blocking=non_blocking)
        new = moved if is_buffer else as_parameter(moved, old)
        if shared is not None and target.type != "meta":
            shared[target] = new
    (owner._buffers if is_buffer else owner._parameters)[key] = new  # type: ignore[assignment]
    if fp16_statistics is not None and not is_buffer:
        new.SCB = fp16_statistics.to(target)  # type: ignore[attr-defined]
    if clear_cache and old is not None and old.device.type not in ("cpu", "meta", target.type):
        clear_device_cache()


def _check(kind: str, name: str, old: torch.Tensor | None, value: torch.Tensor | None, target: torch.device) -> None:
    if value is None and old is None:
        raise ValueError(f"{name} of {kind} is None; pass a `value` for it.")
    if value is None and old is not None and old.is_meta and target.type != "meta":
        raise ValueError(f"{name} is on the meta device and has no values to move to {target}: pass a `value`.")
    plain = old is None or type(old) in (torch.Tensor, nn.Parameter)
    if value is not None and old is not None and plain and value.shape != old.shape:
        raise ValueError(
            f"{name} has shape {tuple(old.shape)}, but its value has shape {tuple(value.shape)}: they must be equal."
        )


def _shared_copies(
    tied: TiedMap | None, value: torch.Tensor | None, old: torch.Tensor | None
) -> dict[torch.device, torch.Tensor] | None:
    for tensor in (value, old):
        if tied and tensor is not None and not tensor.is_meta and tensor.data_ptr() in tied:
            return tied[tensor.data_ptr()]
    return None


def _wanted_dtype(source: torch.Tensor, old: torch.Tensor | None, dtype: str | torch.dtype | None) -> torch.dtype:
    wanted = as_dtype(dtype) if dtype is not None else (source.dtype if old is None else old.dtype)
    if isinstance(wanted, torch.dtype) and source.is_floating_point() and wanted.is_floating_point:
        return wanted
    return source.dtype


def as_parameter(tensor: torch.Tensor, like: Any) -> nn.Parameter:
    """Wraps a tensor in a parameter of the same class, and with the same attributes, as another one.

    Args:
        tensor: The values.
        like: The parameter to replace; None: create an `nn.Parameter`.
    """
    if like is None or type(like) is nn.Parameter:
        differentiable = tensor.is_floating_point() or tensor.is_complex()
        new = nn.Parameter(tensor, requires_grad=like.requires_grad if like is not None else differentiable)
        if like is not None and like.__dict__:
            new.__dict__.update(like.__dict__)
        return new
    if type(tensor) is type(like):
        return tensor  # type: ignore[return-value]
    # A class of a quantization library, whose attributes are the arguments of its constructor.
    made: nn.Parameter = type(like)(tensor, requires_grad=like.requires_grad, **like.__dict__)
    return made
