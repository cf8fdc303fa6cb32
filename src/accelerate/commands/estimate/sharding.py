"""Computes the memory of one rank in distributed training from a training step traced on one process.

A step is a list of events (a unit's forward begins, a gradient is complete, ...) with the activations held at each. A
simulation of the sharding strategy adds the other memory: shards, all-gathered units, and gradients before they are reduced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

_ALIGNMENT = 16  # bytes; FSDP 1 aligns the original parameters of a unit
_STEP_COUNT = 4  # bytes of AdamW's step count of each parameter


class EventKind(Enum):
    """Kind of an event of a training step."""

    START = "a step begins"
    FORWARD = "a unit's forward begins"
    DONE = "a unit's forward is over"
    BACKWARD = "a unit's backward begins"
    GRADIENT = "a parameter's gradient is complete"
    REDUCED = "a unit's backward is over"
    UPDATE = "the optimizer steps"
    END = "gradients are dropped"


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        shape: Its sizes.
        width: Bytes per element in storage.
        trained: Whether it has a gradient.
    """

    shape: tuple[int, ...]
    width: int = 4
    trained: bool = True

    @property
    def numel(self) -> int:
        """Returns the number of elements."""
        return _product(self.shape)

    def rows(self, rank: int, ranks: int) -> int:
        """Returns the number of elements on a rank, sharded over the first dimension; the last shards are smaller."""
        most = self.padded(ranks)
        return max(0, min(most, self.numel - rank * most))

    def padded(self, ranks: int) -> int:
        """Returns the number of elements of the largest such shard."""
        if not self.shape or not self.numel:
            return self.numel
        return -(-self.shape[0] // ranks) * _product(self.shape[1:])


@dataclass(frozen=True)
class FSDPUnit:
    """Parameters that are all-gathered and freed together."""

    weights: tuple[Weight, ...]

    @property
    def width(self) -> int:
        """Returns the bytes per element in storage."""
        return max((weight.width for weight in self.weights), default=4)

    @property
    def trained(self) -> bool:
        """Returns whether any parameter has a gradient."""
        return any(weight.trained for weight in self.weights)


@dataclass(frozen=True)
class Event:
    """An event of a training step.

    Attributes:
        kind: The kind of event.
        unit: Index of the unit; -1 for none.
        weight: Index of the unit's parameter, for a gradient.
        now: Bytes of activations at the event.
        most: Peak bytes of activations until the next event.
    """

    kind: EventKind
    unit: int = -1
    weight: int = -1
    now: int = 0
    most: int = 0


@dataclass(frozen=True)
class StepTrace:
    """A traced training step.

    Attributes:
        units: Inner units first; last the root unit, with all remaining parameters.
        events: Events in order.
        buffers: Bytes of buffers.
        at_once: Whether the optimizer steps on all parameters at once (foreach) instead of one after the other.
    """

    units: tuple[FSDPUnit, ...]
    events: tuple[Event, ...]
    buffers: int = 0
    at_once: bool = False


@dataclass(frozen=True)
class Sharding:
    """A sharding strategy.

    Attributes:
        ranks: Number of ranks that hold one replica.
        version: 2: parameters are sharded one by one; 1: units are flattened and sharded; 0: replicated, as with DDP.
        frees: Whether gathered parameters are freed between a unit's forward and backward.
        compute: Bytes per element in the forward, if it differs from storage.
        offload: Whether shards, their gradients and the optimizer's state are in host memory.
        prefetch: Whether the backward all-gathers the next unit before it computes the current one.
        original: Whether FSDP 1 keeps the original parameters (use_orig_params).
        buckets: Whether gradients are copied into buckets for the all-reduce (DDP on several ranks).
        copies: Whether the backend copies shards into buffers of its own during a collective, as gloo does on the CPU.
    """

    ranks: int = 1
    version: int = 2
    frees: bool = True
    compute: int | None = None
    offload: bool = False
    prefetch: bool = True
    original: bool = True
    buckets: bool = False
    copies: bool = False


@dataclass(frozen=True)
class RankMemory:
    """Memory of a rank in bytes; of uneven shards, the largest.

    Attributes:
        weights: Shards of the parameters, and the model's buffers.
        gradients: Shards of the gradients.
        optimizer: Adam's two moments of the shards, and its step counts.
        activations: Peak of activations saved for the backward and of temporaries.
        gathered: Peak of all-gathered parameters and of unreduced gradients.
        peak: Peak of all memory on the device; less than the sum, since the peaks do not coincide.
        host: The part of `weights`, `gradients` and `optimizer` that is in host memory.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    peak: int
    host: int = 0


def rank_memory(step: StepTrace, sharding: Sharding, rank: int = 0) -> RankMemory:
    """Returns the memory of `rank` in a step."""
    parts = [shard_of(unit, sharding, rank) for unit in step.units]
    weights, gradients, optimizer = (
        sum(getattr(each, name) for each in parts) for name in ("weights", "gradients", "optimizer")
    )
    kept = weights + optimizer
    peak = gathered = activations = 0
    for level in peak_candidates(step, sharding, rank):
        on_device = 0 if sharding.offload else kept + level.shards
        peak = max(peak, on_device + level.passing + level.activations)
        gathered = max(gathered, level.passing)
        if level.kind is not EventKind.UPDATE:  # temporaries of the optimizer are no activations
            activations = max(activations, level.activations)
    return RankMemory(
        weights + step.buffers,
        gradients,
        optimizer,
        activations,
        gathered,
        peak + step.buffers,
        kept + gradients if sharding.offload else 0,
    )


@dataclass(frozen=True)
class UnitShard:
    """Bytes of a unit on a rank, and of its collectives.

    Attributes:
        weights: Bytes of the shard.
        gradients: Bytes of its gradients.
        optimizer: Bytes of Adam's state of it.
        whole: Bytes of the all-gathered unit, with padding.
        sent: Bytes of the all-gather's input if that is a copy of the shard (another dtype or device), else 0.
        reduced: Bytes of the reduce-scatter's input, with padding.
        sizes: Number of elements of each tensor that the optimizer steps on.
    """

    weights: int
    gradients: int
    optimizer: int
    whole: int
    sent: int
    reduced: int
    sizes: tuple[int, ...]


def shard_of(unit: FSDPUnit, sharding: Sharding, rank: int) -> UnitShard:
    """Returns a rank's shard of a unit."""
    if sharding.version == 0:
        return _whole(unit)
    return _flat(unit, sharding, rank) if sharding.version == 1 else _sharded(unit, sharding, rank)


def _whole(unit: FSDPUnit) -> UnitShard:
    trained = [weight for weight in unit.weights if weight.trained]
    gradients = sum(weight.numel * weight.width for weight in trained)
    state = 2 * gradients + _STEP_COUNT * len(trained)
    weights = sum(weight.numel * weight.width for weight in unit.weights)
    return UnitShard(weights, gradients, state, 0, 0, 0, tuple(weight.numel for weight in trained))


def _sharded(unit: FSDPUnit, sharding: Sharding, rank: int) -> UnitShard:
    ranks, compute = sharding.ranks, sharding.compute
    trained = [weight for weight in unit.weights if weight.trained]

    def padded(weights: Sequence[Weight], width: int | None) -> int:
        return sum(weight.padded(ranks) * (width or weight.width) for weight in weights)

    return UnitShard(
        weights=padded(unit.weights, None),
        gradients=padded(trained, None),
        optimizer=sum(2 * weight.rows(rank, ranks) * weight.width + _STEP_COUNT for weight in trained),
        whole=padded(unit.weights, compute) * ranks,
        sent=padded(unit.weights, compute) if compute or sharding.offload else 0,
        reduced=padded(trained, compute) * ranks,
        sizes=tuple(weight.rows(rank, ranks) for weight in trained),
    )


def _flat(unit: FSDPUnit, sharding: Sharding, rank: int) -> UnitShard:
    """Shards the concatenation of the parameters into equal pieces (FSDP 1's flat parameter)."""
    ranks, compute = sharding.ranks, sharding.compute or unit.width
    aligned = _ALIGNMENT // compute if sharding.original else 1
    places, end = [], 0
    for weight in unit.weights:
        end += -end % aligned
        places.append((end, end + weight.numel, weight.trained))
        end += weight.numel
    if sharding.original:
        end += -end % ranks
    piece = -(-end // ranks)
    begin, stop = rank * piece, min((rank + 1) * piece, end)
    inside = [max(0, min(last, stop) - max(first, begin)) for first, last, trained in places if trained]
    if sharding.original:
        optimizer = sum(2 * size * unit.width + _STEP_COUNT for size in inside if size)
    else:
        optimizer = (2 * piece * unit.width + _STEP_COUNT) if unit.trained else 0
    return UnitShard(
        weights=piece * unit.width,
        gradients=piece * unit.width if unit.trained else 0,
        optimizer=optimizer,
        whole=piece * ranks * compute,
        sent=piece * compute if compute != unit.width or sharding.offload else 0,
        reduced=piece * ranks * compute if unit.trained else 0,
        sizes=tuple(inside) if sharding.original else (piece,) * unit.trained,
    )


class PeakCandidate(NamedTuple):
    """Memory at some point of a step, without weights and the optimizer's state.

    Attributes:
        kind: The latest event.
        passing: Bytes of all-gathered parameters and of unreduced gradients.
        activations: Bytes of activations.
        shards: Bytes of reduced gradients.
    """

    kind: EventKind
    passing: int
    activations: int
    shards: int


def peak_candidates(step: StepTrace, sharding: Sharding, rank: int = 0) -> Iterator[PeakCandidate]:
    """Yields the points of a step at which memory may peak, in order."""
    return _StepSimulator(step, sharding, [shard_of(unit, sharding, rank) for unit in step.units]).levels()


class _StepSimulator:
    """Replays a step, tracking all-gathered units, collectives in flight and reduced gradients."""

    def __init__(self, step: StepTrace, sharding: Sharding, parts: Sequence[UnitShard]) -> None:
        self.step, self.sharding, self.parts = step, sharding, parts
        self.root = len(step.units) - 1
        self.whole: dict[int, int] = {}  # unit -> bytes gathered
        self.sent: dict[int, int] = {}  # unit -> buffer of an all-gather in flight or just completed
        self.raw = [0] * len(parts)  # unreduced gradients of each unit
        self.reducing = 0  # the buffer of the latest reduction
        self.shards = 0  # shards of gradients
        self.order: list[int] = []  # of forwards
        self.buckets = sum(part.gradients for part in parts) if sharding.buckets else 0

    def levels(self) -> Iterator[PeakCandidate]:
        """See `peak_candidates`."""
        cut = self.sharding.version > 0
        backward = False
        for event in self.step.events:
            backward = backward or event.kind is EventKind.BACKWARD
            if event.kind is EventKind.GRADIENT:
                self._gradient(event)
            elif event.kind is EventKind.END:
                self.shards = 0
            elif (
                cut and event.kind in _CHANGES and not (backward and event.kind in (EventKind.FORWARD, EventKind.DONE))
            ):
                for passing in _CHANGES[event.kind](self, event.unit):
                    yield PeakCandidate(event.kind, self._extra() + passing, event.now, self.shards)
            held = event.most
            if event.kind is EventKind.UPDATE:
                held = event.now + self._working(event.most - event.now)
            yield PeakCandidate(event.kind, self._extra(), held, self.shards)

    def _extra(self) -> int:
        return sum(self.whole.values()) + sum(self.sent.values()) + sum(self.raw) + self.reducing + self.buckets

    def _working(self, size: int) -> int:
        """Returns the optimizer's temporaries on this rank; `size` is their size for unsharded parameters."""
        if self.sharding.offload:
            return 0  # it steps in host memory
        whole = [weight.numel for unit in self.step.units for weight in unit.weights if weight.trained]
        here = [piece for part in self.parts for piece in part.sizes]
        amount = sum if self.step.at_once else max
        return -(-size * amount(here or [0]) // amount(whole)) if whole else size

    def _gradient(self, event: Event) -> None:
        weight = self.step.units[event.unit].weights[event.weight]
        if self.sharding.version == 0:
            self.shards += weight.numel * weight.width
        else:
            self.raw[event.unit] += self._size(weight)

    def _size(self, weight: Weight) -> int:
        """Returns the bytes of an unreduced gradient."""
        return weight.numel * (self.sharding.compute or weight.width)

    def _gather(self, unit: int) -> Iterator[int]:
        """All-gathers a unit and yields the bytes that it holds temporarily."""
        if unit in self.whole:
            return
        part = self.parts[unit]
        if self.sharding.version == 1:
            self.whole[unit] = part.whole
            yield self._gathering(part)
            return
        if unit not in self.sent:
            self.sent[unit] = part.whole
            yield self._gathering(part)
        self.whole[unit] = part.whole
        yield 0

    def _forward(self, unit: int) -> Iterator[int]:
        before = [other for other in self.sent if other != unit]
        part = self.parts[unit]
        if unit not in self.whole and before and self.sharding.version == 2:
            self.sent[unit] = part.whole
            yield self._gathering(part)
            for other in before:  # is freed once the next has arrived
                del self.sent[other]
        yield from self._gather(unit)

    def _done(self, unit: int) -> Iterator[int]:
        self.order.append(unit)
        keeps_root = self.sharding.version == 1 and unit == self.root
        if self.sharding.frees and not keeps_root:
            self.whole.pop(unit, None)
        if unit == self.root:
            self.sent.clear()
        yield 0

    def _backward(self, unit: int) -> Iterator[int]:
        yield from self._gather(unit)
        self.sent.pop(unit, None)
        place = self.order.index(unit) if unit in self.order else 0
        if not self.sharding.prefetch or place == 0:
            return
        following = self.order[place - 1]
        if following in self.whole:
            return
        part = self.parts[following]
        if self.sharding.version == 1:
            self.whole[following] = part.whole
        else:
            self.sent[following] = part.whole
        yield self._gathering(part)

    def _gathering(self, part: UnitShard) -> int:
        """Returns the temporary bytes of a unit's all-gather, without its output."""
        return part.sent + (part.whole if self.sharding.copies else 0)

    def _reduced(self, unit: int) -> Iterator[int]:
        part = self.parts[unit]
        self.whole.pop(unit, None)
        if part.reduced:
            yield from self._reduce(unit, part)
        if unit == self.root:
            self.reducing = 0

    def _reduce(self, unit: int, part: UnitShard) -> Iterator[int]:
        flat = part.reduced  # gradients are concatenated
        if self.sharding.version == 2:
            self.reducing, flat = flat, 0  # held until the next reduce-scatter; the previous one has completed
        yield flat
        # Version 2 releases all unreduced gradients but the last one, which a variable in torch still references.
        trained = [weight for weight in self.step.units[unit].weights if weight.trained]
        self.raw[unit] = self._size(trained[-1]) if self.sharding.version == 2 else 0
        output = part.reduced // self.sharding.ranks
        yield flat + output + (part.reduced if self.sharding.copies else 0)
        self.shards += part.gradients
        yield flat + (output if self.sharding.compute else 0)  # without a cast, the output is the shard itself
        self.raw[unit] = 0


_CHANGES = {
    EventKind.FORWARD: _StepSimulator._forward,
    EventKind.DONE: _StepSimulator._done,
    EventKind.BACKWARD: _StepSimulator._backward,
    EventKind.REDUCED: _StepSimulator._reduced,
}


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
