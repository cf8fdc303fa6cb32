"""Fully sharded training with torch's `fully_shard` (FSDP, version 2): each rank holds a shard of every parameter.

A unit is all-gathered for its forward and backward and resharded afterwards; gradients are reduce-scattered during the
backward. Preparing a model replaces its parameters, so optimizers are remapped to the new ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..runtime.system.availability import is_torch_version
from ..runtime.tensors.forward import is_compiled_module
from ..runtime.world import World, backend_for_device
from .base import Bundle, StrategyConfig
from .fsdp_base import FSDPStrategy, is_half, parameters_by_unit
from .parallel import bnb_params, tp_plan
from .parallel.grad_sync import grad_sync_enabled
from .parallel.materialize import materialize_and_broadcast, move_to_meta
from .parallel.mesh import flatten_dims
from .parallel.uniform_groups import UniformGroupsOptimizer
from .sharded_checkpoint import guard_save_pretrained


class FSDP2Strategy(FSDPStrategy):
    """Every rank holds a shard of the model, of its gradients and of its optimizers' states."""

    supported_mesh_dims = frozenset({"dp_replicate", "dp_shard", "cp", "sp", "tp"})
    optimizer_class = UniformGroupsOptimizer

    def __init__(self, world: World, config: StrategyConfig) -> None:
        if config.fsdp is not None and config.fsdp.offloads and config.precision.scaler is not None:
            _check_cpu_backend(world)
        super().__init__(world, replace(config, mesh=_add_shard_dim(config.mesh)))
        self._mesh = _fsdp_mesh(self.config, world)

    def is_sharded(self, param: torch.Tensor) -> bool:
        return isinstance(param, DTensor)

    # Prepare ---------------------------------------------------------------------------------------------------------

    def check(self, bundle: Bundle) -> None:
        super().check(bundle)
        if self.world.device.type == "cpu" and is_torch_version("<", "2.7.0"):
            raise ValueError(
                f"fsdp_version=2 on the CPU needs PyTorch 2.7, and this is {torch.__version__}: update it, or use "
                "fsdp_version=1."
            )
        for model in bundle.models.values():
            if not isinstance(model, FSDPModule):
                tp_plan.check(model, self.config.mesh, self.config.parallelism_config, sharded=True)
                ignored = set(self._ignored_params(model))
                if ignored and is_torch_version("<", "2.7.0"):
                    raise ValueError(
                        f"ignored_modules with fsdp_version=2 needs PyTorch 2.7, and this is {torch.__version__}: "
                        "update it, or use fsdp_version=1."
                    )
                for params in parameters_by_unit(model, self.select_wrap_modules(model)).values():
                    self._check_unit({name: param for name, param in params.items() if param not in ignored})

    def _check_unit(self, params: dict[str, nn.Parameter]) -> None:
        dtypes: dict[torch.dtype, str] = {}
        for name, param in params.items():
            if param.ndim == 0:
                raise ValueError(
                    f"parameter {name!r} is a scalar, which fsdp_version=2 cannot shard: give it "
                    "the shape (1,), or name its module in ignored_modules."
                )
            if param.requires_grad:
                dtypes.setdefault(self._mp_policy().param_dtype or param.dtype, name)
        if len(dtypes) > 1:
            listed = ", ".join(f"{name!r} is {dtype}" for dtype, name in dtypes.items())
            raise ValueError(
                f"the gradients of a unit are reduced in one dtype, but {listed}: convert them, choose other units "
                "(auto_wrap_policy), or compute in one dtype (mixed_precision)."
            )

    def prepare_model(self, model: nn.Module, on_device: bool, evaluation: bool) -> nn.Module:
        if isinstance(model, FSDPModule):  # sharded by the user
            self.config.precision.wrap_forward(model)
            return model
        model = self.config.precision.convert(model)
        bnb_params.disable_cpu_repacking(model)
        policy, offload, reshard = self._mp_policy(), self._offload_policy(), bool(self.plugin.reshard_after_forward)
        # Under mixed precision the optimizer steps in float32, whatever the dtype of the loaded weights.
        mixed = policy.param_dtype is not None
        upcast = {param for param in model.parameters() if mixed and param.requires_grad and is_half(param)}
        before = dict(model.named_parameters(remove_duplicate=False))
        originals = move_to_meta(model, upcast)
        tp_plan.parallelize(model, self.config.mesh, self.config.parallelism_config)
        self.sync_rng()
        units, ignored = self.select_wrap_modules(model), self._ignored_params(model)
        self.apply_activation_checkpointing(units)
        options: dict[str, Any] = {"ignored_params": set(ignored)} if ignored else {}
        for unit in (*units, model):
            # The backward starts with the root module, so its parameters stay gathered if one follows (None in torch).
            # Before 2.7, torch always keeps them.
            kept = reshard and unit is model and not evaluation and is_torch_version(">=", "2.7.0")
            after = None if kept else reshard
            fully_shard(
                unit,
                mesh=self._mesh,
                reshard_after_forward=after,
                mp_policy=policy,
                offload_policy=offload,
                **options,
            )
        for name, param in model.named_parameters(remove_duplicate=False):
            old = before.pop(name)  # so that rank 0 can free parameters after their broadcast
            if old is not param:
                self._param_map[old] = param
            del old
        materialize_and_broadcast(
            model, originals, self.world.collectives, self.world.device, isinstance(offload, CPUOffloadPolicy)
        )
        self._reduce_ignored_grads(model, ignored)
        guard_save_pretrained(model)
        self.config.precision.wrap_forward(model)
        return self._compile(model)

    def _mp_policy(self) -> MixedPrecisionPolicy:
        policy = self.plugin.mixed_precision_policy
        return policy if isinstance(policy, MixedPrecisionPolicy) else MixedPrecisionPolicy()

    def _offload_policy(self) -> OffloadPolicy:
        policy = self.plugin.cpu_offload
        if isinstance(policy, CPUOffloadPolicy) and self.world.device.type == "cpu":
            return CPUOffloadPolicy(pin_memory=False)  # pinned memory serves copies to an accelerator
        return policy if isinstance(policy, OffloadPolicy) else OffloadPolicy()

    # Step ------------------------------------------------------------------------------------------------------------

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        sharded = _fsdp_module(model)
        return nullcontext() if sharded is None else _gradient_sync(sharded, False)

    @staticmethod
    @contextmanager
    def sync_in_backward(model: nn.Module) -> Iterator[None]:
        sharded = _fsdp_module(model)
        with nullcontext() if sharded is None else _gradient_sync(sharded, True):
            yield


