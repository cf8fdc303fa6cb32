"""`gather_for_metrics`: gathers per-sample results of one step from all ranks, each sample once, in the order of the data.

The counterpart of `DataLoaderStateMixin`: the `StepSizes` of the step determine which rows are kept. `gather_rows` and
`gather_items` gather tensors and objects.
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
from .base import DataLoaderAdapter
from .batches.batch_sharding import StepSizes
from .batches.batch_slicing import like_mapping
from .loop_state import DataLoaderStateMixin

# Subgroups of the first ranks of a group, created on demand; they live as long as the group.
_groups: weakref.WeakKeyDictionary[Collectives, dict[int, Collectives]] = weakref.WeakKeyDictionary()


def active_collectives(step_sizes: StepSizes | None, collectives: Collectives) -> Collectives:
    """Returns collectives over the ranks that have a batch at this step. Only these ranks may call this.

    Args:
        step_sizes: The `StepSizes` of the step; None: all ranks have a batch.
        collectives: Collectives over all ranks with a shard of the data, in the order of the shards.
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
            "only some ranks have a batch at this step (even_batches=False), and this device does not support gathering "
            "from some ranks. Use even_batches=True."
        )
    everyone = dist.get_process_group_ranks(dist.group.WORLD if collectives.group is None else collectives.group)
    # The other ranks have left their loops: only the members create the group.
    group = dist.new_group(everyone[:count], use_local_synchronization=True)
    return TorchCollectives(collectives.device, group)


def gather_rows(tensor: torch.Tensor, step_sizes: StepSizes | None, collectives: Collectives) -> torch.Tensor:
    """Gathers the rows of all ranks' tensors, without padding.

    Args:
        tensor: This rank's tensor, with a row per sample (a scalar counts as one row); other dimensions agree.
        step_sizes: The `StepSizes` of the step: ``loader.step_sizes``.
        collectives: Collectives over the ranks with a shard of the data.

    Returns:
        Rows in rank order, which is the order of the data; on every rank that has a batch at this step.
    """
    if step_sizes is None:
        return collectives.all_gather(tensor)
    members = active_collectives(step_sizes, collectives)
    if step_sizes.ragged:
        parts = _gather_ragged(tensor, members)
    else:
        parts = list(members.all_gather(tensor).tensor_split(members.size))
    return torch.cat(step_sizes.drop_padding(parts))


