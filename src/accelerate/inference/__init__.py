"""Pipeline-parallel inference: splits a model into stages, one per rank, and runs microbatches through them.

The model is traced with example inputs, and its graph is split before the named modules (or where this divides the weights
most evenly). Each rank keeps its stage.
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
from .pipeline import Pipeline, batch_length, resize_batch
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
    """Splits a model into a pipeline for inference: each rank keeps one stage and runs microbatches through it.

    The model is then called on all ranks as before. The inputs of rank 0 are used; the last rank returns the outputs of the
    whole model, the others None. A batch may have any number of rows: it is padded to a multiple of the traced batch and run
    in rounds of that size, and the outputs are trimmed. All other properties of the inputs (names, other dimensions, dtypes)
    must be those of the example.

    Args:
        model: The model, identical on all ranks, with its weights on the CPU. It is set to evaluation mode, and weights of
            other ranks' stages are released.
        split_points: Names of the modules that start a new stage, one fewer than ranks, in order of execution. ``"auto"``
            (and None): those that divide the weights most evenly.
        no_split_module_classes: Names of classes whose modules stay in one stage. None: the model's ``_no_split_modules``,
            as in transformers.
        example_args: Positional inputs to trace the model with; their number of rows is the size of a round.
        example_kwargs: Keyword inputs to trace the model with.
        num_chunks: Number of microbatches per round; None: the number of ranks.
        gather_output: Return the outputs on all ranks.

    Returns:
        The model; ``model.hf_split_points`` has the names of the split points.

    Raises:
        ValueError: for split points, inputs or outputs unsuitable for a pipeline, or a model that cannot be traced.

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
    part = pytree.tree_map(lambda value: resize_batch(value, each), (args, kwargs))
    found = split(model, part[0], part[1], points, here.rank)
    _check_outputs(found.shapes, each)
    to_device(found.stage.module, here.device)
    _release_other_stages(model, found.stage.module)
    wrap_forward(model, Pipeline(found, part, chunks, bool(gather_output)))
    return model


def _check_outputs(outputs: Sequence[torch.Tensor], rows: int) -> None:
    for number, value in enumerate(outputs):
        if value.dim() == 0 or value.shape[0] != rows:
            raise ValueError(
                f"output {number} of the model has shape {tuple(value.shape)} for {rows} rows of input. In a pipeline "
                "every output must have one row for each row of input (so no loss): leave labels out of the example inputs."
            )


def _release_other_stages(model: nn.Module, stage: nn.Module) -> None:
    """Moves all tensors that the stage does not use to the meta device."""
    used = {tensor.untyped_storage().data_ptr() for _, tensor in named_module_tensors(stage, recurse=True)}
    for module in model.modules():
        for name, tensor in list(named_module_tensors(module)):
            if tensor.untyped_storage().data_ptr() not in used:
                set_module_tensor_to_device(module, name, "meta")


# Split points ---------------------------------------------------------------------------------------------------------


def _split_points(
    model: nn.Module, wanted: str | Sequence[str] | None, no_split: Sequence[str] | None, stages: int
) -> list[str]:
    if wanted is not None and not isinstance(wanted, str):
        known = {name for name, _ in model.named_modules() if name}
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise ValueError(
                f"split_points contains {', '.join(unknown)}, but {type(model).__name__} has no such module."
            )
        if len(wanted) != stages - 1:
            raise ValueError(
                f"{len(wanted)} split_points make {len(wanted) + 1} stages, but there are {stages} processes: pass "
                f"{stages - 1}, or start {len(wanted) + 1} processes."
            )
        return list(wanted)
    if wanted not in (None, "auto"):
        raise ValueError(f"split_points={wanted!r}: expected 'auto' or a list of module names.")
    return even_split_points(model, stages, no_split)


def even_split_points(model: nn.Module, stages: int, no_split_module_classes: Sequence[str] | None = None) -> list[str]:
    """Returns the modules that start new stages if the weights are divided most evenly, in order of definition.

    Args:
        model: The model; its values are not read.
        stages: Number of stages.
        no_split_module_classes: As for `prepare_pippy`.

    Raises:
        ValueError: if the model has too few parts.
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
            f"{type(model).__name__} cannot be divided into {stages} stages of whole modules: start fewer processes, list "
            "fewer classes in no_split_module_classes, or pass split_points."
        )
    return found
