"""Pipelined inference: a model cut into stages, one on each process, through which the parts of a batch go.

The model is traced with example inputs, its graph is cut before the modules that are named (or that divide its weights
evenly), and each process keeps its stage, through which the parts of a batch go one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..offload.device_map import infer_auto_device_map
from ..offload.max_memory import get_balanced_memory
from ..offload.sizes import compute_module_sizes
from ..offload.tensors import named_module_tensors, set_module_tensor_to_device
from ..runtime import world
from ..runtime.tensors.forward import wrap_forward
from .pipeline import Pipeline, batch_length, resized
from .stages import split, to_device

_Module = TypeVar("_Module", bound=nn.Module)


def prepare_pippy(
    model: _Module,
    split_points: str | list[str] | None = "auto",
    no_split_module_classes: list[str] | None = None,
    example_args: tuple[Any, ...] | None = (),
    example_kwargs: dict[str, Any] | None = None,
    num_chunks: int | None = None,
    gather_output: bool | None = False,
) -> _Module:
    """Makes a model a pipeline for inference: each process keeps one stage of it and runs the parts of a batch through it.

    Afterwards the model is called on all processes as before. The inputs of the first process count; outputs are those of
    the whole model, on the last process, and None on the others. A batch may have any number of rows: it is filled up to
    what was traced, taken in several rounds if it is larger, and what was added is cut off again. All else about the
    inputs (names, other sizes, formats) is as in the example.

    Args:
        model: The model, the same on all processes, with its weights on the CPU. It is put in evaluation mode, and weights
            of other processes' stages are given up.
        split_points: Names of the modules that a new stage begins with, one fewer than processes, in the order in which
            they run. ``"auto"`` (and None): those that divide the weights most evenly.
        no_split_module_classes: Names of classes whose modules stay in one stage. None: those that the model names itself,
            as transformers' models do.
        example_args: Positional inputs to trace the model with. A batch of as many rows is one round.
        example_kwargs: Keyword inputs to trace the model with.
        num_chunks: In how many parts a round goes through the stages; None: as many as there are processes.
        gather_output: Outputs come to all processes.

    Returns:
        The model; ``model.hf_split_points`` names where it was cut.

    Raises:
        ValueError: for split points, inputs or outputs that make no pipeline, and for a model that cannot be traced.

    Example:
        ```python
        model = prepare_pippy(model, example_args=(input_ids,))
        with torch.no_grad():
            output = model(input_ids)
        if PartialState().is_last_process:
            print(output)
        ```
    """
    here = world.current()
    model.eval()
    args, kwargs = tuple(example_args or ()), dict(example_kwargs or {})
    stages = here.size
    rows = batch_length((args, kwargs), "example_args and example_kwargs")
    chunks = stages if num_chunks is None else num_chunks
    if chunks < 1:
        raise ValueError(f"num_chunks={num_chunks}: expected at least 1.")
    points = _split_points(model, split_points, no_split_module_classes, stages)
    model.hf_split_points = points  # type: ignore[assignment]  # a plain attribute
    if stages == 1:
        return model
    each = -(-rows // chunks)
    part = pytree.tree_map(lambda value: resized(value, each), (args, kwargs))
    found = split(model, part[0], part[1], points, here.rank)
    _check_outputs(found.shapes, each)
    to_device(found.stage.module, here.device)
    _give_up_others(model, found.stage.module)
    wrap_forward(model, Pipeline(found, part, chunks, bool(gather_output)))
    return model


def _check_outputs(outputs: Sequence[torch.Tensor], rows: int) -> None:
    for number, value in enumerate(outputs):
        if value.dim() == 0 or value.shape[0] != rows:
            raise ValueError(
                f"output {number} of the model has the shape {tuple(value.shape)} for {rows} rows of input. In a pipeline "
                "every output must have one row for each row of input (so no loss): leave labels out of the example inputs."
            )


def _give_up_others(model: nn.Module, stage: nn.Module) -> None:
    """Takes the values from all tensors that the stage does not use."""
    used = {tensor.untyped_storage().data_ptr() for _, tensor in named_module_tensors(stage, recurse=True)}
    for module in model.modules():
        for name, tensor in list(named_module_tensors(module)):
            if tensor.untyped_storage().data_ptr() not in used:
                set_module_tensor_to_device(module, name, "meta")


# Where to cut ---------------------------------------------------------------------------------------------------------


def _split_points(
    model: nn.Module, wanted: str | Sequence[str] | None, no_split: Sequence[str] | None, stages: int
) -> list[str]:
    if wanted is not None and not isinstance(wanted, str):
        known = {name for name, _ in model.named_modules() if name}
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise ValueError(f"split_points names {', '.join(unknown)}, and {type(model).__name__} has no such module.")
        if len(wanted) != stages - 1:
            raise ValueError(
                f"{len(wanted)} split_points make {len(wanted) + 1} stages, and there are {stages} processes: name "
                f"{stages - 1}, or start {len(wanted) + 1} processes."
            )
        return list(wanted)
    if wanted not in (None, "auto"):
        raise ValueError(f"split_points={wanted!r}: expected 'auto' or a list of names of modules.")
    return even_split_points(model, stages, no_split)


def even_split_points(model: nn.Module, stages: int, no_split_module_classes: Sequence[str] | None = None) -> list[str]:
    """The modules with which new stages begin if the weights are divided most evenly, in the order of definition.

    Args:
        model: The model; its values are not looked at.
        stages: How many.
        no_split_module_classes: As for `prepare_pippy`.

    Raises:
        ValueError: when it has too few parts.
    """
    if no_split_module_classes is None:
        no_split_module_classes = list(getattr(model, "_no_split_modules", None) or ())
    limits: dict[int | str, int | str] = dict.fromkeys(range(stages), 2 * compute_module_sizes(model)[""])
    even = get_balanced_memory(model, limits, no_split_module_classes)
    where = infer_auto_device_map(model, dict(even), no_split_module_classes, clean_result=False)
    modules = dict(model.named_modules())
    points = [
        next((name for name, place in where.items() if place == stage and name in modules), None)
        for stage in range(1, stages)
    ]
    found = [name for name in points if name is not None]
    if len(found) < stages - 1:
        raise ValueError(
            f"{type(model).__name__} cannot be divided into {stages} stages of whole modules: start fewer processes, name "
            "fewer classes in no_split_module_classes, or say where in split_points."
        )
    return found