def _gather_ragged(tensor: torch.Tensor, members: Collectives) -> list[torch.Tensor]:
    """All-gathers tensors whose numbers of rows differ: pads them to the longest, and trims the results."""
    tensor = tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()
    rows = members.all_gather(torch.tensor([tensor.shape[0]], device=members.device)).tolist()
    most = max(rows)
    padded = tensor.new_zeros((most, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = members.all_gather(padded)
    return [gathered[rank * most : rank * most + count] for rank, count in enumerate(rows)]


def gather_items(items: Sequence[Any], step_sizes: StepSizes | None, collectives: Collectives) -> list[Any]:
    """Gathers the items of all ranks' lists, without padding.

    Args:
        items: This rank's items, one per sample. They are pickled.
        step_sizes: The `StepSizes` of the step: ``loader.step_sizes``.
        collectives: Collectives over the ranks with a shard of the data.
    """
    parts = active_collectives(step_sizes, collectives).all_gather_object(list(items))
    if step_sizes is not None:
        parts = step_sizes.drop_padding(parts)
    return [item for part in parts for item in part]


def gather_for_metrics(
    input_data: Any,
    gradient_state: GradientState,
    *,
    use_gather_object: bool = False,
    data_ranks: Callable[[], DataShard] | None = None,
) -> Any:
    """Gathers per-sample results for the current batch from all ranks, and drops those of repeated samples.

    A tensor or list with as many rows as a full batch of this rank is trimmed to the rows of the current batch if that
    is smaller, so that ``loss.repeat(batch_size)`` weights the last batch by its samples.

    Args:
        input_data: A tensor, or lists, tuples and mappings of tensors, with a row per sample; or a list of any picklable
            objects, one per sample. A tuple or mapping of such lists (and tensors) is gathered member by member; so is a
            list that does not have one item per sample, but members that do.
        gradient_state: Holds the active loader. Outside of a prepared loader's loop nothing is dropped.
        use_gather_object: Gather tensors as objects.
        data_ranks: Returns this rank's shard outside of a prepared loader's loop; None: all ranks have a shard.

    Returns:
        The same structure with the rows (or items) of all ranks. With uneven batches only some ranks may have a batch at
        the last step; only these call this, and the result on the other ranks lacks those samples. Rank 0 always has all.

    Raises:
        TypeError: On several ranks, for an object without rows or items: a number, a string, a mapping of such.
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
    """Trims a tensor or list to `short` rows if it has `full` rows."""
    cuts = short is not None and _is_column(column) and len(column) == full
    return column[:short] if cuts else column


class _RankObjects(NamedTuple):
    """The objects of one rank, with `short_rows` and `full_rows` of its batch."""

    data: Any
    short: int | None
    full: int | None

    def member(self, key: Any) -> _RankObjects:
        return self._replace(data=self.data[key])

    def counts_samples(self, column: Any) -> bool:
        return self.full is not None and len(column) in (self.full if self.short is None else self.short, self.full)


@dataclass(frozen=True)
class _ObjectGather:
    """Joins the objects of all ranks: member by member if the members hold the samples, else item by item."""

    step_sizes: StepSizes | None
    rest: int | None
    concatenate: bool
    """Concatenate tensors, instead of making a list of their rows."""

    def join(self, parts: list[_RankObjects], own: Any) -> Any:
        """Joins the objects of all ranks; `own` are those of this rank, whose containers are kept."""
        if isinstance(own, Mapping):
            return like_mapping(own, {key: self.join([part.member(key) for part in parts], own[key]) for key in own})
        if all(map(_has_members, parts)):
            members = (self.join([part.member(i) for part in parts], member) for i, member in enumerate(own))
            return honor_type(own, members)
        return self._joined_items(parts, own) if _is_column(own) else own

    def _joined_items(self, parts: list[_RankObjects], own: Any) -> Any:
        columns = [_trim_column(*part) for part in parts]
        if self.step_sizes is not None:
            columns = self.step_sizes.drop_padding(columns)
        if len(parts) == 1:
            (joined,) = columns
        elif self.concatenate and isinstance(own, torch.Tensor):
            joined = torch.cat([column.to(own.device) for column in columns])
        else:
            joined = [item for column in columns for item in column]
        return joined if self.rest is None else joined[: self.rest]


def _gathered_objects(own: _RankObjects, comm: Collectives, how: _ObjectGather) -> Any:
    data = own.data
    if comm.size == 1:
        return data if own.short is None and how.rest is None else how.join([own], data)
    shared = isinstance(data, Iterable) and not isinstance(data, (str, bytes))
    if not shared or (isinstance(data, Mapping) and not (data and all(map(_is_member, data.values())))):
        raise TypeError(
            f"gather_for_metrics joins tensors, or lists of objects, one per sample; got a {type(data).__name__}: "
            f"{data!r:.80}. Put it into a list."
        )
    if not isinstance(data, Mapping) and not _is_column(data):
        data = list(data)
    return how.join(active_collectives(how.step_sizes, comm).all_gather_object(own._replace(data=data)), data)


def _is_column(data: Any) -> bool:
    return isinstance(data, (list, tuple)) or (isinstance(data, (torch.Tensor, np.ndarray)) and data.ndim > 0)


def _is_member(data: Any) -> bool:
    return _is_column(data) or isinstance(data, Mapping)


def _has_members(part: _RankObjects) -> bool:
    """Returns whether each member of a list or tuple holds one object per sample, rather than being such an object."""
    data = part.data
    if not isinstance(data, (list, tuple)) or not data or not all(map(_is_member, data)):
        return False
    if all(isinstance(member, Mapping) for member in data):
        return False
    tensors = [isinstance(member, torch.Tensor) for member in data]
    if isinstance(data, list) and all(tensors):
        return False  # one tensor per sample
    complete = all(isinstance(member, Mapping) or part.counts_samples(member) for member in data)
    if not part.counts_samples(data):
        return isinstance(data, tuple) or any(tensors) or complete
    # As many members as samples: (predictions, references) of a batch of two, or two samples that are lists?
    if isinstance(data, tuple):
        return complete and not all(isinstance(member, tuple) for member in data)
    return complete and any(tensors)


def _foreign_remainder(loader: Any) -> int | None:
    """Returns the rows to keep for a loader of another library, which has a `remainder` but no `step_sizes`."""
    if loader is None or isinstance(loader, DataLoaderStateMixin):
        return None
    ends = getattr(loader, "end_of_dataloader", False) and getattr(loader, "remainder", -1) > 0
    return int(loader.remainder) if ends else None


def _collectives_of(loader: Any, data_ranks: Callable[[], DataShard] | None) -> Collectives:
    """Returns collectives over the ranks that have a shard of a loader's data."""
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
