"""Applies a tensor-parallel plan to a model: patterns of module names, with a parallel style for each.

A plan maps patterns (``"layers.*.mlp.up_proj"``) to torch's styles (``ColwiseParallel()``), or to the names that
transformers' models use in their ``_tp_plan``. `check` raises for a plan that does not fit, before anything changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ...runtime.system.availability import is_torch_version

if TYPE_CHECKING:
    from ...parallelism_config import ParallelismConfig

# Names of styles in transformers' plans -> torch's styles.
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
    "sequence_parallel": SequenceParallel,
}
# Style and module -> dimension along which the weight is sharded.
_SHARD_DIMS: dict[tuple[type[ParallelStyle], type[nn.Module]], int] = {
    (ColwiseParallel, nn.Linear): 0,
    (RowwiseParallel, nn.Linear): 1,
    (ColwiseParallel, nn.Embedding): 1,
    (RowwiseParallel, nn.Embedding): 0,
}


def check(model: nn.Module, mesh: DeviceMesh | None, sizes: ParallelismConfig | None, sharded: bool = False) -> None:
    """Raises for a model that `parallelize` cannot shard; does nothing on a mesh without ``tp``.

    Args:
        model: The model.
        mesh: The device mesh.
        sizes: Sizes of the mesh, with an optional plan.
        sharded: Whether FSDP shards the parameters further, over other dimensions of the same mesh.

    Raises:
        ValueError: naming the module or parameter that does not fit.
    """
    if mesh is None or sizes is None or not _has_dim(mesh, "tp"):
        return
    there = next(_tp_meshes(model), None)
    if there is None:
        _check_plan(model, _expand_plan(model, sizes), sizes.tp_size)
    elif there["tp"].size() != sizes.tp_size or (sharded and there != mesh["tp"]):
        raise ValueError(
            f"{type(model).__name__} is already sharded over {there}, which is not the dimension 'tp' of this run's mesh "
            f"(tp_size={sizes.tp_size}): load it unsharded, and `prepare` shards it."
        )


def planned_params(model: nn.Module, sizes: ParallelismConfig | None) -> set[nn.Parameter] | None:
    """Returns the parameters that `parallelize` may replace; None for a model that is sharded already."""
    if next(_tp_meshes(model), None) is not None:
        return None
    return {param for path in _expand_plan(model, sizes) for param in model.get_submodule(path).parameters()}


def parallelize(model: nn.Module, mesh: DeviceMesh | None, sizes: ParallelismConfig | None) -> None:
    """Shards the model's parameters over ``tp`` by its plan. Tied parameters stay tied.

    Args:
        model: Model with the same values on all ranks. A model that transformers loaded sharded is left unchanged.
        mesh: The device mesh; nothing is done without a dimension ``tp``.
        sizes: Sizes of the mesh, with an optional plan.
    """
    if mesh is None or not _has_dim(mesh, "tp") or next(_tp_meshes(model), None) is not None:
        return
    shared = _tied_names(model)
    trained = {name: param.requires_grad for name, param in model.named_parameters(remove_duplicate=False)}
    # Skips the scatter from rank 0: all ranks have the same values. torch 2.6 has no such option.
    options: dict[str, Any] = {"src_data_rank": None} if is_torch_version(">=", "2.7.0") else {}
    parallelize_module(model, mesh["tp"], dict(_expand_plan(model, sizes)), **options)
    for name, param in model.named_parameters(remove_duplicate=False):
        param.requires_grad_(trained[name])  # torch 2.6 sets requires_grad of all shards
    for first, *others in shared:  # each module was sharded separately
        param = model.get_parameter(first)
        for name in others:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = param


def _has_dim(mesh: DeviceMesh | None, dimension: str) -> bool:
    return mesh is not None and dimension in (mesh.mesh_dim_names or ())


def _tp_meshes(model: nn.Module) -> Iterator[DeviceMesh]:
    """Yields the meshes with a dimension ``tp`` of the model's DTensors."""
    meshes = (param.device_mesh for param in model.parameters() if isinstance(param, DTensor))
    return (mesh for mesh in meshes if _has_dim(mesh, "tp"))


