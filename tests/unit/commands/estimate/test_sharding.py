"""What a rank holds, as arithmetic: shards cover everything, more ranks hold less, and nothing stays gathered."""

from __future__ import annotations

import random
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given, settings

from accelerate.commands.estimate.sharding import (
    Event,
    EventKind,
    FSDPUnit,
    Sharding,
    StepTrace,
    Weight,
    peak_candidates,
    rank_memory,
    shard_of,
)

weights = st.builds(
    Weight, st.lists(st.integers(1, 9), max_size=3).map(tuple), st.just(4), st.sampled_from([True, True, False])
)
units = st.builds(FSDPUnit, st.lists(weights, min_size=1, max_size=4).map(tuple))
shardings = st.builds(
    Sharding,
    ranks=st.integers(1, 6),
    version=st.sampled_from([1, 2]),
    frees=st.booleans(),
    compute=st.sampled_from([None, 2]),
    prefetch=st.booleans(),
    original=st.booleans(),
    copies=st.booleans(),
)


@st.composite
def steps(draw: st.DrawFn) -> StepTrace:
    """A model of some blocks, trained: forwards in order, backwards in reverse, gradients of the root where they come."""
    found = tuple(draw(st.lists(units, min_size=1, max_size=5)))
    root, sizes = len(found) - 1, random.Random(draw(st.integers(0, 2**16)))
    events: list[Event] = []

    def note(kind: EventKind, unit: int = -1, weight: int = -1) -> None:
        now = sizes.randrange(1000)
        events.append(Event(kind, unit, weight, now, now + sizes.randrange(1000)))

    def gradients(unit: int) -> None:
        for place, weight in enumerate(found[unit].weights):
            if weight.trained:
                note(EventKind.GRADIENT, unit, place)

    note(EventKind.START)
    note(EventKind.FORWARD, root)
    for unit in range(root):
        note(EventKind.FORWARD, unit)
        note(EventKind.DONE, unit)
    note(EventKind.DONE, root)
    note(EventKind.BACKWARD, root)
    for unit in reversed(range(root)):
        note(EventKind.BACKWARD, unit)
        note(EventKind.FORWARD, unit)  # recomputed
        gradients(unit)
        note(EventKind.REDUCED, unit)
    gradients(root)
    note(EventKind.REDUCED, root)
    note(EventKind.UPDATE)
    note(EventKind.END)
    return StepTrace(found, tuple(events), sizes.randrange(1000), draw(st.booleans()))


@settings(max_examples=40)
@given(units, shardings)
def test_shards_cover_everything(unit: FSDPUnit, sharding: Sharding) -> None:
    parts = [shard_of(unit, sharding, rank) for rank in range(sharding.ranks)]
    trained = sum(weight.numel for weight in unit.weights if weight.trained)
    whole = sum(weight.numel for weight in unit.weights) * 4
    if sharding.version == 2 or sharding.original:
        assert sum(sum(each.sizes) for each in parts) == trained
    assert sum(each.weights for each in parts) >= whole
    assert {each.weights for each in parts} == {parts[0].weights}  # what is missing is padding
    assert parts[0].weights * sharding.ranks * (sharding.compute or 4) == parts[0].whole * 4
    assert all(each.optimizer <= parts[0].optimizer for each in parts) or sharding.original


@settings(max_examples=40)
@given(steps(), shardings)
def test_more_ranks_hold_less(step: StepTrace, sharding: Sharding) -> None:
    fewer, more = (rank_memory(step, replace(sharding, ranks=ranks)) for ranks in (sharding.ranks, sharding.ranks + 1))
    assert (more.weights, more.gradients, more.activations) <= (fewer.weights, fewer.gradients, fewer.activations)
    assert more.weights <= fewer.weights and more.gradients <= fewer.gradients
    if sharding.version == 2:
        assert more.optimizer <= fewer.optimizer


@settings(max_examples=40)
@given(steps(), shardings)
def test_nothing_stays_gathered(step: StepTrace, sharding: Sharding) -> None:
    *before, last = peak_candidates(step, sharding)
    assert last.kind is EventKind.END and last.passing == last.shards == 0
    assert all(level.passing >= 0 for level in before)
    found = rank_memory(step, sharding)
    working = max(level.activations for level in (*before, last))  # of the optimizer too
    kept = found.weights + found.optimizer
    assert kept <= found.peak <= kept + found.gradients + working + found.gathered
    assert max(level.shards for level in before) == found.gradients


