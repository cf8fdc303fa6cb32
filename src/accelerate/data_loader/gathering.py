"""What the ranks hold at one step of a prepared loader, gathered: each sample once, in the order of the data.

The counterpart of `DataLoaderStateMixin`: everything here goes by the `StepSizes` of the step. `gather_for_metrics` is what
`Accelerator` calls; `gather_rows` and `gather_items` are its two halves, for tensors and for objects.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ..runtime import collectives as operations
from ..runtime import world
from ..runtime.collective_backend import Collectives, TorchCollectives
from ..runtime.tensors.pytree import contains_only_tensors, honor_type, map_tensors, recursively_apply
from ..runtime.world import DataShard
from ..state import GradientState
from .base import DataLoaderAdapter, DataLoaderStateMixin
from .batches.batch_sharding import StepSizes
from .batches.batch_slicing import like_mapping

# Groups of the first ranks of others, made when first needed; they end with the group they are part of.
_groups: weakref.WeakKeyDictionary[Collectives, dict[int, Collectives]] = weakref.WeakKeyDictionary()


def active_ranks(step_sizes: StepSizes | None, collectives: Collectives) -> Collectives:
    """The collectives of the ranks that have a batch at this step. Only these ranks may call this.

    Args:
        round: The step's `StepSizes`; None: all ranks have a batch.
        collectives: Those of all ranks that share out the data, in the order of their parts.
    """
    if step_sizes is None or step_sizes.active_ranks == collectives.size:
        return collectives
    known = _groups.setdefault(collectives, {})
    if step_sizes.active_ranks not in known:
        known[step_sizes.active_ranks] = _first_ranks(collectives, step_sizes.active_ranks)
    return known[step_sizes.active_ranks]


def _first_ranks(collectives: Collectives, count: int) -> Collectives:
    if count == 1:
        return Collectives(collectives.device)
    if not isinstance(collectives, TorchCollectives):
        raise NotImplementedError(
            "this step has a batch on some ranks only (even_batches=False), and on this device results cannot be gathered "
            "from some ranks. Use even_batches=True."
        )
    everyone = dist.get_process_group_ranks(dist.group.WORLD if collectives.group is None else collectives.group)
    # The other ranks have left their loops: only the members take part in making the group.
    group = dist.new_group(everyone[:count], use_local_synchronization=True)
    return TorchCollectives(collectives.device, group)


def gather_rows(tensor: torch.Tensor, step_sizes: StepSizes | None, collectives: Collectives) -> torch.Tensor:
    """The rows of all ranks' tensors that are data.

    Args:
        tensor: This rank's, a row for each of its samples (a scalar counts as one row); other dimensions agree.
        round: The step's `StepSizes`: ``loader.step_sizes``.
        collectives: Those of the ranks that share out the data.

    Returns:
        Rows in rank order, which is the order of the data; on every rank that has a batch at this step.
    """
    if step_sizes is None:
        return collectives.all_gather(tensor)
    members = active_ranks(step_sizes, collectives)
    if not step_sizes.ragged:
        gathered = members.all_gather(tensor)
        if step_sizes.valid_rows is not None:
            held = len(gathered) // members.size
            return torch.cat(
                [part[:rows] for part, rows in zip(gathered.split(max(1, held)), step_sizes.valid_rows, strict=False)]
            )
        return gathered[: step_sizes.rows] if step_sizes.padded else gathered
    parts = _gather_ragged(tensor, members)
    if step_sizes.counts_batches:
        return torch.cat(parts[: step_sizes.rows])
    gathered = torch.cat(parts)
    return gathered[: step_sizes.rows] if step_sizes.padded else gathered


def _gather_ragged(tensor: torch.Tensor, members: Collectives) -> list[torch.Tensor]:
    """Each rank's tensor, of as many rows as it has there."""
    tensor = tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()
    rows = members.all_gather(torch.tensor([tensor.shape[0]], device=members.device)).tolist()
    most = max(rows)
    padded = tensor.new_zeros((most, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = members.all_gather(padded)
    return [gathered[rank * most : rank * most + count] for rank, count in enumerate(rows)]


def gather_items(items: Sequence[Any], step_sizes: StepSizes | None, collectives: Collectives) -> list[Any]:
    """The items of all ranks' lists that belong to data.

    Args:
        items: This rank's, one for each of its samples. They are pickled.
        round: The step's `StepSizes`: ``loader.step_sizes``.
        collectives: Those of the ranks that share out the data.
    """
    parts = active_ranks(step_sizes, collectives).all_gather_object(list(items))
    if step_sizes is not None and step_sizes.counts_batches:
        parts = parts[: step_sizes.rows]
    elif step_sizes is not None and step_sizes.valid_rows is not None:
        parts = [part[:rows] for part, rows in zip(parts, step_sizes.valid_rows, strict=True)]
    gathered = [item for part in parts for item in part]
    return (
        gathered[: step_sizes.rows]
        if step_sizes is not None and step_sizes.padded and not step_sizes.counts_batches
        else gathered
    )


def gather_for_metrics(
    input_data: Any,
    gradient_state: GradientState,
    *,
    use_gather_object: bool = False,
    data_ranks: Callable[[], DataShard] | None = None,
) -> Any:
    """Brings together what the ranks made of the current batch of the loader that is being iterated over.

    A tensor (or list) with as many rows as a full batch of this rank has is cut to the rows of its batch where these are
    fewer: ``loss.repeat(batch_size)`` weighs the last batch by its samples.

    Args:
        input_data: A tensor, or lists, tuples and mappings of tensors, with a row for each sample; or a list of any
            picklable objects, one for each sample. A tuple or mapping of such lists (and tensors) is gathered member by
            member; so is a list that does not have an item for each sample, but members that do.
        gradient_state: Knows the loader. Outside of any prepared loader's loop nothing is left out.
        use_gather_object: Gather tensors as objects.
        data_ranks: Tells who shares out the data outside of any prepared loader's loop; None: all ranks.

    Returns:
        The same structure with the rows (a list with the items) of all ranks, without those of repeated samples. With
        uneven batches the last step may have a batch on some ranks only; only these call this then, and the others'
        result lacks those samples. Rank 0 always has them all.

    Raises:
        TypeError: on several ranks, for what has neither rows nor items: a number, a string, a mapping of such.
    """
    loader = gradient_state.active_dataloader
    comm = _collectives_of(loader, data_ranks)
    ours = loader if isinstance(loader, DataLoaderStateMixin) else None
    step_sizes = None if ours is None else ours.step_sizes
    short, full = (None, None) if ours is None else (ours.short_rows, ours.full_rows)
    rest = _foreign_remainder(loader)
    if use_gather_object or not contains_only_tensors(input_data):
        gather = _ObjectGather(step_sizes, rest, concatenate=not use_gather_object)
        return _gathered_objects(_RankObjects(input_data, short, full), comm, gather)
    if short is not None:
        input_data = recursively_apply(_trim_column, input_data, short, full)
    if step_sizes is None and comm is world.current().collectives:
        gathered = operations.gather(input_data)  # compares shapes in debug mode
    else:
        gathered = map_tensors("gather_for_metrics", _gather_tensor, input_data, step_sizes, comm)
    return gathered if rest is None else recursively_apply(lambda tensor: tensor[:rest], gathered)


def _gather_tensor(tensor: torch.Tensor, step_sizes: StepSizes | None, comm: Collectives) -> torch.Tensor:
    if tensor.device == comm.device:
        return gather_rows(tensor, step_sizes, comm)
    return gather_rows(tensor.to(comm.device), step_sizes, comm).to(tensor.device)


def _trim_column(column: Any, short: int | None, full: int | None) -> Any:
    """A tensor or list; with the rows of a short batch, if it has as many as a full one."""
    cuts = short is not None and _is_column(column) and len(column) == full
    return column[:short] if cuts else column


class _RankObjects(NamedTuple):
    """One rank's objects, with its batch's `short_rows` and `full_rows`."""

    data: Any
    short: int | None
    full: int | None

    def member(self, key: Any) -> _RankObjects:
        return self._replace(data=self.data[key])

    def counts_samples(self, column: Any) -> bool:
        return self.full is not None and len(column) in (self.full if self.short is None else self.short, self.full)


@dataclass(frozen=True)
class _ObjectGather:
    """Joins the ranks' objects: member by member where members hold the samples, else item by item."""

    step_sizes: StepSizes | None
    rest: int | None
    concatenate: bool
    """Make tensors one tensor, and not a list of rows."""

    def join(self, parts: list[_RankObjects], own: Any) -> Any:
        """All ranks' objects; `own` is this rank's."""
        if isinstance(own, Mapping):
            return like_mapping(own, {key: self.join([part.member(key) for part in parts], own[key]) for key in own})
        if all(map(_has_members, parts)):
            members = (self.join([part.member(i) for part in parts], member) for i, member in enumerate(own))
            return honor_type(own, members)
        return self._joined_items(parts, own) if _is_column(own) else own

    def _joined_items(self, parts: list[_RankObjects], own: Any) -> Any:
        columns = [_trim_column(*part) for part in parts]
        end = self.rest
        if self.step_sizes is not None and self.step_sizes.counts_batches:
            columns = columns[: self.step_sizes.rows]
        elif self.step_sizes is not None and self.step_sizes.valid_rows is not None:
            columns = [column[:rows] for column, rows in zip(columns, self.step_sizes.valid_rows, strict=True)]
        elif self.step_sizes is not None and self.step_sizes.padded:
            end = self.step_sizes.rows
        if len(parts) == 1:
            return columns[0] if end is None else columns[0][:end]
        if self.concatenate and isinstance(own, torch.Tensor):
            return torch.cat([column.to(own.device) for column in columns])[:end]
        return [item for column in columns for item in column][:end]


def _gathered_objects(own: _RankObjects, comm: Collectives, how: _ObjectGather) -> Any:
    data = own.data
    if comm.size == 1:
        return data if own.short is None and how.rest is None else how.join([own], data)
    shared = isinstance(data, Iterable) and not isinstance(data, (str, bytes))
    if not shared or (isinstance(data, Mapping) and not (data and all(map(_is_member, data.values())))):
        raise TypeError(
            f"gather_for_metrics joins tensors, or lists of objects with an item for each sample; got a "
            f"{type(data).__name__}: {data!r:.80}. Put it into a list."
        )
    if not isinstance(data, Mapping) and not _is_column(data):
        data = list(data)
    return how.join(active_ranks(how.step_sizes, comm).all_gather_object(own._replace(data=data)), data)


def _is_column(data: Any) -> bool:
    return isinstance(data, (list, tuple)) or (isinstance(data, (torch.Tensor, np.ndarray)) and data.ndim > 0)


def _is_member(data: Any) -> bool:
    return _is_column(data) or isinstance(data, Mapping)


def _has_members(part: _RankObjects) -> bool:
    """Whether the members of a list or tuple, and not its items, hold something for each sample."""
    data = part.data
    if not isinstance(data, (list, tuple)) or not data or not all(map(_is_member, data)):
        return False
    if all(isinstance(member, Mapping) for member in data):
        return False
    tensors = [isinstance(member, torch.Tensor) for member in data]
    if isinstance(data, list) and all(tensors):
        return False  # objects that happen to be tensors
    complete = all(isinstance(member, Mapping) or part.counts_samples(member) for member in data)
    if not part.counts_samples(data):
        return isinstance(data, tuple) or any(tensors) or complete
    # As many as there are samples: (predictions, references) of a batch of two, or two samples that are lists?
    if isinstance(data, tuple):
        return complete and not all(isinstance(member, tuple) for member in data)
    return complete and any(tensors)


def _foreign_remainder(loader: Any) -> int | None:
    """What to trim by for a loader of another library that has registered with `GradientState`: it has no `step_sizes`."""
    if loader is None or isinstance(loader, DataLoaderStateMixin):
        return None
    ends = getattr(loader, "end_of_dataloader", False) and getattr(loader, "remainder", -1) > 0
    return int(loader.remainder) if ends else None


def _collectives_of(loader: Any, data_ranks: Callable[[], DataShard] | None) -> Collectives:
    """Those of the ranks that share out a loader's data."""
    everyone = world.current().collectives
    plan = loader._plan if isinstance(loader, DataLoaderAdapter) else None
    if plan is not None:
        ranks = plan.ranks
    elif data_ranks is None or everyone.size == 1:
        return everyone
    else:
        ranks = data_ranks()
    if ranks.count == 1:
        return Collectives(everyone.device)
    return everyone if ranks.group is None else _group_collectives(ranks.group, everyone)


_by_group: weakref.WeakKeyDictionary[Any, Collectives] = weakref.WeakKeyDictionary()
world.on_leave(_by_group.clear)
world.on_leave(_groups.clear)


def _group_collectives(group: Any, everyone: Collectives) -> Collectives:
    if group not in _by_group:
        _by_group[group] = TorchCollectives(everyone.device, group)
    return _by_group[group]
