"""``accelerate estimate-memory``: the memory that a model needs to be loaded, and to be trained with Adam."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...settings import env
from ..parsers import add, make_parser
from . import device_map, per_rank
from .empty_model import (
    EstimateError,
    add_timm_hub_prefix,
    build_model,
    check_has_model,
    create_empty_model,
    find_source,
    verify_on_hub,
)

if TYPE_CHECKING:
    from .device_map import MapReport
    from .per_rank import RankPlan
    from .sharding import RankMemory
    from .step import StepMemory

__all__ = [
    "add_timm_hub_prefix",
    "check_has_model",
    "create_ascii_table",
    "create_empty_model",
    "estimate_command",
    "estimate_command_parser",
    "estimate_training_usage",
    "gather_data",
    "main",
    "verify_on_hub",
]

# dtype -> reduction of the size against float32.
_SHRINKS = {"float32": 1, "float16": 2, "int8": 4, "int4": 8}
_WIDTH = 80
_SEQUENCE_LENGTH = 128


def estimate_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Returns the command's parser."""
    parser = make_parser(
        "estimate-memory",
        "Estimates the memory that a model needs: its largest layer, all of it, and weights, gradients and state when it is "
        "trained with Adam. The weights are not downloaded. Inference takes up to 20% more than the model.",
        subparsers,
    )
    add(parser, "model_name", help="a model on the Hub, a folder, or a config.json")
    add(
        parser,
        "--library_name",
        choices=("timm", "transformers"),
        help="the model's library, if its configuration does not name it",
    )
    add(
        parser,
        "--dtypes",
        nargs="+",
        default=list(_SHRINKS),
        choices=list(_SHRINKS),
        metavar="DTYPE",
        help=f"dtypes to show: {', '.join(_SHRINKS)} (all)",
    )
    add(
        parser,
        "--trust_remote_code",
        action="store_true",
        help="run the code in the model's repository: read it first",
    )
    add(
        parser,
        "--batch_size",
        type=_positive,
        help="also trace a training step with this many samples, activations included",
    )
    add(parser, "--sequence_length", type=_positive, help=f"tokens per sample of that step ({_SEQUENCE_LENGTH})")
    add(parser, "--json", action="store_true", help="print bytes as JSON instead of a table")
    device_map.add_flags(parser)
    per_rank.add_flags(parser)
    parser.set_defaults(func=estimate_command)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, found {text!r}")
    return int(text)


