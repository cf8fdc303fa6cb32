"""What both versions of fully sharded training share: which modules become units, and how ranks come to the same weights.

Rank 0 holds the weights, the others may hold theirs on the meta device. Everything that cannot be sharded is refused
before anything changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..optimizer import AcceleratedOptimizer
from ..runtime.modules import get_parameters_from_modules
from ..runtime.world import World
from ..settings import env
from ..settings.enums import DistributedType
from .base import Bundle, RunSettings, Strategy, check_device_map

if TYPE_CHECKING:
    from ..checkpointing import Entry
    from ..settings.fsdp import FullyShardedDataParallelPlugin

# Containers that have no forward, so they cannot be gathered for one.
_NO_FORWARD = (nn.ModuleList, nn.ModuleDict)


class ShardedStrategy(Strategy):
    """A base for strategies whose ranks hold shards of a model; a subclass says how it is sharded."""

    kinds = (DistributedType.FSDP,)
    supports_local_sgd = False
    dimensions = frozenset({"dp_replicate", "dp_shard"})

    def __init__(self, world: World, settings: RunSettings) -> None:
        super().__init__(world, settings)
        assert settings.fsdp is not None, "the state makes one"
        self.plugin: FullyShardedDataParallelPlugin = settings.fsdp
        if world.backend is None:
            raise ValueError(
                "fully sharded training needs a process group, even of one process: start the script with "
                f"`accelerate launch --use_fsdp --fsdp_version {self.plugin.fsdp_version}`."
            )
        self._replaced = WeakIdKeyDictionary()  # parameter before -> its sharded successor
        if self.plugin.cpu_ram_efficient_loading:  # transformers' from_pretrained reads these
            env.publish({"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"})

    def is_sharded(self, param: torch.Tensor) -> bool:
        """Whether the parameter belongs to a model that has been sharded."""
        raise NotImplementedError

    # Prepare ---------------------------------------------------------------------------------------------------------

    def check(self, bundle: Bundle) -> None:
        # What is on the meta device gets its memory here, so only rank 0 is asked about it.
        super().check(replace(bundle, on_device=frozenset()))
        check_device_map(bundle.models.values())
        self._check_weights(bundle.models.values())
        if bundle.models and self.plugin.activation_checkpointing and self.plugin.auto_wrap_policy is None:
            raise ValueError(
                "activation_checkpointing recomputes unit by unit, and there are none: set auto_wrap_policy "
                "(--fsdp_auto_wrap_policy)."
            )
        here = {id(param) for model in bundle.models.values() for param in model.parameters()}
        for model in bundle.models.values():
            check_sharing(model, self._units(model))
        for optimizer in bundle.optimizers.values():
            inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
            params = [param for group in inner.param_groups for param in group["params"]]
            if inner.state and not all(map(self.is_sharded, params)):
                raise ValueError(
                    f"{type(inner).__name__} has stepped already, and its states cannot follow parameters that are about to "
                    "be sharded: prepare model and optimizer before the first step."
                )
            if not all(id(param) in here or param in self._replaced or self.is_sharded(param) for param in params):
                raise ValueError(
                    f"{type(inner).__name__} holds parameters of a model that has not been prepared: prepare the model in "
                    "the same call, or before."
                )

    def _check_weights(self, models: Iterable[nn.Module]) -> None:
        """Every rank starts from the weights of rank 0, so that one must have them. Collective."""
        lacking = next((name for model in models for name, param in model.named_parameters() if param.is_meta), None)
        said = [lacking]
        self.world.collectives.broadcast_object_list(said)
        if said[0] is not None:
            raise ValueError(
                f"parameter {said[0]!r} is on the meta device of rank 0 and holds no values: load the weights there before "
                "`prepare`; the other ranks receive them."
            )

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, on_device: bool) -> AcceleratedOptimizer:
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        for group in inner.param_groups:
            new = [self._replaced.get(param, param) for param in group["params"]]
            group["params"] = list({id(param): param for param in new}.values())  # several may have become one
        return super().prepare_optimizer(optimizer, on_device)

    def _load(self, model: nn.Module, upcast: Iterable[nn.Parameter]) -> None:
        """Gives the model memory on the run's device, and the values of rank 0.

        Args:
            model: The model.
            upcast: Parameters that become float32.
        """
        for param in upcast:
            param.data = param.data.float()
        for param in model.parameters():  # some layouts cannot be sharded
            if not param.is_contiguous():
                param.data = param.data.contiguous()
        _give_memory(model, self.world.device)
        model.to(self.world.device)
        self._same_everywhere(model)

    def _same_everywhere(self, model: nn.Module) -> None:
        """Gives every rank the values of rank 0."""
        if self.world.size == 1:
            return
        for value in {id(value): value.data for value in (*model.parameters(), *model.buffers())}.values():
            sent = value.contiguous()
            self.world.collectives.broadcast(sent)
            if sent is not value:
                value.copy_(sent)

    def _units(self, model: nn.Module) -> list[nn.Module]:
        """The modules that are gathered on their own, inner ones first."""
        plugin = copy.copy(self.plugin)  # what is found out about one model is not about the next
        plugin.set_auto_wrap_policy(model)
        return units(model, plugin.auto_wrap_policy) if callable(plugin.auto_wrap_policy) else []

    def _ignored(self, model: nn.Module) -> set[nn.Parameter]:
        """The parameters that stay whole."""
        modules, here = self.plugin.ignored_modules, next(model.parameters(), None)
        if modules is None or here is None:
            return set()
        return get_parameters_from_modules(modules, model, here.device)

    # Step and state --------------------------------------------------------------------------------------------------

    @contextmanager
    def join(self, models: Sequence[nn.Module]) -> Iterator[None]:
        if self.world.size > 1:
            raise ValueError(
                "join_uneven_inputs does not work with fully sharded training: a rank without a batch would not take part "
                "when the others gather parameters. Leave even_batches=True."
            )
        yield

    def entries(self, *_: Any, **__: Any) -> list[Entry]:
        raise ValueError(
            "checkpoints of fully sharded training are not part of this version: save the weights with "
            "accelerator.get_state_dict(model), on all ranks, and accelerator.save on the main process."
        )


def units(model: nn.Module, policy: Callable[..., bool]) -> list[nn.Module]:
    """The modules inside `model` that `policy` makes units of their own, inner ones first."""
    found: list[nn.Module] = []
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> int:
        """How many parameters of `module` are in units by now."""
        if module in seen:
            return 0
        seen.add(module)
        size = sum(param.numel() for param in module.parameters())
        if not policy(module=module, recurse=True, nonwrapped_numel=size):
            return 0
        inside = sum(walk(child) for child in module.children())
        if module is model or isinstance(module, _NO_FORWARD):
            return inside
        if not policy(module=module, recurse=False, nonwrapped_numel=size - inside):
            return inside
        found.append(module)
        return size

    walk(model)
    return found


def parameters_by_unit(model: nn.Module, found: Iterable[nn.Module]) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """Each unit (and last the model) with the parameters that are in no unit inside it, by their names in the model."""
    names = {param: name for name, param in model.named_parameters()}
    taken: set[nn.Parameter] = set()
    by_unit: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for unit in (*found, model):  # inner ones come first
        own = [param for param in unit.parameters() if param not in taken]
        taken.update(own)
        by_unit[unit] = {names[param]: param for param in own}
    return by_unit


def check_sharing(model: nn.Module, found: Iterable[nn.Module]) -> None:
    """A parameter belongs to one unit: two would gather and free it under each other's feet."""
    unit_of: dict[nn.Module, nn.Module] = {}
    for unit in (*found, model):  # inner ones come first
        for module in unit.modules():
            unit_of.setdefault(module, unit)
    first: dict[nn.Parameter, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        for key, param in module.named_parameters(prefix=name, recurse=False):
            unit, path = first.setdefault(param, (unit_of[module], key))
            if unit is not unit_of[module]:
                raise ValueError(
                    f"parameter {path!r} is shared with {key!r}, which is in another unit: choose units that hold both "
                    "(auto_wrap_policy, transformer_cls_names_to_wrap)."
                )


def is_half(param: torch.Tensor) -> bool:
    """Whether the parameter is in a format that mixed precision computes in, and that no optimizer should step in."""
    return param.dtype in (torch.float16, torch.bfloat16)


def _give_memory(model: nn.Module, device: torch.device) -> None:
    """Puts what is on the meta device on `device`, with any values; tied parameters stay tied."""
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.is_meta:
                continue
            fresh = torch.empty_like(tensor, device=device)
            if isinstance(tensor, nn.Parameter):
                torch.utils.swap_tensors(tensor, nn.Parameter(fresh, tensor.requires_grad))
            else:
                module._buffers[name] = fresh


def checkpoint_activations(unit: nn.Module) -> None:
    """Has the unit recompute its activations in the backward."""
    from torch.distributed._composable import checkpoint

    checkpoint(unit)
