"""Inference with models larger than memory: meta-device initialization, device maps, and offloaded weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .offload.device_map import check_device_map, infer_auto_device_map, normalize
from .offload.disk_weights import INDEX_NAME, OffloadedWeightsLoader, offload_state_dict, save_offload_index
from .offload.hooks import (
    AlignDevicesHook,
    CpuOffload,
    UserCpuOffloadHook,
    add_hook_to_module,
    attach_align_device_hook,
    attach_layerwise_casting_hooks,
    remove_hook_from_submodules,
)
from .offload.hooks.align import release_offloaded
from .offload.hooks.attach import reader_for
from .offload.hooks.dispatch import Dispatch
from .offload.hooks.moving import guard_moves, release_moves
from .offload.loading import load_checkpoint_in_model, load_weights
from .offload.max_memory import OFFLOADED, get_balanced_memory
from .offload.sizes import Dtype
from .offload.tensors import Place
from .runtime.devices import default_kind, require_device, with_index
from .settings import env

logger = logging.getLogger(__name__)

_Module = TypeVar("_Module", bound=nn.Module)
Folder = str | os.PathLike[str]
_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


# Empty models ---------------------------------------------------------------------------------------------------------


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Creates modules without memory: within the context, parameters of new modules are on the meta device.

    Args:
        include_buffers: Include buffers, and any other tensors created. None: as set by
            ``ACCELERATE_INIT_INCLUDE_BUFFERS``, by default no.

    Example:
        ```python
        with init_empty_weights():
            model = nn.Sequential(*[nn.Linear(10000, 10000) for _ in range(1000)])
        ```
    """
    with init_on_device(torch.device("meta"), include_buffers):
        yield


@contextmanager
def init_on_device(device: Place, include_buffers: bool | None = None) -> Iterator[None]:
    """Creates modules on a device: within the context, parameters of new modules are moved to it.

    Args:
        device: The device.
        include_buffers: As for `init_empty_weights`.
    """
    if include_buffers is None:
        include_buffers = env.flag("ACCELERATE_INIT_INCLUDE_BUFFERS")
    device = with_index(device)
    register_parameter, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def parameter_there(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register_parameter(module, name, param)
        if param is not None and param.device != device:
            module._parameters[name] = _moved(param, device)

    def buffer_there(module: nn.Module, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        register_buffer(module, name, tensor, persistent)
        if tensor is not None:
            module._buffers[name] = tensor.to(device)

    nn.Module.register_parameter = parameter_there  # type: ignore[method-assign,assignment]
    if include_buffers:
        nn.Module.register_buffer = buffer_there  # type: ignore[method-assign,assignment]
    try:
        with device if include_buffers else nullcontext():
            yield
    finally:
        nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
        nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]


def _moved(param: nn.Parameter, device: torch.device) -> nn.Parameter:
    data = param.detach().to(device)
    kept = param.__dict__
    if type(param) is nn.Parameter:
        moved = nn.Parameter(data, requires_grad=param.requires_grad)
        moved.__dict__.update(kept)
        return moved
    made: nn.Parameter = type(param)(data, requires_grad=param.requires_grad, **kept)
    return made


# Offloading whole models ----------------------------------------------------------------------------------------------


def _default_device(model: nn.Module) -> torch.device:
    parameter = next((p for p in model.parameters() if not p.is_meta), None)
    return parameter.device if parameter is not None else default_kind().current()


def cpu_offload(
    model: _Module,
    execution_device: Place | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    prefetch: bool | None = None,
) -> _Module:
    """Keeps all weights in CPU memory; each layer loads its own for its forward.

    Args:
        model: The model; modified in place.
        execution_device: Device that the model runs on. None: the device of its parameters.
        offload_buffers: Offload buffers too.
        state_dict: The weights, if they are in memory already. None: those of the model.
        preload_module_classes: Names of classes whose modules load all their weights at once, submodules included.
        prefetch: Prefetch the weights of the next layers while one computes. None: as set by
            ``ACCELERATE_OFFLOAD_PREFETCH``, by default yes.

    Returns:
        The model.
    """
    device = _default_device(model) if execution_device is None else require_device(execution_device)
    if state_dict is None:
        state_dict = {name: value.to("cpu") for name, value in model.state_dict().items()}
    return _offloaded(model, device, state_dict, offload_buffers, preload_module_classes, prefetch)


def _offloaded(
    model: _Module,
    device: torch.device,
    weights: Mapping[str, torch.Tensor],
    offload_buffers: bool,
    preload_module_classes: Sequence[str] | None,
    prefetch: bool | None,
) -> _Module:
    reader = reader_for(prefetch, device, True, weights)
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True, prefetcher=reader), append=True)
    attach_align_device_hook(
        model,
        execution_device=device,
        offload=True,
        offload_buffers=offload_buffers,
        weights_map=weights,
        preload_module_classes=preload_module_classes,
        prefetch=reader if reader is not None else False,
    )
    guard_moves(model)
    return model


