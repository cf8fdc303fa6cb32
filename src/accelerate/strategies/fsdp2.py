"""Fully sharded training with torch's `fully_shard` (FSDP, version 2): each rank holds a shard of every parameter.

A unit is gathered for its forward and backward and freed again; gradients are averaged and sharded as backward produces
them. Parameters are replaced when a model is prepared, so optimizers made before are given the new ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from ..optimizer import AcceleratedOptimizer
from ..runtime.forward import is_compiled_module
from ..runtime.modules import get_parameters_from_modules
from ..runtime.world import World
from ..settings import env
from ..settings.enums import DistributedType
from .base import Bundle, RunSettings, Strategy, check_device_map

if TYPE_CHECKING:
    from ..checkpointing import Entry
    from ..settings.arguments import Plugins
    from ..settings.fsdp import FullyShardedDataParallelPlugin

# Containers that have no forward, so they cannot be gathered for one.
_NO_FORWARD = (nn.ModuleList, nn.ModuleDict)


class FullyShard(Strategy):
    """Every rank holds a shard of the model, of its gradients and of its optimizers' states."""

    kinds = (DistributedType.FSDP,)
    supports_local_sgd = False
    dimensions = frozenset({"dp_replicate", "dp_shard"})

    @classmethod
    def check_settings(cls, plugins: Plugins) -> None:
        plugin = plugins.fsdp
        if plugin is None:
            return
        if plugin.fsdp_version == 1:
            raise ValueError(
                "fsdp_version=1 is not part of this version: use fsdp_version=2 (--fsdp_version 2; `accelerate to-fsdp2` "
                "converts a file)."
            )
        offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        for name, asked in (
            ("cpu_offload", offloads),
            ("activation_checkpointing_offload", plugin.activation_checkpointing_offload),
        ):
            if asked:
                raise ValueError(f"{name} is not part of fully sharded training in this version: leave it out.")

    def __init__(self, world: World, settings: RunSettings) -> None:
        super().__init__(world, settings)
        if world.backend is None:
            raise ValueError(
                "fully sharded training needs a process group, even of one process: start the script with "
                "`accelerate launch --use_fsdp --fsdp_version 2`."
            )
        if settings.precision.scaler is not None:
            raise ValueError(
                "mixed_precision='fp16' is not part of fully sharded training in this version: use 'bf16'."
            )
        assert settings.fsdp is not None, "the state makes one"
        self.plugin: FullyShardedDataParallelPlugin = settings.fsdp
        self._mesh = _shards(settings.mesh, world)
        self._replaced = WeakIdKeyDictionary()  # parameter before -> its sharded successor
        if self.plugin.cpu_ram_efficient_loading:  # transformers' from_pretrained reads these
            env.publish({"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"})

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
            _check_sharing(model, self._units(model))
        for optimizer in bundle.optimizers.values():
            inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
            params = [param for group in inner.param_groups for param in group["params"]]
            if inner.state and not all(isinstance(param, DTensor) for param in params):
                raise ValueError(
                    f"{type(inner).__name__} has stepped already, and its states cannot follow parameters that are about to "
                    "be sharded: prepare model and optimizer before the first step."
                )
            if not all(id(param) in here or param in self._replaced or isinstance(param, DTensor) for param in params):
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

    def prepare_model(self, model: nn.Module, on_device: bool, evaluation: bool) -> nn.Module:
        if isinstance(model, FSDPModule):  # sharded by the user
            self.settings.precision.wrap_forward(model)
            return model
        model = self.settings.precision.convert(model)
        policy = self._policy()
        # Under mixed precision the optimizer steps in float32, whatever the weights were loaded in.
        _make_plain(model, upcast=policy.param_dtype is not None)
        _give_memory(model, self.world.device)
        model.to(self.world.device)
        self._same_everywhere(model)
        before = dict(model.named_parameters(remove_duplicate=False))
        ignored = self._ignored(model)
        for unit in (*self._units(model), model):
            if self.plugin.activation_checkpointing and unit is not model:
                _checkpoint(unit)
            fully_shard(
                unit,
                mesh=self._mesh,
                reshard_after_forward=bool(self.plugin.reshard_after_forward),
                mp_policy=policy,
                ignored_params=ignored,
            )
        for name, param in model.named_parameters(remove_duplicate=False):
            self._replaced[before[name]] = param
        self.settings.precision.wrap_forward(model)
        return self._compiled(model)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, on_device: bool) -> AcceleratedOptimizer:
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        for group in inner.param_groups:
            group["params"] = [self._replaced.get(param, param) for param in group["params"]]
        return super().prepare_optimizer(optimizer, on_device)

    def _same_everywhere(self, model: nn.Module) -> None:
        """Gives every rank the values of rank 0."""
        if self.world.size == 1:
            return
        for value in {id(value): value.data for value in (*model.parameters(), *model.buffers())}.values():
            sent = value.contiguous()
            self.world.collectives.broadcast(sent)
            if sent is not value:
                value.copy_(sent)

    def _policy(self) -> MixedPrecisionPolicy:
        policy = self.plugin.mixed_precision_policy
        return policy if isinstance(policy, MixedPrecisionPolicy) else MixedPrecisionPolicy()

    def _units(self, model: nn.Module) -> list[nn.Module]:
        """The modules that are gathered on their own, inner ones first."""
        plugin = copy.copy(self.plugin)  # what is found out about one model is not about the next
        plugin.set_auto_wrap_policy(model)
        return units(model, plugin.auto_wrap_policy) if callable(plugin.auto_wrap_policy) else []

    def _ignored(self, model: nn.Module) -> set[nn.Parameter]:
        modules = self.plugin.ignored_modules
        return set() if modules is None else get_parameters_from_modules(modules, model, self.world.device)

    # Step ------------------------------------------------------------------------------------------------------------

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        sharded = _sharded(model)
        return nullcontext() if sharded is None else _synchronising(sharded, False)

    @staticmethod
    @contextmanager
    def sync_in_backward(model: nn.Module) -> Iterator[None]:
        sharded = _sharded(model)
        with nullcontext() if sharded is None else _synchronising(sharded, True):
            yield

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        norm = super().clip_grad_norm_(parameters, max_norm, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextmanager
    def join(self, models: Sequence[nn.Module]) -> Iterator[None]:
        if self.world.size > 1:
            raise ValueError(
                "join_uneven_inputs does not work with fully sharded training: a rank without a batch would not take part "
                "when the others gather parameters. Leave even_batches=True."
            )
        yield

    # State -----------------------------------------------------------------------------------------------------------

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """The model's full state on the CPU of rank 0, and an empty one elsewhere. Collective."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.unwrap(model, keep_torch_compile=False), options=options)

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


def _shards(mesh: DeviceMesh | None, world: World) -> DeviceMesh:
    """The dimensions over which parameters are replicated (if there is such a one) and sharded."""
    if mesh is None:
        return init_device_mesh(world.device.type, (world.size,))
    names = mesh.mesh_dim_names or ()
    if "dp_shard" not in names:
        raise ValueError(
            "fully sharded training needs dp_shard_size above 1: with dp_replicate_size alone, leave FSDP out."
        )
    return mesh["dp_replicate", "dp_shard"] if "dp_replicate" in names else mesh["dp_shard"]


def _check_sharing(model: nn.Module, found: Iterable[nn.Module]) -> None:
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


def _make_plain(model: nn.Module, upcast: bool) -> None:
    """Gives parameters the layout that can be sharded, and those that are trained float32 with `upcast`."""
    for param in model.parameters():
        if upcast and param.requires_grad and param.dtype in (torch.float16, torch.bfloat16):
            param.data = param.data.float()
        if not param.is_contiguous():
            param.data = param.data.contiguous()


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


def _checkpoint(unit: nn.Module) -> None:
    from torch.distributed._composable import checkpoint

    checkpoint(unit)


def _sharded(model: nn.Module) -> FSDPModule | None:
    inner = model._orig_mod if is_compiled_module(model) else model
    return inner if isinstance(inner, FSDPModule) else None


@contextmanager
def _synchronising(model: FSDPModule, wanted: bool) -> Iterator[None]:
    model.set_requires_gradient_sync(wanted)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
