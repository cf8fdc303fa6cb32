"""Weights from files into a model: checked as a whole, then one tensor at a time to where the device map says."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints import Inspection, WeightFile, WeightsError, find_checkpoint, inspect
from .device_map import check_tied_parameters_on_same_device, device_of
from .offload import offload_weight, save_offload_index
from .sizes import as_dtype
from .tensors import Place, owner_of, set_module_tensor_to_device
from .tied import find_tied_parameters, retie_parameters

logger = logging.getLogger(__name__)

Folder = str | os.PathLike[str]


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: Folder,
    device_map: Mapping[str, Place] | None = None,
    offload_folder: Folder | None = None,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Sequence[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> None:
    """Loads weights into a model, empty or not, each straight to its device.

    Everything is checked first: damaged or missing files, names, shapes. Weights that go to the CPU are mapped from their
    file where the model has no values yet, and copied where it has.

    Args:
        model: The model.
        checkpoint: A file of weights (safetensors, or from `torch.save`), an index of several, or a folder with these.
        device_map: Devices by name of module or tensor. None: weights go where the model's are; empty ones to the CPU.
        offload_folder: Where the index of weights on ``"disk"`` is kept, and those of pickled files themselves; those of
            safetensors files are read there.
        dtype: Convert floating-point weights to this. None: to what they are in the model.
        offload_state_dict: Accepted; files are mapped, so that there is no second copy to put away.
        offload_buffers: Buffers go to disk with the rest of a layer.
        keep_in_fp32_modules: Names of modules whose weights become float32 whatever `dtype` says.
        offload_8bit_bnb: Quantise offloaded weights; not there yet.
        strict: Refuse a checkpoint with names too few or too many. False: they are logged.
        full_state_dict: False: the checkpoint holds this process's shards of a sharded model.
        broadcast_from_rank0: Only the first process reads; the others get what it read.

    Raises:
        ValueError: when something is wrong: all of it in one message, before anything was changed. Names too few or too many
            only with ``strict=True``.
        NotImplementedError: for ``offload_8bit_bnb=True``.
    """
    if offload_8bit_bnb:
        raise NotImplementedError("offload_8bit_bnb needs quantisation with bitsandbytes, which is not there yet.")
    if device_map is None and (broadcast_from_rank0 or not full_state_dict or _is_sharded(model)):
        _load_sharded(model, checkpoint, strict, full_state_dict, broadcast_from_rank0)
        return
    _require_folder(device_map, offload_folder)
    index = load_weights(
        model,
        checkpoint,
        device_map=device_map,
        offload_folder=offload_folder,
        dtype=dtype,
        offload_buffers=offload_buffers,
        keep_in_fp32=keep_in_fp32_modules,
        strict=strict,
    )
    if offload_folder is not None:
        save_offload_index(index, offload_folder)


def _require_folder(device_map: Mapping[str, Place] | None, folder: Folder | None) -> None:
    if folder is None and device_map is not None and "disk" in device_map.values():
        raise ValueError(
            "the device_map sends modules to 'disk': pass an offload_folder, where the index of their weights is kept."
        )


def load_weights(
    model: nn.Module,
    checkpoint: Folder,
    *,
    device_map: Mapping[str, Place] | None = None,
    offload_folder: Folder | None = None,
    dtype: str | torch.dtype | None = None,
    offload_buffers: bool = False,
    keep_in_fp32: Sequence[str] | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """`load_checkpoint_in_model`, but for the index of weights on disk, which is returned and not saved.

    Raises:
        WeightsError: listing everything that is wrong.
    """
    tied = find_tied_parameters(model)
    found = inspect(model, find_checkpoint(checkpoint), tied)
    _judge(checkpoint, found, strict)
    if device_map is not None:
        check_tied_parameters_on_same_device(tied, {name: _plain(device) for name, device in device_map.items()})
    wanted = as_dtype(dtype)
    if wanted is not None and not isinstance(wanted, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is no format that torch can hold weights in.")
    job = _Job(model, device_map, offload_folder, wanted, offload_buffers, list(keep_in_fp32 or ()))
    names = set(model.state_dict(keep_vars=True))
    for file in found.files:
        for name in file.shapes:
            if name in names:
                job.load(name, file)
    retie_parameters(model, tied)
    return job.index


def _judge(checkpoint: Folder, found: Inspection, strict: bool) -> None:
    loose = [f"{name} is missing" for name in found.missing]
    loose += [f"{name} is in the files, and not in the model" for name in found.unexpected]
    if found.problems or (strict and loose):
        raise WeightsError(checkpoint, [*found.problems, *loose])
    if loose:
        logger.warning(
            "%s does not fit the model as a whole: %s. strict=True makes that an error.",
            checkpoint,
            "; ".join(loose[:20]),
        )


def _plain(device: Place) -> int | str:
    return device if isinstance(device, (int, str)) else str(device)


@dataclass
class _Job:
    """One loading: where each tensor goes, and in which format.

    Attributes:
        index: Entries of the weights that stay on disk.
    """

    model: nn.Module
    device_map: Mapping[str, Place] | None
    folder: Folder | None
    dtype: torch.dtype | None
    offload_buffers: bool
    keep_in_fp32: list[str]
    index: dict[str, Any] = field(default_factory=dict)

    def load(self, name: str, file: WeightFile) -> None:
        """Takes one tensor to its place."""
        owner, key = owner_of(self.model, name)
        is_buffer = key in owner._buffers
        present = (owner._buffers if is_buffer else owner._parameters)[key]
        dtype = self._dtype(name, present)
        device = self._device(name, present)
        if device == "disk" and is_buffer and not self.offload_buffers:
            device = "cpu"
        if device == "disk":
            self._leave_on_disk(name, file, dtype)
            set_module_tensor_to_device(self.model, name, "meta", dtype=dtype)
            return
        value = file[name]
        target = torch.device(device)
        if present is not None and present.device == target and present.dtype == (dtype or present.dtype):
            # In place: optimizers, and modules that share it, hold this very tensor.
            with torch.no_grad():
                present.copy_(value)
            return
        set_module_tensor_to_device(self.model, name, target, value=value, dtype=dtype)

    def _dtype(self, name: str, present: torch.Tensor | None) -> torch.dtype | None:
        if present is not None and not present.is_floating_point():
            return None
        if any(part in self.keep_in_fp32 for part in name.split(".")):
            return torch.float32
        return self.dtype

    def _device(self, name: str, present: torch.Tensor | None) -> Place:
        if self.device_map is None:
            return "cpu" if present is None or present.is_meta else present.device
        device = device_of(name, self.device_map)
        if device is None:
            raise ValueError(
                f"the device_map does not say where {name} goes: add an entry for it, or for a module of it."
            )
        return device

    def _leave_on_disk(self, name: str, file: WeightFile, dtype: torch.dtype | None) -> None:
        if file.in_place:
            entry = {"safetensors_file": str(file.path.absolute()), "weight_name": name}
            if dtype is not None:
                entry["dtype"] = str(dtype).removeprefix("torch.")
            self.index[name] = entry
            return
        if self.folder is None:
            raise ValueError(
                f"{name} goes to disk, and {file.path.name} cannot be read in parts: pass an offload_folder for it, or use "
                "safetensors files."
            )
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        value = file[name]
        converts = dtype is not None and value.is_floating_point()
        offload_weight(value.to(dtype) if converts else value, name, self.folder, self.index)


# Sharded models -------------------------------------------------------------------------------------------------------


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def _load_sharded(
    model: nn.Module, checkpoint: Folder, strict: bool, full_state_dict: bool, broadcast_from_rank0: bool
) -> None:
    from torch.distributed import get_rank
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    from .checkpoints import load_state_dict

    state: dict[str, Any] = {}
    if not broadcast_from_rank0 or get_rank() == 0:
        for file in find_checkpoint(checkpoint).files:
            state.update(load_state_dict(file))
    options = StateDictOptions(
        full_state_dict=full_state_dict, broadcast_from_rank0=broadcast_from_rank0, strict=strict
    )
    set_model_state_dict(model, state, options=options)