def estimate_training_usage(bytes: int, mixed_precision: str, msamp_config: str | None = None) -> dict[str, float]:
    """Returns the memory of training with Adam, without activations.

    Args:
        bytes: Size of the model in the estimated dtype.
        mixed_precision: ``float32``, or ``float16`` or ``bfloat16`` for mixed precision.
        msamp_config: Accepted for compatibility; MS-AMP is not estimated.

    Returns:
        Bytes of ``model``, ``optimizer`` and ``gradients``, whose sum training needs, and of the optimizer's ``step``
        alone. All are -1 for a dtype without training.
    """
    if mixed_precision == "float32":
        return {"model": bytes, "optimizer": bytes * 2, "gradients": bytes, "step": bytes * 4}
    if mixed_precision in ("float16", "bfloat16") and msamp_config is None:
        # gradients are computed in 16 bits and held in both dtypes for the step: half as much again
        return {"model": bytes, "optimizer": bytes * 2, "gradients": bytes + bytes // 2, "step": bytes * 2}
    return dict.fromkeys(("model", "optimizer", "gradients", "step"), -1)


def training_total(usage: dict[str, float]) -> float | None:
    """Returns the total of training, or None for a dtype without training."""
    total = usage["model"] + usage["optimizer"] + usage["gradients"]
    return total if total >= 0 else None


def gather_data(args: argparse.Namespace) -> list[list[Any]]:
    """Returns the rows of the table: dtype, largest layer, total (bytes) and `estimate_training_usage` for each dtype.

    Raises:
        EstimateError: if the model cannot be found or built.
    """
    return _rows(create_empty_model(args.model_name, args.library_name, args.trust_remote_code), args.dtypes)


def _rows(model: Any, dtypes: Sequence[str]) -> list[list[Any]]:
    from ...offload.sizes import calculate_maximum_sizes

    total, (largest, _) = calculate_maximum_sizes(model)
    rows = []
    for dtype in dtypes:
        size = total / _SHRINKS[dtype]
        rows.append([dtype, largest / _SHRINKS[dtype], size, estimate_training_usage(size, dtype)])  # type: ignore[arg-type]
    return rows


def trace_model(args: argparse.Namespace) -> tuple[str, str, dict[str, StepMemory]]:
    """Traces a training step: returns the model's class, a description of the batch, and the memory by precision.

    Raises:
        EstimateError: if the step cannot be traced.
    """
    from .step import TraceError, trace_step

    model, name, words = _trained(args)
    steps = {}
    for dtype, label in (("float32", "float32"), ("float16", "mixed float16")):
        if dtype in args.dtypes:
            try:
                steps[label] = trace_step(model, *_batch(args), mixed=dtype != "float32", at_once=not _on_cpu(args))
            except TraceError as error:
                raise EstimateError(f"a training step of {name} cannot be traced: {error}") from error
    return name, words, steps


def trace_ranks(args: argparse.Namespace, plan: RankPlan) -> tuple[str, str, RankMemory]:
    """Traces a training step of a rank: returns the model's class, a description of the batch, and the memory.

    Raises:
        EstimateError: if the step cannot be traced.
    """
    from .sharding import rank_memory
    from .step import TraceError, trace_units

    model, name, words = _trained(args)
    try:
        step = trace_units(
            model,
            *_batch(args),
            mixed=plan.precision != "no",
            units=plan.units,
            half=plan.sharding.compute is not None,
            checkpoint=plan.checkpoint,
            at_once=not plan.on_cpu,
        )
    except TraceError as error:
        raise EstimateError(f"a training step of {name} cannot be traced: {error}") from error
    return name, words, rank_memory(step, plan.sharding)


def _trained(args: argparse.Namespace) -> tuple[Any, str, str]:
    """Returns the model with its head, the name of its class, and a description of the batch."""
    import torch

    with torch.device("meta"):
        model = build_model(
            find_source(args.model_name, args.library_name), args.trust_remote_code, with_head=True
        ).float()
    batch, tokens = _batch(args)
    of_text = getattr(model, "main_input_name", None) == "input_ids"
    return model, type(model).__name__, f"batch size {batch}" + (f", {tokens} tokens each" if of_text else "")


def _on_cpu(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "cpu", False))


def _batch(args: argparse.Namespace) -> tuple[int, int]:
    return args.batch_size or 1, args.sequence_length or _SEQUENCE_LENGTH


