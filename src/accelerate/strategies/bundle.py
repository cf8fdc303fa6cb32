"""Sorts the arguments of ``prepare`` into a `Bundle`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..optimizer import AcceleratedOptimizer
from ..scheduler import AcceleratedScheduler
from .base import Bundle

logger = logging.getLogger(__name__)


def sort_prepare_args(objects: Sequence[Any], *, on_device: frozenset[int], prepared: Iterable[Any] = ()) -> Bundle:
    """Sorts objects by type. Prepared objects, None, and objects of other types are returned unchanged.

    Logs one warning for objects that were most likely passed by mistake.
    """
    bundle = Bundle(on_device=on_device)
    known = list(prepared)
    for position, item in enumerate(objects):
        item = next((other for other in known if item is not None and item is _wrapped_object(other)), item)
        _slot_for(item, bundle, known)[position] = item
    odd = [
        f"{type(item).__name__} {_short(item)}: {advice}"
        for item in bundle.others.values()
        if (advice := _advice(item))
    ]
    if odd:
        logger.warning(
            "prepare returns these objects as they came, since it prepares models, optimizers, data loaders and "
            "schedulers only: %s",
            "; ".join(odd),
        )
    return bundle


def _wrapped_object(prepared: Any) -> Any:
    """Returns the object inside a prepared optimizer or scheduler: preparing it again returns the same wrapper."""
    if isinstance(prepared, AcceleratedOptimizer):
        return prepared.optimizer
    return prepared.scheduler if isinstance(prepared, AcceleratedScheduler) else None


def _slot_for(item: Any, bundle: Bundle, known: list[Any]) -> dict[int, Any]:
    if item is None or any(item is other for other in known):
        return bundle.others
    if isinstance(item, nn.Module):
        return bundle.models
    if isinstance(item, torch.optim.Optimizer):
        return bundle.optimizers
    if isinstance(item, (torch.optim.lr_scheduler.LRScheduler, AcceleratedScheduler)) or _steps_like_a_scheduler(item):
        return bundle.schedulers
    if isinstance(item, DataLoader):
        return bundle.loaders
    return bundle.others


def _steps_like_a_scheduler(item: Any) -> bool:
    return not inspect.isclass(item) and hasattr(item, "step") and hasattr(item, "get_last_lr")


def _advice(item: Any) -> str | None:
    """Returns the remedy for an object that was most likely passed by mistake, else None."""
    if isinstance(item, (list, tuple, set, dict)):
        return "to prepare what it holds, unpack it (prepare(*objects))"
    if inspect.isclass(item):
        return "this is a class; pass an instance"
    if isinstance(item, Dataset):
        return "put the dataset into a DataLoader first"
    if isinstance(item, torch.Tensor):
        return "a tensor is moved with tensor.to(accelerator.device)"
    if isinstance(item, (str, bytes, int, float, complex)):
        return "a plain value needs no preparation"
    if inspect.isgenerator(item):
        return "parameters belong into an optimizer, batches into an IterableDataset"
    return None


def _short(item: Any) -> str:
    text = repr(item)
    return text if len(text) <= 60 else text[:57] + "..."
