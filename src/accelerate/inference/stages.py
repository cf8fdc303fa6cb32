"""Traces a model as one graph and splits it into stages, each of which takes the outputs of the one before."""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree


@dataclass
class Stage:
    """One stage of a model.

    Attributes:
        module: A function from tensors to a tuple of tensors.
        inputs: Shapes and dtypes of its inputs, as meta tensors.
        outputs: Shapes and dtypes of its outputs, as meta tensors.
    """

    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


@dataclass
class SplitModel:
    """A traced and split model.

    Attributes:
        stage: The requested stage.
        outputs: The model's outputs: an `OutputRef` for each tensor, and other values as they are.
        shapes: Shapes and dtypes of the last stage's outputs, as meta tensors.
        structure: The pytree structure of the outputs.
    """

    stage: Stage
    outputs: list[Any]
    shapes: tuple[torch.Tensor, ...]
    structure: Any


@dataclass(frozen=True)
class OutputRef:
    """Index of a model output among the outputs of the last stage."""

    index: int


def split(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], points: Sequence[str], number: int
) -> SplitModel:
    """Traces a model with example inputs and splits it.

    Args:
        model: The model, in evaluation mode.
        args: Positional inputs of one microbatch.
        kwargs: Keyword inputs.
        points: Names of the modules that start the second and later stages.
        number: Number of the requested stage.

    Raises:
        ValueError: if the model cannot be traced, or cannot be split there.
    """
    traced, structure = _traced(model, args, kwargs)
    nodes = list(traced.graph.nodes)
    order = {node: position for position, node in enumerate(nodes)}
    starts = [order[_first_node(nodes, point)] for point in points]
    if starts != sorted(set(starts)):
        raise ValueError(f"split_points={list(points)} are not in the order in which the model runs them.")
    returned = pytree.tree_leaves(nodes[-1].args[0])
    inputs = [node for node in nodes if node.op == "placeholder"]
    given = [node for node, leaf in zip(inputs, pytree.tree_leaves((args, kwargs)), strict=True) if _is_tensor(leaf)]
    crossing = _boundary_values(nodes, order, starts, given, [node for node in returned if isinstance(node, fx.Node)])
    own = nodes[([0, *starts])[number] : ([*starts, len(nodes) - 1])[number]]
    module = _module(traced, own, crossing[number], crossing[number + 1])
    shapes = [tuple(torch.empty_like(node.meta["val"], device="meta").contiguous() for node in c) for c in crossing]
    places = {node: OutputRef(index) for index, node in enumerate(crossing[-1])}
    return SplitModel(
        Stage(module, shapes[number], shapes[number + 1]),
        [places[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in returned],
        shapes[-1],
        structure,
    )


# Tracing --------------------------------------------------------------------------------------------------------------


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.GraphModule, Any]:
    with _without_cache(model), torch.no_grad():
        try:
            exported = torch.export.export(model, args, kwargs, strict=False)  # the default of newer releases
        except Exception as error:  # each layer of the tracer raises its own errors
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ValueError(
                f"{type(model).__name__} cannot be traced as one graph, which a pipeline needs "
                f"({type(error).__name__}: {reason}). Turn off value-dependent control flow, caches, and outputs that are "
                "not tensors, or dispatch the model with a device_map instead."
            ) from error
    # Sizes are validated before each batch, with clearer messages.
    options = {"check_guards": False} if "check_guards" in inspect.signature(exported.module).parameters else {}
    traced: Any = exported.module(**options)
    return traced, exported.call_spec.out_spec


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Disables the KV cache of transformers models, which is no tensor, for the trace."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    caching: list[Any] = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


# Splitting ------------------------------------------------------------------------------------------------------------


def _first_node(nodes: Sequence[fx.Node], point: str) -> fx.Node:
    for node in nodes:
        inside = [f"{name}." for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
        # A ModuleList is not called itself, so match any module in it.
        if node.op == "call_function" and any(name.startswith(f"{point}.") for name in inside):
            return node
    raise ValueError(f"split_points contains {point}, which runs no operation on the example inputs.")


def _boundary_values(
    nodes: Sequence[fx.Node],
    order: dict[fx.Node, int],
    starts: Sequence[int],
    given: Sequence[fx.Node],
    returned: Sequence[fx.Node],
) -> list[list[fx.Node]]:
    """Returns the values at each stage boundary: the inputs of the first stage, those between stages, and the outputs.

    Weights are included in every stage that uses them, and cross no boundary.
    """
    made = {node: 0 if node.op == "placeholder" else bisect.bisect(starts, order[node]) for node in nodes}
    needed = {node: max((made[user] for user in node.users if user.op != "output"), default=0) for node in nodes}
    needed.update(dict.fromkeys(returned, len(starts)))
    between = [
        [node for node in nodes[:-1] if node.op != "get_attr" and made[node] <= border < needed[node]]
        for border in range(len(starts))
    ]
    for node in (node for border in between for node in border):
        if not _is_tensor(node.meta.get("val")):
            raise ValueError(
                f"the model has {node.name}, which is not a tensor, on both sides of a split point: choose another one."
            )
    return [list(given), *between, list(dict.fromkeys(returned))]


def _module(
    traced: fx.GraphModule, own: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """Builds a module from some nodes of a graph."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}

    def copy_node(node: fx.Node) -> fx.Node:
        if node not in copies:  # a weight, which may be anywhere in the traced graph
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in own:
        if node.op in ("call_function", "call_module", "call_method"):
            for argument in node.all_input_nodes:
                copy_node(argument)
            copies[node] = graph.node_copy(node, copy_node)
    # Point-to-point communication requires contiguous tensors.
    contiguous: dict[str, Any] = {"memory_format": torch.contiguous_format}
    sent = [graph.call_function(torch.ops.aten.contiguous.default, (copy_node(node),), contiguous) for node in outputs]
    graph.output(tuple(sent))
    return fx.GraphModule(traced, graph)


def to_device(stage: nn.Module, device: torch.device) -> None:
    """Moves a stage to a device, including the devices that its graph mentions."""
    assert isinstance(stage, fx.GraphModule)
    for node in stage.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(
            lambda value: device if isinstance(value, torch.device) else value, (node.args, node.kwargs)
        )
    stage.recompile()
    stage.to(device)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
