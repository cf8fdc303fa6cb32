"""Dispatches a model over devices, CPU memory and disk: chooses where its weights are kept, and attaches the hooks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...runtime.devices import require_device
from ..device_map import check_tied_parameters_on_same_device, device_of
from ..disk_weights import INDEX_NAME, OffloadedWeightsLoader, offload_state_dict, read_offload_index
from ..max_memory import OFFLOADED
from ..tensors import Place, TiedMap, set_module_tensor_to_device
from ..tied_weights import find_tied_parameters, retie_parameters
from .align import AlignDevicesHook
from .attach import attach_align_device_hook_on_blocks
from .base import SequentialHook
from .moving import guard_moves

Folder = str | os.PathLike[str]


class Dispatch:
    """One dispatch: the offloaded parts, their execution devices, and their weights.

    Args:
        model: The model.
        where: Devices by name of module or tensor, as `normalize` returns them.
        main_device: Device that offloaded parts run on; None: the first device of the map that computes.
        offload_buffers: Offload buffers too.
    """

    def __init__(
        self,
        model: nn.Module,
        where: Mapping[str, str | torch.device],
        main_device: Place | None,
        offload_buffers: bool,
    ) -> None:
        self._model = model
        self._where = where
        self._offload_buffers = offload_buffers
        computing = [device for device in where.values() if device not in OFFLOADED]
        self._main = require_device(next(iter(computing), "cpu") if main_device is None else main_device)
        # If no accelerator is used, parts on "cpu" run in place and are not offloaded.
        self._waiting = OFFLOADED if self._main.type != "cpu" else OFFLOADED[1:]

    def fill(
        self, state_dict: Mapping[str, torch.Tensor] | None, index: Mapping[str, Any], folder: Folder | None
    ) -> None:
        """Loads parameters that are not offloaded and still on the meta device, from a state dict or an index.

        Args:
            state_dict: Values by name.
            index: Offload index entries by name.
            folder: Folder of the weights whose entries have no path.
        """
        kept = OffloadedWeightsLoader(state_dict or {}, folder, index)
        tensors = self._model.state_dict(keep_vars=True).items()
        empty = [name for name, tensor in tensors if getattr(tensor, "is_meta", False) and name in kept]
        empty = [name for name in empty if not self._is_offloaded(name)]
        if not empty:
            return
        tied = find_tied_parameters(self._model)
        for name in empty:
            device = device_of(name, self._where)
            if device is not None:  # otherwise a tied name of a tensor that has a device
                set_module_tensor_to_device(self._model, name, device, value=kept[name])
        retie_parameters(self._model, tied)

    def run(
        self,
        state_dict: Mapping[str, torch.Tensor] | None,
        offload_dir: Folder | None,
        offload_index: Mapping[str, Any] | None,
        skip_keys: str | list[str] | None,
        preload_module_classes: Sequence[str] | None,
        prefetch: bool | None = None,
    ) -> None:
        """Attaches the hooks; arguments as for `dispatch_model`."""
        tied = find_tied_parameters(self._model)
        check_tied_parameters_on_same_device(tied, self._where)
        offloaded = {name: device in self._waiting for name, device in self._where.items()}
        devices = {name: self._main if offloaded[name] else device for name, device in self._where.items()}
        weights = self._weights(state_dict, offload_dir, offload_index, tied)
        attach_align_device_hook_on_blocks(
            self._model,
            execution_device=devices,
            offload=offloaded,
            weights_map=weights,
            offload_buffers=self._offload_buffers,
            skip_keys=skip_keys,
            preload_module_classes=preload_module_classes,
            tied_params_map=self._shared(tied, weights),
            prefetch=prefetch,
        )
        self._mark_root()
        guard_moves(self._model)
        # Parts were moved one by one, so tie their shared tensors again, except offloaded ones.
        still = [[n for n in group if not self._is_offloaded(n)] for group in tied]
        retie_parameters(self._model, [group for group in still if len(group) > 1 and self._same_device(group)])

    def _mark_root(self) -> None:
        """Sets the execution device of the outermost hook to the main device, where clients look it up."""
        hook = self._model.__dict__.get("_hf_hook")
        for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
            if isinstance(one, AlignDevicesHook) and one.io_same_device and one.execution_device is None:
                one.execution_device = self._main

    def _is_offloaded(self, name: str) -> bool:
        return device_of(name, self._where) in self._waiting

    def _same_device(self, names: list[str]) -> bool:
        return len({device_of(name, self._where) for name in names}) == 1

    def _weights(
        self,
        state_dict: Mapping[str, torch.Tensor] | None,
        offload_dir: Folder | None,
        offload_index: Mapping[str, Any] | None,
        tied: list[list[str]],
    ) -> OffloadedWeightsLoader | None:
        """Collects the weights of offloaded parts, in memory and on disk."""
        if not set(self._where.values()) & set(self._waiting):
            return None
        own = self._model.state_dict()
        on_disk = [name for name in own if device_of(name, self._where) == "disk"]
        if on_disk and offload_dir is None and offload_index is None:
            raise ValueError(
                f"the device_map assigns {', '.join(n for n, d in self._where.items() if d == 'disk')} to disk: pass an "
                "offload_dir for their weights, or an offload_index of files that contain them."
            )
        index = self._written(own, on_disk, offload_dir) if offload_index is None else dict(offload_index)
        in_memory = dict(state_dict or {})
        waiting = [name for name in own if self._is_offloaded(name)]
        for name in waiting:
            if name not in in_memory and name not in index and not own[name].is_meta:
                in_memory[name] = own[name].to("cpu")
        self._complete(in_memory, index, tied)
        unknown = [name for name in waiting if name not in in_memory and name not in index]
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} have no values (device meta), and none are in state_dict, offload_dir or "
                "offload_index: load the model's weights first, as load_checkpoint_and_dispatch does."
            )
        return OffloadedWeightsLoader(state_dict=in_memory, save_folder=offload_dir, index=index)

    def _written(
        self, own: Mapping[str, torch.Tensor], on_disk: Sequence[str], offload_dir: Folder | None
    ) -> dict[str, Any]:
        """Writes the weights that a folder lacks, and returns its index."""
        if offload_dir is None:
            return {}
        known = read_offload_index(offload_dir) if (Path(offload_dir) / INDEX_NAME).is_file() else {}
        lacking = {name: own[name] for name in on_disk if name not in known and not own[name].is_meta}
        if lacking:
            offload_state_dict(offload_dir, lacking)
            known = read_offload_index(offload_dir)
        return known

    def _complete(self, state: dict[str, torch.Tensor], index: dict[str, Any], tied: list[list[str]]) -> None:
        """Adds the other names of tied weights, since files store a tied weight once."""
        for group in tied:
            known = next((name for name in group if name in index or name in state), None)
            for name in group:
                if known is None or name in index or name in state:
                    continue
                if known in state:
                    state[name] = state[known]
                else:
                    index[name] = {"weight_name": known, **index[known]}

    def _shared(self, tied: list[list[str]], weights: Mapping[str, torch.Tensor] | None) -> TiedMap:
        """Returns an empty map from device to copy for each tied tensor, by address."""
        shared: TiedMap = {}
        for group in tied:
            for name in group:
                values = [self._model.get_parameter(name)]
                if isinstance(weights, OffloadedWeightsLoader) and name in weights.state_dict:
                    values.append(weights.state_dict[name])  # type: ignore[arg-type]
                shared.update({value.data_ptr(): {} for value in values if not value.is_meta})
        return shared