def _check_cpu_backend(world: World) -> None:
    """Raises if the group cannot reduce tensors on the CPU, where torch looks for overflows of offloaded gradients."""
    if world.backend is not None and backend_for_device(dist.get_backend_config(), "cpu") is None:
        raise ValueError(
            f"fsdp_version=2 with cpu_offload and mixed_precision='fp16' reduces tensors on the CPU, and the process group "
            f"has {dist.get_backend_config()} only: it was initialized before the plugin was set. Create Accelerator "
            "before PartialState, launch with --fsdp_offload_params true, or initialize the group with "
            f"backend='{world.device.type}:{world.backend},cpu:gloo'."
        )


def _add_shard_dim(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """Adds a dimension ``dp_shard`` of size 1 to a mesh with ``tp`` that has no dimension for shards."""
    names = [] if mesh is None else list(mesh.mesh_dim_names or ())
    if mesh is None or "tp" not in names or not {"dp_shard", "cp", "sp"}.isdisjoint(names):
        return mesh
    index = names.index("dp_replicate") + 1 if "dp_replicate" in names else 0
    names.insert(index, "dp_shard")
    return DeviceMesh(mesh.device_type, mesh.mesh.unsqueeze(index), mesh_dim_names=tuple(names))


def _fsdp_mesh(config: StrategyConfig, world: World) -> DeviceMesh:
    """Returns the submesh for `fully_shard`: the replicas, if any, and the flattened dimensions of shards."""
    if config.mesh is None:
        return init_device_mesh(world.device.type, (world.size,))
    shards = flatten_dims(config.mesh, ("dp_shard", "cp", "sp"))
    if shards is None:
        raise ValueError(
            "fully sharded training needs dp_shard_size, cp_size, sp_size or tp_size above 1: without, leave FSDP out."
        )
    names = [name for name in config.mesh.mesh_dim_names or () if name == "dp_replicate"]
    return config.mesh[tuple(names + list(shards.mesh_dim_names or ()))]


def _fsdp_module(model: nn.Module) -> FSDPModule | None:
    inner = model._orig_mod if is_compiled_module(model) else model
    return inner if isinstance(inner, FSDPModule) else None


@contextmanager
def _gradient_sync(model: FSDPModule, enabled: bool) -> Iterator[None]:
    assert isinstance(model, nn.Module), "fully_shard makes an FSDPModule of one"
    model.set_requires_gradient_sync(enabled)
    try:
        with grad_sync_enabled(model, enabled):
            yield
    finally:
        model.set_requires_gradient_sync(True)
