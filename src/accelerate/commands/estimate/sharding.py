"""What one rank holds when a model is trained on several: arithmetic over a step that was followed on one.

A step is a list of moments (a unit is entered, a gradient comes, ...) with the activations held then. The way parameters
are shared says what else is there at each: shards, gathered units, whole gradients on their way to be reduced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

_ALIGNMENT = 16  # bytes; FSDP 1 begins each original parameter of a unit there
_STEP_COUNT = 4  # bytes; AdamW counts the steps of each parameter


class EventKind(Enum):
    """What happens at a moment of a training step."""

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
        width: Bytes of an element as it is kept.
        trained: Whether it gets a gradient.
    """

    shape: tuple[int, ...]
    width: int = 4
    trained: bool = True

    @property
    def numel(self) -> int:
        """Elements of all of it."""
        return _product(self.shape)

    def rows(self, rank: int, ranks: int) -> int:
        """How many elements a rank holds of the first dimension cut into equal pieces, the last ones smaller."""
        most = self.padded(ranks)
        return max(0, min(most, self.numel - rank * most))

    def padded(self, ranks: int) -> int:
        """Elements of the largest such piece."""
        if not self.shape or not self.numel:
            return self.numel
        return -(-self.shape[0] // ranks) * _product(self.shape[1:])


@dataclass(frozen=True)
class FSDPUnit:
    """Parameters that are gathered and freed together."""

    weights: tuple[Weight, ...]

    @property
    def width(self) -> int:
        """Bytes of an element, as kept."""
        return max((weight.width for weight in self.weights), default=4)

    @property
    def trained(self) -> bool:
        """Whether any of it gets a gradient."""
        return any(weight.trained for weight in self.weights)


@dataclass(frozen=True)
class Event:
    """Something that happens in a step.

    Attributes:
        kind: What.
        unit: To which unit; -1 for none.
        weight: To which of its parameters, for a gradient.
        now: Bytes of activations at that moment.
        most: The most of them until the next.
    """

    kind: EventKind
    unit: int = -1
    weight: int = -1
    now: int = 0
    most: int = 0


@dataclass(frozen=True)
class StepTrace:
    """A training step of a whole model.

    Attributes:
        units: Inner ones first, the model itself (with all parameters that are in no other) last.
        moments: In order.
        buffers: Bytes of what is no parameter and stays.
        at_once: The optimizer works on all parameters together, not on one after the other.
    """

    units: tuple[FSDPUnit, ...]
    moments: tuple[Event, ...]
    buffers: int = 0
    at_once: bool = False


@dataclass(frozen=True)
class Sharding:
    """How ranks share a model.

    Attributes:
        ranks: How many hold one copy together.
        version: 2: every parameter is cut; 1: units are flattened and cut; 0: nothing is cut, as with DDP.
        frees: Gathered parameters are freed between a unit's forward and backward.
        compute: Bytes of an element in a forward, where that is another format than the kept one.
        offload: Shards, their gradients and the optimizer's state are in the machine's memory.
        prefetch: The backward gathers the next unit before it computes this one.
        original: FSDP 1 keeps the original parameters visible (use_orig_params).
        buckets: Gradients are copied into buckets to be reduced (DDP on several ranks).
        copies: Whoever carries shards does so in buffers of its own, as gloo does on the CPU, for as long as it takes.
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
    """Bytes that a rank holds; of uneven shards, the largest.

    Attributes:
        weights: Its shard of the parameters, and the buffers of the model.
        gradients: Its shard of the gradients.
        optimizer: Adam's two moments of the shard, and its step counts.
        activations: The most that is held of what the backward needs of the forward, and results in between.
        gathered: The most that is held of gathered parameters, and of gradients before and while they are reduced.
        peak: The most that is on the device at one time; less than the sum, as these come and go.
        host: Of `weights`, `gradients` and `optimizer`, what is in the machine's memory instead of the device's.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    peak: int
    host: int = 0


def rank_memory(step: StepTrace, sharding: Sharding, rank: int = 0) -> RankMemory:
    """What `rank` holds in a step that its peers take together with it."""
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
        if level.kind is not EventKind.UPDATE:  # what the optimizer works on is none
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
    """Bytes of a unit: those a rank keeps, and those that travel.

    Attributes:
        weights: Of the shard.
        gradients: Of its gradients.
        optimizer: Of Adam's state for it.
        whole: Of the gathered unit, padding included.
        sent: Of the shard in the format it is sent in, where that is a copy; else 0.
        reduced: Of what is given to a reduction, padding included.
        sizes: Elements of each piece that the optimizer steps on.
    """

    weights: int
    gradients: int
    optimizer: int
    whole: int
    sent: int
    reduced: int
    sizes: tuple[int, ...]


def shard_of(unit: FSDPUnit, sharding: Sharding, rank: int) -> UnitShard:
    """What a rank keeps of a unit."""
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
    """The parameters behind each other, cut into equal pieces."""
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
    """How much is there at some point of a step, beside weights and the optimizer's state.

    Attributes:
        kind: What happened last.
        passing: Bytes of gathered parameters, and of gradients before and while they are reduced.
        activations: Bytes of activations.
        shards: Bytes of reduced gradients.
    """

    kind: EventKind
    passing: int
    activations: int
    shards: int


def peak_candidates(step: StepTrace, sharding: Sharding, rank: int = 0) -> Iterator[PeakCandidate]:
    """Every level of a step that may be the highest, in order."""
    return _StepSimulator(step, sharding, [shard_of(unit, sharding, rank) for unit in step.units]).levels()


class _StepSimulator:
    """Goes through a step, and knows what is gathered, on its way and reduced."""

    def __init__(self, step: StepTrace, sharding: Sharding, parts: Sequence[UnitShard]) -> None:
        self.step, self.sharding, self.parts = step, sharding, parts
        self.root = len(step.units) - 1
        self.whole: dict[int, int] = {}  # unit -> bytes gathered
        self.sent: dict[int, int] = {}  # unit -> buffer of a gather that has arrived or is on its way
        self.raw = [0] * len(parts)  # whole gradients of each unit
        self.reducing = 0  # the buffer of the latest reduction
        self.shards = 0  # shards of gradients
        self.order: list[int] = []  # of forwards
        self.buckets = sum(part.gradients for part in parts) if sharding.buckets else 0

    def levels(self) -> Iterator[PeakCandidate]:
        """See `levels`."""
        cut = self.sharding.version > 0
        backward = False
        for moment in self.step.moments:
            backward = backward or moment.kind is EventKind.BACKWARD
            if moment.kind is EventKind.GRADIENT:
                self._gradient(moment)
            elif moment.kind is EventKind.END:
                self.shards = 0
            elif (
                cut
                and moment.kind in _CHANGES
                and not (backward and moment.kind in (EventKind.FORWARD, EventKind.DONE))
            ):
                for passing in _CHANGES[moment.kind](self, moment.unit):
                    yield PeakCandidate(moment.kind, self._extra() + passing, moment.now, self.shards)
            held = moment.most
            if moment.kind is EventKind.UPDATE:
                held = moment.now + self._working(moment.most - moment.now)
            yield PeakCandidate(moment.kind, self._extra(), held, self.shards)

    def _extra(self) -> int:
        return sum(self.whole.values()) + sum(self.sent.values()) + sum(self.raw) + self.reducing + self.buckets

    def _working(self, size: int) -> int:
        """What the optimizer works on, of `size` where it steps on whole parameters."""
        if self.sharding.offload:
            return 0  # it steps in the machine's memory
        whole = [weight.numel for unit in self.step.units for weight in unit.weights if weight.trained]
        here = [piece for part in self.parts for piece in part.sizes]
        amount = sum if self.step.at_once else max
        return -(-size * amount(here or [0]) // amount(whole)) if whole else size

    def _gradient(self, moment: Event) -> None:
        weight = self.step.units[moment.unit].weights[moment.weight]
        if self.sharding.version == 0:
            self.shards += weight.numel * weight.width
        else:
            self.raw[moment.unit] += self._size(weight)

    def _size(self, weight: Weight) -> int:
        """Bytes of a whole gradient, as the backward makes it."""
        return weight.numel * (self.sharding.compute or weight.width)

    def _gather(self, unit: int) -> Iterator[int]:
        """Gathers a unit; gives what is there in passing besides."""
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
        """What is there while a unit is gathered, beside the whole of it."""
        return part.sent + (part.whole if self.sharding.copies else 0)

    def _reduced(self, unit: int) -> Iterator[int]:
        part = self.parts[unit]
        self.whole.pop(unit, None)
        if part.reduced:
            yield from self._reduce(unit, part)
        if unit == self.root:
            self.reducing = 0

    def _reduce(self, unit: int, part: UnitShard) -> Iterator[int]:
        flat = part.reduced  # gradients are put behind each other
        if self.sharding.version == 2:
            self.reducing, flat = flat, 0  # and stay until the next reduction; the one before is over
        yield flat
        # Version 2 lets go of all gradients but the last one, which a variable of torch's still names.
        trained = [weight for weight in self.step.units[unit].weights if weight.trained]
        self.raw[unit] = self._size(trained[-1]) if self.sharding.version == 2 else 0
        output = part.reduced // self.sharding.ranks
        yield flat + output + (part.reduced if self.sharding.copies else 0)
        self.shards += part.gradients
        yield flat + (output if self.sharding.compute else 0)  # in the format it is kept in, it is the shard
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