def cpu_offload_with_hook(
    model: _Module,
    execution_device: Place | None = None,
    prev_module_hook: UserCpuOffloadHook | None = None,
) -> tuple[_Module, UserCpuOffloadHook]:
    """Keeps a model in CPU memory until it is called; it then stays on its device until its hook offloads it.

    Args:
        model: The model; modified in place.
        execution_device: Device that the model runs on. None: this process's device.
        prev_module_hook: Hook of the model that ran before, which is offloaded when this one is called.

    Returns:
        The model and its hook, with the methods ``offload()`` and ``remove()``.

    Example:
        ```python
        encoder, first = cpu_offload_with_hook(encoder, "cuda")
        decoder, second = cpu_offload_with_hook(decoder, "cuda", prev_module_hook=first)
        outputs = decoder(encoder(inputs))  # offloads the encoder before the decoder is moved
        second.offload()
        ```
    """
    if execution_device is not None:
        execution_device = require_device(execution_device)
    hook = CpuOffload(execution_device=execution_device, prev_module_hook=prev_module_hook)
    add_hook_to_module(model, hook, append=True)
    return model, UserCpuOffloadHook(model, hook)


def disk_offload(
    model: _Module,
    offload_dir: Folder,
    execution_device: Place | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Sequence[str] | None = None,
    prefetch: bool | None = None,
) -> _Module:
    """Keeps all weights on disk; each layer loads its own for its forward.

    Args:
        model: The model; modified in place.
        offload_dir: The folder; weights are written to it unless it has an index already.
        execution_device: Device that the model runs on. None: the device of its parameters.
        offload_buffers: Offload buffers too.
        preload_module_classes: Names of classes whose modules load all their weights at once, submodules included.
        prefetch: Prefetch the weights of the next layers while one computes. None: as set by
            ``ACCELERATE_OFFLOAD_PREFETCH``, by default yes.

    Returns:
        The model.
    """
    device = _default_device(model) if execution_device is None else require_device(execution_device)
    if not (Path(offload_dir) / INDEX_NAME).is_file():
        offload_state_dict(offload_dir, model.state_dict())
    weights = OffloadedWeightsLoader(save_folder=offload_dir)
    return _offloaded(model, device, weights, offload_buffers, preload_module_classes, prefetch)


# Device maps ----------------------------------------------------------------------------------------------------------


def dispatch_model(
    model: _Module,
    device_map: Mapping[str, Place],
    main_device: Place | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: Folder | None = None,
    offload_index: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    prefetch: bool | None = None,
) -> _Module:
    """Dispatches a model over devices, CPU memory and disk by a device map, with hooks that run its forward.

    Args:
        model: The model; modified in place. The map is stored as ``model.hf_device_map``. If the model is offloaded already,
            its hooks are removed first. Parameters on the meta device are loaded from `state_dict` and `offload_index`.
        device_map: Devices by name of module (or of a tensor that belongs directly to a larger module): an index, a device,
            ``"cpu"`` or ``"disk"``. It must cover the whole model.
        main_device: Device that runs the parts on ``"cpu"`` and ``"disk"``. None: the first device of the map that computes,
            otherwise the CPU.
        state_dict: Weights of the parts on ``"cpu"``, if they are in memory already.
        offload_dir: Folder for the weights of parts on ``"disk"``; missing ones are written.
        offload_index: Index of these weights, by name, if they are in files already.
        offload_buffers: Offload buffers too; otherwise they stay on the execution device.
        skip_keys: Keyword arguments of forwards that are not moved.
        preload_module_classes: Names of classes whose modules load all their weights at once, submodules included.
        force_hooks: Attach hooks even if all parts are on one device; otherwise the model is only moved there.
        prefetch: Prefetch the weights of the next layers while one computes. None: as set by
            ``ACCELERATE_OFFLOAD_PREFETCH``, by default yes.

    Returns:
        The model.

    Raises:
        ValueError: if the map is incomplete, or parts go to disk without an `offload_dir` or `offload_index`.
        RuntimeError: if a part is assigned to a device that this process does not have.
    """
    check_device_map(model, device_map)
    where = normalize(device_map)
    used = set(where.values())
    known = {**(offload_index or {}), **(state_dict or {})}
    state_dict = {**(state_dict or {}), **{n: value for n, value in release_offloaded(model).items() if n not in known}}
    release_moves(model)
    dispatch = Dispatch(model, where, main_device, offload_buffers)
    dispatch.fill(state_dict, offload_index or {}, offload_dir)
    if len(used) == 1 and not used & set(OFFLOADED[1:]) and not force_hooks:
        _move_to(model, used.pop())
    else:
        dispatch.run(state_dict, offload_dir, offload_index, skip_keys, preload_module_classes, prefetch)
    model.hf_device_map = dict(device_map)  # type: ignore[assignment]  # a plain attribute
    return model