@settings(max_examples=40)
@given(steps(), shardings)
def test_what_saves_memory_saves_memory(step: StepTrace, sharding: Sharding) -> None:
    freeing, keeping = (rank_memory(step, replace(sharding, frees=frees)) for frees in (True, False))
    sent_again = freeing.weights - step.buffers  # a rank's own part, copied to be gathered a second time
    assert freeing.gathered <= keeping.gathered + sent_again and freeing.peak <= keeping.peak + sent_again
    here, away = (rank_memory(step, replace(sharding, offload=offload)) for offload in (False, True))
    assert away.host == here.weights - step.buffers + here.gradients + here.optimizer
    assert away.peak - away.gathered <= here.peak


@settings(max_examples=40)
@given(steps())
def test_one_process_holds_all(step: StepTrace) -> None:
    alone, buckets = (rank_memory(step, Sharding(version=0, buckets=wanted)) for wanted in (False, True))
    trained = [weight for unit in step.units for weight in unit.weights if weight.trained]
    assert alone.gradients == sum(4 * weight.numel for weight in trained)
    assert alone.optimizer == 2 * alone.gradients + 4 * len(trained)
    assert buckets.peak == alone.peak + alone.gradients and buckets.gathered == alone.gradients


def test_a_step_by_hand() -> None:
    """Two units of 100 elements on two ranks, FSDP 2: every buffer at its time."""
    one = FSDPUnit((Weight((100,)),))
    kinds = (EventKind.FORWARD, 1), (EventKind.FORWARD, 0), (EventKind.DONE, 0), (EventKind.DONE, 1)
    events = [Event(kind, unit) for kind, unit in kinds]
    events += [
        Event(EventKind.BACKWARD, 1),
        Event(EventKind.BACKWARD, 0),
        Event(EventKind.GRADIENT, 0, 0),
        Event(EventKind.REDUCED, 0),
    ]
    events += [
        Event(EventKind.GRADIENT, 1, 0),
        Event(EventKind.REDUCED, 1),
        Event(EventKind.UPDATE),
        Event(EventKind.END),
    ]
    step = StepTrace((one, one), tuple(events))
    seen: dict[EventKind, list[int]] = {}
    for level in peak_candidates(step, Sharding(ranks=2)):
        seen.setdefault(level.kind, []).append(level.passing // 400)
    # The root is gathered into a buffer, and copied out; the buffer stays until the next unit is there.
    assert seen[EventKind.FORWARD] == [1, 2, 2, 3, 2 + 1, 3, 3][: len(seen[EventKind.FORWARD])]
    assert max(seen[EventKind.FORWARD]) == 3 and seen[EventKind.DONE][-1] == 0
    assert max(seen[EventKind.BACKWARD]) == 3 and seen[EventKind.UPDATE] == [0]
    found = rank_memory(step, Sharding(ranks=2))
    assert (found.weights, found.gradients, found.optimizer) == (400, 400, 808)


def test_activations_are_the_most_that_is_held_but_by_the_optimizer() -> None:
    unit = FSDPUnit((Weight((10,)),))
    events = (
        Event(EventKind.FORWARD, 0, now=0, most=300),
        Event(EventKind.DONE, 0, now=100, most=100),
        Event(EventKind.BACKWARD, 0, now=100, most=500),
        Event(EventKind.GRADIENT, 0, 0, now=0, most=0),
        Event(EventKind.UPDATE, now=0, most=900),
        Event(EventKind.END),
    )
    found = rank_memory(StepTrace((unit,), events), Sharding(version=0))
    kept = 40 + 84  # the weights, and Adam's events with their count
    assert (found.activations, found.peak) == (500, kept + 40 + 900)
    backward = rank_memory(StepTrace((unit,), (*events[:4], Event(EventKind.END))), Sharding(version=0))
    assert (backward.activations, backward.peak) == (500, kept + 500)
