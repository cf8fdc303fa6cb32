"""Traces the memory of a training step on fake tensors, which have shapes but no values.

Every storage that a real step would allocate is counted from allocation to release, so activations need no rule of thumb.
Workspace inside kernels and memory cached by the allocator are not counted.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ...runtime.tensors.pytree import convert_to_fp32
from .sharding import Event, EventKind, FSDPUnit, Sharding, StepTrace, Weight, rank_memory


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step with Adam holds.

    Attributes:
        weights: Parameters and buffers.
        gradients: All gradients at the end of the backward.
        optimizer: Adam's two moments and its step counts.
        activations: Peak of all other memory: activations saved for the backward, and temporaries.
        peak: Peak of all memory; less than the sum, since activations are freed as gradients are computed.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


class TraceError(RuntimeError):
    """Raised if a step depends on values of tensors, or on inputs of an unsupported kind."""


def trace_step(
    model: nn.Module, batch_size: int, sequence_length: int, mixed: bool, at_once: bool = False
) -> StepMemory:
    """Returns the memory of training on one process; see `trace_units`."""
    step = trace_units(model, batch_size, sequence_length, mixed=mixed, at_once=at_once)
    found = rank_memory(step, Sharding(version=0))
    return StepMemory(found.weights, found.gradients, found.optimizer, found.activations, found.peak)


def trace_units(
    model: nn.Module,
    batch_size: int,
    sequence_length: int,
    *,
    mixed: bool = False,
    units: Callable[[nn.Module], Sequence[nn.Module]] = lambda model: (),
    half: bool = False,
    checkpoint: bool = False,
    at_once: bool = False,
) -> StepTrace:
    """Traces the second of two training steps on fake tensors; Adam's state exists from the second step on.

    Args:
        model: A model on the meta device; not modified.
        batch_size: Samples per batch.
        sequence_length: Tokens per sample, for language models.
        mixed: Whether the forward runs under autocast to 16 bits.
        units: Selects the modules to wrap, inner ones first.
        half: Whether parameters are cast to 16 bits for the forward.
        checkpoint: Whether units recompute their activations in the backward.
        at_once: Whether Adam uses its foreach implementation, torch's default on accelerators.

    Raises:
        TraceError: if the step depends on values of tensors.
    """
    import copy

    from torch._subclasses.fake_tensor import FakeTensorMode

    model = copy.deepcopy(model).train()
    widths = {name: parameter.element_size() for name, parameter in model.named_parameters()}
    chosen = [*units(model), model]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _MemoryTracker() as tracker:
            _give_storage(model, torch.bfloat16 if half else None)
            kept = tracker.live
            buffers = kept - _bytes(model.parameters())
            watch = _UnitHooks(model, chosen, tracker)
            inputs = _with_labels(model, _inputs(model, batch_size, sequence_length))
            watch.attach(cast=torch.bfloat16 if half else None, checkpoint=checkpoint)
            optimizer = torch.optim.AdamW(model.parameters(), foreach=at_once)
            for _ in range(2):
                states = _bytes(tree_leaves([list(state.values()) for state in optimizer.state.values()]))
                watch.restart(kept + states)
                _step(model, optimizer, inputs, mixed, watch)
    except TraceError:
        raise
    except Exception as error:
        text = str(error).strip().split("\n")[0][:200]
        raise TraceError(f"{type(error).__name__}: {text}") from error
    return StepTrace(watch.weights(widths), tuple(watch.events), buffers, at_once)


class _UnitHooks:
    """Records the events of units in a step by module and autograd hooks.

    Attributes:
        events: Events since `restart`, in order.
        backward: Whether the backward has begun; a forward is then a recomputation.
    """

    def __init__(self, model: nn.Module, units: Sequence[nn.Module], tracker: _MemoryTracker) -> None:
        self.units, self.tracker = units, tracker
        self.events: list[Event] = []
        self.backward = False
        self._reduced: set[int] = set()
        self._learned: set[tuple[int, int]] = set()
        taken: dict[nn.Parameter, str] = {}
        self.parameters: list[list[tuple[str, nn.Parameter]]] = []
        for unit in units:  # inner ones come first
            own = {parameter: name for name, parameter in model.named_parameters() if parameter not in taken}
            mine = set(unit.parameters())
            self.parameters.append([(name, parameter) for parameter, name in own.items() if parameter in mine])
            taken.update((parameter, name) for name, parameter in self.parameters[-1])

    def attach(self, cast: torch.dtype | None, checkpoint: bool) -> None:
        """Registers hooks on units and parameters."""
        from torch.distributed._composable import checkpoint as recompute

        for number, (unit, parameters) in enumerate(zip(self.units, self.parameters, strict=True)):
            if checkpoint and number < len(self.units) - 1:
                recompute(unit, preserve_rng_state=False)
            self._attach(number, unit, cast)
            for place, (_, parameter) in enumerate(parameters):
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(
                        lambda p, number=number, place=place: self._gradient(number, place, p)
                    )

    def _attach(self, number: int, unit: nn.Module, cast: torch.dtype | None) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if self.backward:
                return None
            self.note(EventKind.FORWARD, number)
            if cast is not None:
                args, kwargs = tree_map(lambda value: _cast(value, cast), (args, kwargs))
            return self._passing(number, args, kwargs)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            if self.backward:
                return
            self.note(EventKind.DONE, number)
            values = tree_leaves(dict(output) if hasattr(output, "keys") else output)
            tensors = [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]
            if tensors:
                torch.autograd.graph.register_multi_grad_hook(tensors, lambda _: self._enter(number), mode="any")

        unit.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        unit.register_forward_hook(after)

    def _passing(self, number: int, args: Any, kwargs: Any) -> Any:
        """Returns the inputs, passed through a function whose backward records the end of the unit's backward."""
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor) and v.requires_grad]
        if not tensors:
            return args, kwargs
        passed = iter(_Identity.apply(lambda: self.reduce(number), *tensors))

        def swap(value: Any) -> Any:
            return next(passed) if isinstance(value, torch.Tensor) and value.requires_grad else value

        return tree_map(swap, (args, kwargs))

    def _enter(self, number: int) -> None:
        self.backward = True
        self.note(EventKind.BACKWARD, number)

    def _gradient(self, number: int, place: int, parameter: torch.Tensor) -> None:
        self._learned.add((number, place))
        self.tracker.held += _bytes([parameter.grad])
        self.note(EventKind.GRADIENT, number, place)

    def reduce(self, number: int) -> None:
        """Records the end of a unit's backward."""
        self._reduced.add(number)
        self.note(EventKind.REDUCED, number)

    def finish(self) -> None:
        """Records the end of the backward, also of units whose inputs have no gradients."""
        for number in range(len(self.units)):
            if number not in self._reduced:
                self.reduce(number)
        self.backward = False
        self.note(EventKind.UPDATE)

    def restart(self, held: int) -> None:
        """Begins a step with `held` bytes of weights and optimizer state."""
        self._reduced.clear()
        self.events.clear()
        self.tracker.held = held
        self.note(EventKind.START)

    def note(self, kind: EventKind, unit: int = -1, weight: int = -1) -> None:
        """Records an event."""
        if self.events:
            self.events[-1] = replace(self.events[-1], most=self.tracker.most_loose)
        now = self.tracker.live - self.tracker.held
        self.tracker.most_loose = now
        self.events.append(Event(kind, unit, weight, now, now))

    def weights(self, widths: dict[str, int]) -> tuple[FSDPUnit, ...]:
        """Returns the units; a parameter without a gradient counts as frozen."""
        return tuple(
            FSDPUnit(
                tuple(
                    Weight(tuple(parameter.shape), widths[name], (number, place) in self._learned)
                    for place, (name, parameter) in enumerate(parameters)
                )
            )
            for number, parameters in enumerate(self.parameters)
        )