def _move_to(model: nn.Module, device: str | torch.device) -> None:
    if any(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, torch.Tensor)):
        raise ValueError(
            f"{type(model).__name__} has tensors without values (device meta), which cannot be moved to {device}: load its "
            "weights first, as load_checkpoint_and_dispatch does."
        )
    model.to(device)


def load_checkpoint_and_dispatch(
    model: _Module,
    checkpoint: Folder,
    device_map: str | Mapping[str, Place] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    offload_folder: Folder | None = None,
    offload_buffers: bool = False,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
    prefetch: bool | None = None,
) -> _Module:
    """Loads weights into a model, which may be on the meta device, and dispatches it over devices, CPU memory and disk.

    Args:
        model: The model; modified in place.
        checkpoint: A weight file, an index, or a folder with one of these.
        device_map: A map by name of module, or the name of a computed one: ``"auto"`` and ``"balanced"`` spread the model
            evenly over accelerators, ``"balanced_low_0"`` keeps the first one as free as possible, ``"sequential"`` fills
            one after the other. None: weights go to the device of the model's tensors, and no hooks are attached.
        max_memory: Limits by device, for a computed map.
        no_split_module_classes: Names of classes whose modules stay on one device, for a computed map.
        offload_folder: Folder for the weights of parts on disk, unless they are in safetensors files.
        offload_buffers: Offload buffers too.
        dtype: Convert floating-point weights to this dtype.
        offload_state_dict: Accepted for compatibility; see `load_checkpoint_in_model`.
        skip_keys: Keyword arguments of forwards that are not moved.
        preload_module_classes: Names of classes whose modules load all their weights at once, submodules included.
        force_hooks: Attach hooks even if all parts are on one device.
        strict: Raise for missing or unexpected names.
        full_state_dict: See `load_checkpoint_in_model`.
        broadcast_from_rank0: See `load_checkpoint_in_model`.
        prefetch: Prefetch the weights of the next layers while one computes. None: as set by
            ``ACCELERATE_OFFLOAD_PREFETCH``, by default yes.

    Returns:
        The model.

    Raises:
        ValueError: if the checkpoint does not match the model, or files are missing or damaged, with all problems in one
            message, before anything is changed; if the map is incomplete, or its name is unknown.

    Example:
        ```python
        with init_empty_weights():
            model = GPT(config)
        model = load_checkpoint_and_dispatch(model, "weights/", device_map="auto", no_split_module_classes=["Block"])
        ```
    """
    where = made_map(model, device_map, max_memory, no_split_module_classes, dtype, offload_buffers)
    if where is None:
        load_checkpoint_in_model(
            model,
            checkpoint,
            dtype=dtype,
            strict=strict,
            full_state_dict=full_state_dict,
            broadcast_from_rank0=broadcast_from_rank0,
        )
        return model
    check_device_map(model, where)
    index = load_weights(
        model,
        checkpoint,
        device_map=where,
        offload_folder=offload_folder,
        dtype=dtype,
        offload_buffers=offload_buffers,
        strict=strict,
    )
    if offload_folder is not None:
        Path(offload_folder).mkdir(parents=True, exist_ok=True)
        save_offload_index(index, offload_folder)
    return dispatch_model(
        model,
        where,
        offload_dir=offload_folder,
        offload_index=index if index or offload_folder is None else None,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        preload_module_classes=preload_module_classes,
        force_hooks=force_hooks,
        prefetch=prefetch,
    )


def made_map(
    model: nn.Module,
    device_map: str | Mapping[str, Place] | None,
    max_memory: Mapping[int | str, int | str] | None,
    no_split_module_classes: Sequence[str] | None,
    dtype: Dtype | None,
    offload_buffers: bool = False,
    special_dtypes: Mapping[str, Dtype] | None = None,
) -> Mapping[str, Place] | None:
    """Computes the device map that a name such as ``"auto"`` stands for; returns a map unchanged."""
    if not isinstance(device_map, str):
        return device_map
    if device_map not in _MAPS:
        raise ValueError(
            f"device_map={device_map!r} is not one of the maps that can be computed: {', '.join(map(repr, _MAPS))}. For a "
            f"single device, pass a map: {{'': {device_map!r}}}."
        )
    if device_map != "sequential":
        max_memory = get_balanced_memory(
            model,
            max_memory=max_memory,
            no_split_module_classes=no_split_module_classes,
            dtype=dtype,
            special_dtypes=special_dtypes,
            low_zero=device_map == "balanced_low_0",
        )
    return infer_auto_device_map(
        model,
        max_memory=max_memory,
        no_split_module_classes=no_split_module_classes,
        dtype=dtype,
        special_dtypes=special_dtypes,
        offload_buffers=offload_buffers,
    )


__all__ = [
    "attach_layerwise_casting_hooks",
    "check_device_map",
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "remove_hook_from_submodules",
]
