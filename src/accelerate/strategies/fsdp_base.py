"""Common base of both FSDP versions: selection of units, activation checkpointing, gradient clipping and checks.

Rank 0 holds the weights; other ranks may have theirs on the meta device. `check` raises before anything changes.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ..optimizer import AcceleratedOptimizer
from ..precision.loss_scale import LossScaler
from ..runtime.tensors.forward import ForwardWrapper, wrap_forward
from ..runtime.tensors.modules import resolve_modules
from ..runtime.world import World
from ..settings import env
from ..settings.enums import DistributedType
from .base import Bundle, StrategyConfig, check_device_map
from .parallel import bnb_params, param_remap
from .parallel.grad_sync import register_grad_all_reduce
from .parallel.materialize import check_weights
from .parallel.mesh import GRAD_REDUCE_DIMS, clip_grad_norm_, clip_grad_value_, flatten_dims, shard_groups_of
from .sharded_checkpoint import ShardedStateStrategy

if TYPE_CHECKING:
    from ..settings.plugins.fsdp import FullyShardedDataParallelPlugin

# Containers without a forward, which cannot be units.
_NO_FORWARD = (nn.ModuleList, nn.ModuleDict)


class FSDPStrategy(ShardedStateStrategy, ABC):
    """Base of strategies that shard models; a subclass implements the sharding."""

    distributed_types = (DistributedType.FSDP,)
    supports_local_sgd = False
    supported_mesh_dims = frozenset({"dp_replicate", "dp_shard"})

    def __init__(self, world: World, config: StrategyConfig) -> None:
        super().__init__(world, config)
        assert config.fsdp is not None, "the state makes one"
        self.plugin: FullyShardedDataParallelPlugin = config.fsdp
        self._param_map = param_remap.ParamMap()
        if isinstance(config.precision.scaler, LossScaler):
            config.precision.scaler.peers = world.collectives
        if self.plugin.cpu_ram_efficient_loading:  # transformers' from_pretrained reads these
            env.publish({"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"})

    @abstractmethod
    def is_sharded(self, param: torch.Tensor) -> bool:
        """Returns whether a parameter belongs to a sharded model."""

    # Prepare ---------------------------------------------------------------------------------------------------------

    def check(self, bundle: Bundle) -> None:
        # Parameters on the meta device are materialized here, so only those of rank 0 are checked.
        super().check(replace(bundle, on_device=frozenset()))
        check_device_map(bundle.models.values())
        self._check_weights(bundle.models.values())
        for model in bundle.models.values():
            bnb_params.check(model, getattr(self.plugin.mixed_precision_policy, "param_dtype", None))
        if bundle.models and self.plugin.activation_checkpointing and self.plugin.auto_wrap_policy is None:
            raise ValueError(
                "activation_checkpointing recomputes units, and the model has none: set auto_wrap_policy "
                "(--fsdp_auto_wrap_policy)."
            )
        param_remap.check_optimizers(
            bundle.models.values(), bundle.optimizers.values(), self._param_map, self.is_sharded
        )

    def _check_weights(self, models: Iterable[nn.Module]) -> None:
        """Calls `check_weights`; a subclass may initialize missing weights of rank 0 instead."""
        check_weights(models, self.world.collectives)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, on_device: bool) -> AcceleratedOptimizer:
        param_remap.remap_optimizer(optimizer, self._param_map)
        return super().prepare_optimizer(optimizer, on_device)

    def select_wrap_modules(self, model: nn.Module) -> list[nn.Module]:
        """Returns the modules that become units, inner ones first."""
        plugin = copy.copy(self.plugin)  # set_auto_wrap_policy stores classes of one model
        plugin.set_auto_wrap_policy(model)
        if not callable(plugin.auto_wrap_policy):
            return []
        return without_shared_params(model, find_units(model, plugin.auto_wrap_policy))

    def _ignored_params(self, model: nn.Module) -> list[nn.Parameter]:
        """Returns the parameters of `ignored_modules`, in the same order on all ranks."""
        modules = resolve_modules(self.plugin.ignored_modules, model)
        ignored = {param for module in modules for param in module.parameters()}
        return [param for param in model.parameters() if param in ignored]

    def apply_activation_checkpointing(self, find_units: Iterable[nn.Module]) -> None:
        """Wraps the forward of units in activation checkpointing, if the plugin enables it."""
        if self.plugin.activation_checkpointing:
            for unit in find_units:
                if not isinstance(unit.forward, CheckpointedForward):
                    wrap_forward(unit, CheckpointedForward(self._saved_tensors_context()))

    def _saved_tensors_context(self) -> Callable[[], AbstractContextManager[Any]]:
        """Returns the context factory for saved inputs of units: in device memory, or offloaded to the CPU."""
        device = self.world.device.type
        if not self.plugin.activation_checkpointing_offload or device == "cpu":  # nothing to offload
            return nullcontext
        return functools.partial(torch.autograd.graph.save_on_cpu, pin_memory=True, device_type=device)

    def _reduce_ignored_grads(self, model: nn.Module, ignored: Iterable[nn.Parameter]) -> None:
        """Registers the all-reduce of ignored parameters' gradients, which FSDP leaves local."""
        kept = [param for param in ignored if not isinstance(param, DTensor)]
        if kept and self.world.size > 1:
            peers = flatten_dims(self.config.mesh, GRAD_REDUCE_DIMS)
            register_grad_all_reduce(model, kept, None if peers is None else peers.get_group(), all_used=False)

    def _shard_groups(self, param: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
        """Returns the process groups over which a parameter is sharded; empty for an unsharded one."""
        return shard_groups_of(param)

    # Step and state --------------------------------------------------------------------------------------------------

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        return clip_grad_norm_(
            parameters, max_norm, norm_type, device=self.world.device, shard_groups=self._shard_groups
        )

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        clip_grad_value_(parameters, clip_value)

    @contextmanager
    def join(self, models: Sequence[nn.Module]) -> Iterator[None]:
        if self.world.size > 1:
            raise ValueError(
                "join_uneven_inputs does not work with fully sharded training: a rank without a batch would not join the "
                "all-gathers of the others. Leave even_batches=True."
            )
        yield


def find_units(model: nn.Module, policy: Callable[..., bool]) -> list[nn.Module]:
    """Returns the submodules that a wrap policy selects as units, inner ones first."""
    found: list[nn.Module] = []
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> int:
        """Selects units in `module`, and returns the number of its elements that units hold."""
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
    """Maps each unit, and last the model, to the parameters that no inner unit holds, by FQN."""
    names = {param: name for name, param in model.named_parameters()}
    taken: set[nn.Parameter] = set()
    by_unit: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for unit in (*found, model):  # inner ones come first
        own = [param for param in unit.parameters() if param not in taken]
        taken.update(own)
        by_unit[unit] = {names[param]: param for param in own}
    return by_unit


def without_shared_params(model: nn.Module, found: Iterable[nn.Module]) -> list[nn.Module]:
    """Drops units that share a parameter with modules outside of them.

    Two units that share a parameter would race on its all-gather, so the parent owns it.
    """
    users: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            users.setdefault(param, set()).add(module)

    def is_closed(unit: nn.Module) -> bool:
        inside = set(unit.modules())
        return all(users[param] <= inside for param in unit.parameters())

    return [unit for unit in found if is_closed(unit)]


def is_half(param: torch.Tensor) -> bool:
    """Returns whether a parameter is fp16 or bf16, in which optimizers should not step."""
    return param.dtype in (torch.float16, torch.bfloat16)


class CheckpointedForward(ForwardWrapper):
    """Runs a forward under activation checkpointing.

    Args:
        saved_tensors_context: Returns the context in which inputs are saved.
    """

    def __init__(self, saved_tensors_context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._saved_tensors_context = saved_tensors_context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.__wrapped__(*args, **kwargs)
        with self._saved_tensors_context():
            return checkpoint(self.__wrapped__, *args, use_reentrant=False, **kwargs)