class _Identity(torch.autograd.Function):
    """Returns its inputs, and calls a function in the backward, when all their gradients are computed."""

    @staticmethod
    def forward(ctx: Any, done: Callable[[], None], *tensors: torch.Tensor) -> Any:
        ctx.done = done
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.done()
        return (None, *gradients)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _give_storage(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replaces meta tensors by fake CPU tensors, so that kernels are dispatched as in a real step.

    Tied tensors stay tied. Floating-point parameters are cast to `dtype` if it is given.
    """
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for name, tensor in list(table.items()):
                if isinstance(tensor, torch.Tensor):
                    if id(tensor) not in made:
                        learns = isinstance(tensor, nn.Parameter)
                        kind = dtype if dtype is not None and learns and tensor.is_floating_point() else tensor.dtype
                        empty = torch.empty(tensor.shape, dtype=kind, device="cpu")
                        made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if learns else empty
                    table[name] = made[id(tensor)]  # type: ignore[assignment]  # whatever it holds


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor], mixed: bool, watch: _UnitHooks
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        output = model(**inputs)  # training loops keep it, with its logits, until the end of the step
        if mixed:
            output = convert_to_fp32(output)
        loss = _loss(output)
    loss.backward()
    watch.finish()
    optimizer.step()
    optimizer.zero_grad()
    watch.note(EventKind.END)


def _loss(output: Any) -> torch.Tensor:
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    values = tree_leaves(dict(output) if hasattr(output, "keys") else output)
    parts = [value.float().sum() for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if not parts:
        raise TraceError("the model returns no floating-point tensor to train on")
    return torch.stack(parts).sum()


def _inputs(model: nn.Module, batch_size: int, sequence_length: int) -> dict[str, torch.Tensor]:
    """Returns a batch of tokens or images for the model, as its configuration describes them."""
    config = getattr(model, "config", None)
    picture = getattr(model, "default_cfg", {}).get("input_size") if config is None else None  # timm
    if picture is not None:
        return {"x": torch.zeros(batch_size, *picture)}
    name = getattr(model, "main_input_name", None)
    if name == "input_ids":
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and sequence_length > longest:
            raise TraceError(f"the model takes at most {longest} tokens (--sequence_length {sequence_length})")
        tokens = {"input_ids": torch.zeros(batch_size, sequence_length, dtype=torch.int64)}
        if getattr(config, "is_encoder_decoder", False):
            tokens["decoder_input_ids"] = tokens["input_ids"].clone()
        return tokens
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size is not None:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.zeros(batch_size, getattr(config, "num_channels", 3), height, width)}
    raise TraceError(f"only batches of tokens and of images are supported, and {type(model).__name__} takes {name}")


def _with_labels(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the batch with labels, one per row of logits, for a model that computes its own loss."""
    if "labels" not in inspect.signature(model.forward).parameters:
        return inputs
    with torch.no_grad():
        logits = getattr(model(**inputs), "logits", None)
    if not isinstance(logits, torch.Tensor):
        return inputs
    inputs.pop("decoder_input_ids", None)  # made from the labels
    return {**inputs, "labels": torch.zeros(logits.shape[:-1], dtype=torch.int64)}


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, torch.Tensor))


class _MemoryTracker(TorchDispatchMode):
    """Counts the bytes of live storages that operations have allocated.

    Attributes:
        live: Bytes of live storages.
        held: Bytes of weights, gradients and optimizer state among them.
        most_loose: Peak of `live - held` since it was last reset.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.held = self.most_loose = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.most_loose = max(self.most_loose, self.live - self.held)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
