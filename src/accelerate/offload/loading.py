"""Loads weight files into a model: validates the whole checkpoint, then loads each tensor to its device."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints import EXTRA_STATE, Inspection, WeightFile, WeightsError, find_checkpoint, inspect
from .device_map import check_tied_parameters_on_same_device, device_of, normalize
from .disk_weights import offload_weight, save_offload_index
from .module_tree import ModuleTree, build_tree
from .sharded import is_shard, load_sharded
from .sizes import as_dtype
from .tensors import Place, as_parameter, set_module_tensor_to_device
from .tied_weights import retie_parameters, tied_in

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
    """Loads weights into a model, each directly to its device; the model may be on the meta device.

    The checkpoint is validated first: damaged or missing files, names, shapes. Weights for the CPU are mapped from their
    file if the model has no values yet, and copied otherwise.

    Args:
        model: The model.
        checkpoint: A weight file (safetensors, or written by `torch.save`), an index, or a folder with one of these.
        device_map: Devices by name of module or tensor. None: weights go to the device of the model's tensors; those on the
            meta device go to the CPU.
        offload_folder: Folder for the index of weights on ``"disk"``, and for the weights of pickled files; safetensors
            files are read in place.
        dtype: Convert floating-point weights to this dtype. None: to the dtype in the model.
        offload_state_dict: Accepted for compatibility; files are mapped, so there is no second copy in memory to offload.
        offload_buffers: Offload the buffers of layers on disk, too.
        keep_in_fp32_modules: Names of modules whose weights become float32, regardless of `dtype`.
        offload_8bit_bnb: Only False is supported; use `load_and_quantize_model`, which also quantizes offloaded weights.
        strict: Raise for missing or unexpected names. False: log them.
        full_state_dict: False: the checkpoint contains this process's shards of a sharded model.
        broadcast_from_rank0: Only rank 0 reads the files; it broadcasts the weights to the others.

    Raises:
        ValueError: with all problems in one message, before anything is changed. Missing or unexpected names are problems
            only with ``strict=True``.
        NotImplementedError: for ``offload_8bit_bnb=True``.
    """
    if offload_8bit_bnb:
        raise NotImplementedError(
            "offload_8bit_bnb=True: this function does not quantize. Use load_and_quantize_model, which takes a device map."
        )
    if device_map is None and (broadcast_from_rank0 or any(map(is_shard, model.parameters()))):
        _log_mismatches(
            checkpoint,
            load_sharded(model, checkpoint, strict=strict, whole=full_state_dict, first_reads=broadcast_from_rank0),
        )
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
            "the device_map assigns modules to 'disk': pass an offload_folder for the index of their weights."
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
    """Implements `load_checkpoint_in_model`, but returns the index of weights on disk instead of saving it.

    Raises:
        WeightsError: with all problems.
    """
    device_map = None if device_map is None else normalize(device_map)
    wanted = as_dtype(dtype)
    if wanted is not None and not isinstance(wanted, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is not a dtype in which torch can store weights.")
    tree = build_tree(model)
    tied = tied_in(tree)
    found = inspect(model, find_checkpoint(checkpoint), tied)
    job = _LoadJob(model, _slots(tree), device_map, offload_folder, wanted, offload_buffers, list(keep_in_fp32 or ()))
    plan = {file: job.plan(file, found) for file in found.files}
    found.problems += _other_layout(model, found)
    _raise_mismatches(checkpoint, found, strict)
    if device_map is not None:
        check_tied_parameters_on_same_device(tied, device_map)
    for file, places in plan.items():
        for name, device in places.items():
            job.load(name, file, device)
        file.release()
    retie_parameters(model, tied)
    return job.index


def _other_layout(model: nn.Module, found: Inspection) -> list[str]:
    """Returns a problem if the files have the weights of a transformers model under other names than the model."""
    state = model.state_dict(keep_vars=True)
    empty = [name for name in found.missing if getattr(state[name], "is_meta", False)]
    if not empty or not found.unexpected or not hasattr(type(model), "from_pretrained"):
        return []
    shown = [", ".join(names[:6]) + (", …" if len(names) > 6 else "") for names in (empty, found.unexpected)]
    name = type(model).__name__
    problem = (
        f"the files have another layout than {name} in memory, as where releases of transformers fuse weights: the model's "
        f"{shown[0]} are not in the files, and the files' {shown[1]} are not in the model. "
        f"{name}.from_pretrained(folder, device_map=...) converts them on loading"
    )
    return [problem]


def _raise_mismatches(checkpoint: Folder, found: Inspection, strict: bool) -> None:
    loose = [f"{name} is missing" for name in found.missing]
    loose += [f"{name} is in the files, but not in the model" for name in found.unexpected]
    if found.problems or (strict and loose):
        raise WeightsError(checkpoint, [*found.problems, *loose])
    _log_mismatches(checkpoint, loose)


def _log_mismatches(checkpoint: Folder, loose: list[str]) -> None:
    """Logs missing and unexpected names."""
    if loose:
        more = f"; and {len(loose) - 20} more" if len(loose) > 20 else ""
        logger.warning(
            "%s does not match the model exactly: %s. Pass strict=True to make this an error.",
            checkpoint,
            "; ".join(loose[:20]) + more,
        )


_Slot = tuple[dict[str, Any], str]


def _slots(tree: ModuleTree) -> dict[str, _Slot]:
    found: dict[str, _Slot] = {}
    for name, module in zip(tree.names, tree.modules, strict=True):
        prefix = f"{name}." if name else ""
        for held in (module._parameters, module._buffers):
            for key in held:
                found[prefix + key] = (held, key)
    return found


@dataclass
class _LoadJob:
    """One load: the device and dtype of each tensor.

    Attributes:
        slots: The dictionary of the module that holds each tensor, and its key there.
        index: Index entries of the weights on disk.
    """

    model: nn.Module
    slots: dict[str, _Slot]
    device_map: Mapping[str, Place] | None
    folder: Folder | None
    dtype: torch.dtype | None
    offload_buffers: bool
    keep_in_fp32: list[str]
    index: dict[str, Any] = field(default_factory=dict)

    def plan(self, file: WeightFile, found: Inspection) -> dict[str, Place]:
        """Returns the device of each tensor of a file that is in the model; adds to the problems found."""
        places: dict[str, Place] = {}
        for name in file.shapes:
            if name not in found.names:
                continue
            if name not in self.slots and not name.endswith(EXTRA_STATE):
                found.problems.append(
                    f"{name} is in the model's state dict, but the model has no such parameter or buffer"
                )
                continue
            device = self._device(name)
            if device is None:
                found.problems.append(
                    f"the device_map has no entry for {name}: add one for it, or for a module that contains it"
                )
            elif device == "disk" and not file.in_place and self.folder is None:
                found.problems.append(
                    f"{name} is assigned to disk, but {file.path.name} cannot be read tensor by tensor: pass an "
                    "offload_folder, or use safetensors files"
                )
            else:
                places[name] = device
        return places

    def load(self, name: str, file: WeightFile, device: Place) -> None:
        """Loads one tensor."""
        if name not in self.slots:
            self.model.get_submodule(name.rpartition(".")[0]).set_extra_state(file[name])
            return
        held, key = self.slots[name]
        present: torch.Tensor = held[key]
        dtype = self._dtype(name, present)
        if device == "disk":
            self._leave_on_disk(name, file, dtype)
            set_module_tensor_to_device(self.model, name, "meta", dtype=dtype)
            return
        value, wanted = file[name], dtype or present.dtype
        if device == "cpu" and present.is_meta and type(present) is nn.Parameter and value.dtype == wanted:
            held[key] = as_parameter(value, present)  # mapped, not copied
        elif present.device == (torch.device("cpu") if device == "cpu" else device) and present.dtype == wanted:
            # In place, because optimizers and tied modules refer to this tensor.
            with torch.no_grad():
                present.copy_(value)
        else:
            set_module_tensor_to_device(self.model, name, device, value=value, dtype=dtype)

    def _dtype(self, name: str, present: torch.Tensor) -> torch.dtype | None:
        if not present.is_floating_point():
            return None
        if self.keep_in_fp32 and any(part in self.keep_in_fp32 for part in name.split(".")):
            return torch.float32
        return self.dtype

    def _device(self, name: str) -> Place | None:
        """Returns the device of a tensor; None if the map has none."""
        if name not in self.slots:
            return "cpu"
        held, key = self.slots[name]
        if self.device_map is None:
            present: torch.Tensor = held[key]
            return "cpu" if present.is_meta else present.device
        device = device_of(name, self.device_map)
        stays = device == "disk" and not self.offload_buffers and not isinstance(held[key], nn.Parameter)
        return "cpu" if stays else device

    def _leave_on_disk(self, name: str, file: WeightFile, dtype: torch.dtype | None) -> None:
        if file.in_place:
            entry = {"safetensors_file": str(file.path.absolute()), "weight_name": name}
            if dtype is not None:
                entry["dtype"] = str(dtype).removeprefix("torch.")
            self.index[name] = entry
            return
        assert self.folder is not None  # checked by plan
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        value = file[name]
        converts = dtype is not None and value.is_floating_point()
        offload_weight(value.to(dtype) if converts else value, name, self.folder, self.index)
