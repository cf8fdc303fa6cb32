"""Data parallelism with DistributedDataParallel: each rank holds a replica and reads its own shard of the data."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.distributed.algorithms.join import Join, Joinable
from torch.nn.parallel import DistributedDataParallel

from ..runtime import world
from ..runtime.tensors.forward import is_compiled_module
from ..settings.enums import DistributedType
from .base import Bundle, Strategy, check_device_map
from .parallel.grad_sync import grad_sync_enabled, has_grad_all_reduce, register_grad_all_reduce

logger = logging.getLogger(__name__)


class DDPStrategy(Strategy):
    """Replicates the model on every rank; gradients are all-reduced during the backward."""

    distributed_types = tuple(kind for kind in DistributedType if kind.value.startswith("MULTI_"))
    supported_mesh_dims = frozenset({"dp_replicate", "cp", "sp"})

    def check(self, bundle: Bundle) -> None:
        super().check(bundle)
        check_device_map(bundle.models.values())

    def wrap_model(self, model: nn.Module) -> nn.Module:
        if isinstance(model, DistributedDataParallel):
            return model
        handler = self.config.ddp
        frozen = [param for param in model.parameters() if not param.requires_grad]
        all_used = handler is None or not handler.find_unused_parameters
        if all(not param.requires_grad for param in model.parameters()):
            # DDP raises for a model without trainable parameters: a frozen or quantized model is not wrapped.
            register_grad_all_reduce(model, frozen, None, all_used=all_used)
            return model
        device = self.world.device
        # With device_ids DDP moves inputs. They must be None for the CPU, and for a model on several devices.
        one_device = device.index is not None and {p.device for p in model.parameters()} == {device}
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device.index] if one_device else None,
            output_device=device.index if one_device else None,
            **(handler.to_kwargs() if handler is not None else {}),
        )
        if handler is not None:
            handler.register_comm_hook(wrapped)
        _release_at_exit(wrapped)
        enabled = functools.partial(_requires_sync, weakref.ref(wrapped))
        register_grad_all_reduce(wrapped, frozen, wrapped.process_group, all_used=all_used, enabled=enabled)
        return wrapped

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        container = _container(model)
        return container.no_sync() if container is not None else grad_sync_enabled(model, False)

    @staticmethod
    @contextmanager
    def sync_in_backward(model: nn.Module) -> Iterator[None]:
        container = _container(model)
        if container is None:
            with grad_sync_enabled(model, True):
                yield
            return
        before = container.require_backward_grad_sync, container.require_forward_param_sync
        container.require_backward_grad_sync = container.require_forward_param_sync = True
        # The forward ran under no_sync and did not prepare the reducer.
        container.reducer.prepare_for_backward([])
        try:
            yield
        finally:
            container.require_backward_grad_sync, container.require_forward_param_sync = before

    @contextmanager
    def join(self, models: Sequence[nn.Module]) -> Iterator[None]:
        if any(map(has_grad_all_reduce, models)):
            raise ValueError(
                "join_uneven_inputs does not work with parameters that were frozen when their model was prepared, and are "
                "trained since: unfreeze them before `prepare`, or leave even_batches=True."
            )
        joinable: list[Joinable] = [container for container in map(_container, models) if container is not None]
        if len(joinable) < len(models):
            logger.warning("join_uneven_inputs: only prepared, trainable models can be joined; the others are ignored.")
        with Join(joinable) if joinable else nullcontext():
            yield

    def prepare_model(self, model: nn.Module, on_device: bool, evaluation: bool) -> nn.Module:
        if isinstance(model, DistributedDataParallel):  # wrapped by the user
            self.config.precision.wrap_forward(model.module)
            return model
        return super().prepare_model(model, on_device, evaluation)


def _container(model: nn.Module) -> DistributedDataParallel | None:
    """Returns the DDP wrapper of a prepared model, compiled or not, or None."""
    inner = model._orig_mod if is_compiled_module(model) else model
    return inner if isinstance(inner, DistributedDataParallel) else None


def _requires_sync(container: weakref.ref[DistributedDataParallel]) -> bool:
    found = container()
    return found is not None and bool(found.require_backward_grad_sync)


_wrapped: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


def _release_at_exit(model: DistributedDataParallel) -> None:
    if not _wrapped:
        world.at_exit(_drop_group_references)
    _wrapped.add(model)


def _drop_group_references() -> None:
    """Drops references of DDP wrappers to their process group, at exit."""
    for model in _wrapped:
        for name in ("reducer", "logger", "process_group"):
            setattr(model, name, None)