def create_ascii_table(headers: list[str], rows: list[list[Any]], title: str) -> str:
    """Formats a table with box-drawing borders and a title.

    Args:
        headers: One per column.
        rows: A list of values per row.
        title: Printed centered in a row of its own.
    """
    cells = [[str(value) for value in row] for row in (headers, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    inner = sum(widths) + len(widths) - 1
    widths[-1] += max(0, len(title) - inner)
    inner = max(inner, len(title))

    def rule(left: str, middle: str, right: str) -> str:
        return left + middle.join("─" * width for width in widths) + right

    lines = [f"│{'│'.join(_center(cell, width) for cell, width in zip(row, widths, strict=True))}│" for row in cells]
    top = ["┌" + "─" * inner + "┐", f"│{_center(title, inner)}│", rule("├", "┬", "┤")]
    return "\n".join([*top, lines[0], rule("├", "┼", "┤"), *lines[1:], rule("└", "┴", "┘")])


def _center(text: str, width: int) -> str:
    left = (width - len(text) + 1) // 2
    return " " * left + text + " " * (width - len(text) - left)


def estimate_command(args: argparse.Namespace) -> None:
    """Prints the estimate.

    Raises:
        EstimateError: if the model cannot be found or built, or flags contradict each other.
    """
    limits = device_map.parse_limits(args)
    settings = per_rank.parse_settings(args)
    plan = None if settings is None else per_rank.make_plan(settings)
    model = create_empty_model(args.model_name, args.library_name, args.trust_remote_code)
    rows = _rows(model, args.dtypes)
    placed, steps, ranks = None, None, None
    if args.device_map is not None:
        placed = device_map.assign(model, args.device_map, limits, args.no_split_module_classes, args.dtypes[0])
    if plan is not None:
        ranks = trace_ranks(args, plan)
    elif args.batch_size is not None or args.sequence_length is not None:
        steps = trace_model(args)
    if args.json:
        _print_json(args, rows, placed, steps, plan, ranks)
        return
    _print_sizes(args.model_name, rows)
    if placed is not None:
        _print_map(f"The map {args.device_map!r} of {type(model).__name__} in {args.dtypes[0]}", placed)
    if steps is not None:
        _print_steps(*steps)
    if plan is not None and ranks is not None:
        _print_ranks(plan, *ranks)


def _shown(size: float | None) -> str:
    from ...runtime.helpers import convert_bytes

    return "N/A" if size is None else convert_bytes(size)


def _print_sizes(model: str, rows: list[list[Any]]) -> None:
    table = [
        [dtype, _shown(largest), _shown(total), _shown(training_total(usage))] for dtype, largest, total, usage in rows
    ]
    headers = ["dtype", "Largest Layer", "Total Size", "Training using Adam"]
    _print_table(f"Memory usage for loading {model}", headers, table)


def _print_map(title: str, placed: Sequence[MapReport]) -> None:
    table = [
        [str(one.device), "\n".join(device_map.abbreviate(one.modules)) or "-", _shown(one.size)]
        + ["no limit" if one.limit is None else _shown(one.limit)]
        for one in placed
    ]
    _print_table(title, ["device", "Modules", "Size", "Limit"], table, left=2)


def _print_steps(name: str, batch: str, steps: dict[str, StepMemory]) -> None:
    fields = ("weights", "gradients", "optimizer", "activations", "peak")
    table = [[label, *(_shown(getattr(step, field)) for field in fields)] for label, step in steps.items()]
    headers = ["precision", "Weights", "Gradients", "Adam", "Activations", "Peak"]
    _print_table(f"A training step of {name}, {batch}", headers, table)


def _print_ranks(plan: RankPlan, name: str, batch: str, memory: RankMemory) -> None:
    parts = {
        "Weights": memory.weights,
        "Gradients": memory.gradients,
        "Adam": memory.optimizer,
        "Activations": memory.activations,
        "Gathered": memory.gathered,
        "Peak": memory.peak,
    }
    offloaded = ("Weights", "Gradients", "Adam") if memory.host else ()
    table = [[part, _shown(size), "memory" if part in offloaded else "device"] for part, size in parts.items()]
    title = f"A training step of {name}, {batch}: {plan.title}"
    headers = ["part", "Each rank holds", "Where"]
    if memory.host:
        _print_table(title, headers, table)
    else:
        _print_table(title, headers[:2], [row[:2] for row in table])


def _print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SQUARE, header_style="bold")
    for number, header in enumerate(headers):
        table.add_column(Text(header), justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    console.print(Text(title, style="bold"))
    console.print(table, width=min(_WIDTH, console.width))


def _print_json(
    args: argparse.Namespace,
    rows: list[list[Any]],
    placed: list[MapReport] | None,
    steps: tuple[str, str, dict[str, StepMemory]] | None,
    plan: RankPlan | None,
    ranks: tuple[str, str, RankMemory] | None,
) -> None:
    import dataclasses
    import json

    content: dict[str, Any] = {
        "model": args.model_name,
        "dtypes": {
            dtype: {
                "largest_layer": int(largest),
                "total": int(total),
                "training_with_adam": None if (training := training_total(usage)) is None else int(training),
            }
            for dtype, largest, total, usage in rows
        },
    }
    if placed is not None:
        content["device_map"] = {
            str(one.device): {"modules": list(one.modules), "size": one.size, "limit": one.limit} for one in placed
        }
    about = {"batch_size": _batch(args)[0], "sequence_length": _batch(args)[1]}
    if steps is not None:
        precisions = {label: dataclasses.asdict(memory) for label, memory in steps[2].items()}
        content["training_step"] = {"class": steps[0], **about, "precisions": precisions}
    if plan is not None and ranks is not None:
        rank = dataclasses.asdict(ranks[2])
        content["training_step"] = {"class": ranks[0], **about, "plan": plan.title, "rank": rank}
    print(json.dumps(content, indent=2))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `accelerate_cli.main`."""
    args = estimate_command_parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(
        logging.CRITICAL
    )  # reported in one line by `TraceError`
    # transformers' warnings concern training.
    env.publish({"TRANSFORMERS_VERBOSITY": env.get("TRANSFORMERS_VERBOSITY", "error")})
    try:
        estimate_command(args)
    except EstimateError as error:
        print(f"accelerate estimate-memory: {error}", file=sys.stderr)
        return 2
    return 0
