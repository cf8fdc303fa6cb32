"""A model traced as one graph, and the graph cut into stages of which each takes what the one before puts out."""

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
        module: What it computes: a function of tensors, which returns a tuple of tensors.
        inputs: Shapes and number formats of what it takes, as tensors without values.
        outputs: The same of what it returns.
    """

    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


@dataclass
class SplitModel:
    """What is known of a model that was cut.

    Attributes:
        stage: The stage that was asked for.
        outputs: The model's outputs: for a tensor its position among the last stage's, else the value itself.
        shapes: Shapes and number formats of the tensors among them.
        structure: What the outputs are leaves of.
    """

    stage: Stage
    outputs: list[Any]
    shapes: tuple[torch.Tensor, ...]
    structure: Any


@dataclass(frozen=True)
class OutputRef:
    """The place of an output among those of the last stage."""

    index: int


def split(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], points: Sequence[str], number: int
) -> SplitModel:
    """Traces a model with example inputs and cuts it.

    Args:
        model: The model, in evaluation mode.
        args: Positional inputs, one part of a batch.
        kwargs: Keyword inputs.
        points: Names of the modules that stages after the first begin with.
        number: Which stage is wanted.

    Raises:
        ValueError: when the model cannot be traced, or not be cut there.
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
    crossing = _crossing(nodes, order, starts, given, [node for node in returned if isinstance(node, fx.Node)])
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
        except Exception as error:  # every layer of the tracer has errors of its own
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ValueError(
                f"{type(model).__name__} cannot be traced as one graph, which a pipeline is cut from "
                f"({type(error).__name__}: {reason}). Turn off what depends on values, caches, and outputs that are "
                "no tensors, or spread the model with a device_map instead."
            ) from error
    # Sizes are compared in our own words before each batch.
    options = {"check_guards": False} if "check_guards" in inspect.signature(exported.module).parameters else {}
    traced: Any = exported.module(**options)
    return traced, exported.call_spec.out_spec


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Traces transformers' models without keys and values of earlier steps, which are no tensors."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    caching: list[Any] = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


# Cutting --------------------------------------------------------------------------------------------------------------


def _first_node(nodes: Sequence[fx.Node], point: str) -> fx.Node:
    for node in nodes:
        inside = [f"{name}." for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
        # A list of modules is not called itself, so any module in it will do.
        if node.op == "call_function" and any(name.startswith(f"{point}.") for name in inside):
            return node
    raise ValueError(f"split_points names {point}, which computes nothing when the model runs on the example inputs.")


def _crossing(
    nodes: Sequence[fx.Node],
    order: dict[fx.Node, int],
    starts: Sequence[int],
    given: Sequence[fx.Node],
    returned: Sequence[fx.Node],
) -> list[list[fx.Node]]:
    """The values at each border: what the first stage is given, what each hands to the next, what the last returns.

    Weights are in every stage that uses them, and cross nothing.
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
                f"the model has {node.name}, which is no tensor, on both sides of a split point: choose another one."
            )
    return [list(given), *between, list(dict.fromkeys(returned))]


def _module(
    traced: fx.GraphModule, own: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """A module of some nodes of a graph."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # a weight: it may stand anywhere in the whole graph
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in own:
        if node.op in ("call_function", "call_module", "call_method"):
            for argument in node.all_input_nodes:
                copied(argument)
            copies[node] = graph.node_copy(node, copied)
    # What is sent must be contiguous.
    contiguous: dict[str, Any] = {"memory_format": torch.contiguous_format}
    sent = [graph.call_function(torch.ops.aten.contiguous.default, (copied(node),), contiguous) for node in outputs]
    graph.output(tuple(sent))
    return fx.GraphModule(traced, graph)


def to_device(stage: nn.Module, device: torch.device) -> None:
    """Moves a stage to a device, and the places where its graph names the one it was traced on."""
    assert isinstance(stage, fx.GraphModule)
    for node in stage.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(
            lambda value: device if isinstance(value, torch.device) else value, (node.args, node.kwargs)
        )
    stage.recompile()
    stage.to(device)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