def _expand_plan(model: nn.Module, sizes: ParallelismConfig | None) -> dict[str, ParallelStyle]:
    """Expands the patterns of a plan to a style for each module FQN.

    Raises:
        ValueError: for a model without a plan, or a pattern without a match.
    """
    handler = sizes.tp_handler if sizes is not None else None
    given: dict[str, Any] = (handler.plan if handler is not None else None) or getattr(model, "_tp_plan", None) or {}
    kind = type(model).__name__
    if not given:
        raise ValueError(
            f"{kind} has no plan for tensor parallelism: load it with "
            "from_pretrained(..., tp_plan='auto', device_mesh=accelerator.torch_device_mesh['tp']), or pass "
            "ParallelismConfig(tp_handler=TorchTensorParallelConfig(plan={'layers.*.mlp.up_proj': 'colwise', ...}))."
        )
    plan: dict[str, ParallelStyle] = {}
    for pattern, style in given.items():
        found = list(_matching_modules(model, pattern))
        if not found:
            raise ValueError(f"the plan of tensor parallelism names {pattern!r}, but {kind} has no such module.")
        for name in found:
            plan[name] = _resolve_style(style, pattern)
    return plan


def _check_plan(model: nn.Module, plan: dict[str, ParallelStyle], ranks: int | None) -> None:
    """Checks divisibility and tied parameters of a plan.

    Raises:
        ValueError: if a tensor is not divisible by the ranks, or modules with a tied parameter have different shardings.
    """
    for path, style in plan.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear) and isinstance(style, (ColwiseParallel, RowwiseParallel)):
            between = (style.output_layouts if isinstance(style, ColwiseParallel) else style.input_layouts)[0]
            size = module.out_features if isinstance(style, ColwiseParallel) else module.in_features
            if between.is_shard() and ranks is not None and size % ranks:
                raise ValueError(
                    f"{path} cannot be sharded over {ranks} ranks (tp_size={ranks}): {size} = {size // ranks} x {ranks} "
                    f"+ {size % ranks}: choose a tp_size that divides {size}, or leave the module out of the plan."
                )
    for names in _tied_names(model):
        shardings = {name: _weight_sharding(model, name.rpartition(".")[0], plan) for name in names}
        if len(set(shardings.values())) > 1:
            listed = ", ".join(
                f"{name}: {'unsharded' if sharding is None else f'along dimension {sharding}'}"
                for name, sharding in shardings.items()
            )
            raise ValueError(
                f"the plan of tensor parallelism gives a tied parameter different shardings ({listed}): use one style for "
                "all of its modules, or leave all out."
            )


def _matching_modules(model: nn.Module, pattern: str) -> Iterator[str]:
    expression = re.compile(r"[^.]+".join(map(re.escape, pattern.split("*"))))
    return (name for name, _ in model.named_modules() if expression.fullmatch(name))


def _resolve_style(style: Any, pattern: str) -> ParallelStyle:
    if isinstance(style, ParallelStyle):
        return style
    if style not in STYLES:
        raise ValueError(
            f"the plan of tensor parallelism has {style!r} for {pattern!r}: choose from {', '.join(STYLES)}, or pass a "
            "style of torch.distributed.tensor.parallel. A model of transformers can be loaded in its own styles: "
            "from_pretrained(..., tp_plan='auto', device_mesh=accelerator.torch_device_mesh['tp'])."
        )
    return STYLES[style]()


def _tied_names(model: nn.Module) -> list[list[str]]:
    """Returns the FQNs of each group of tied parameters."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _weight_sharding(model: nn.Module, path: str, plan: dict[str, ParallelStyle]) -> Any:
    """Returns the dimension along which a module's weight is sharded, or its other style; None if it is not in the plan."""
    style = plan.get(path)
    if style is None:
        return None
    module = model.get_submodule(path)
    return next(
        (sharding for (a, b), sharding in _SHARD_DIMS.items() if isinstance(style, a) and isinstance(module, b)),
        repr(style),
    )
