"""What the ranks hold at one step of a prepared loader, gathered: each sample once, in the order of the data.

The counterpart of `DataLoaderStateMixin`: everything here goes by the `Round` of the step. `gather_for_metrics` is what
`Accelerator` calls; `gather_rows` and `gather_items` are its two halves, for tensors and for objects.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..runtime import collectives as operations
from ..runtime import world
from ..runtime.pytree import holds_only_tensors, map_tensors, recursively_apply
from ..runtime.transport import Collectives, TorchCollectives
from ..runtime.world import DataRanks
from ..state import GradientState
from .base import DataLoaderAdapter, DataLoaderStateMixin
from .deal import Round

# Groups of the first ranks of others, made when first needed; they end with the group they are part of.
_groups: weakref.WeakKeyDictionary[Collectives, dict[int, Collectives]] = weakref.WeakKeyDictionary()


def holders(round: Round | None, collectives: Collectives) -> Collectives:
    """The collectives of the ranks that have a batch at this step. Only these ranks may call this.

    Args:
        round: The step's `Round`; None: all ranks have a batch.
        collectives: Those of all ranks that share out the data, in the order of their parts.
    """
    if round is None or round.holders == collectives.size:
        return collectives
    known = _groups.setdefault(collectives, {})
    if round.holders not in known:
        known[round.holders] = _first_ranks(collectives, round.holders)
    return known[round.holders]


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


def gather_rows(tensor: torch.Tensor, round: Round | None, collectives: Collectives) -> torch.Tensor:
    """The rows of all ranks' tensors that are data.

    Args:
        tensor: This rank's, a row for each of its samples (a scalar counts as one row); other dimensions agree.
        round: The step's `Round`: ``loader.round``.
        collectives: Those of the ranks that share out the data.

    Returns:
        Rows in rank order, which is the order of the data; on every rank that has a batch at this step.
    """
    if round is None:
        return collectives.all_gather(tensor)
    members = holders(round, collectives)
    if not round.ragged:
        gathered = members.all_gather(tensor)
        return gathered[: round.rows] if round.padded else gathered
    parts = _gather_ragged(tensor, members)
    if round.whole:
        return torch.cat(parts[: round.rows])
    gathered = torch.cat(parts)
    return gathered[: round.rows] if round.padded else gathered


def _gather_ragged(tensor: torch.Tensor, members: Collectives) -> list[torch.Tensor]:
    """Each rank's tensor, of as many rows as it has there."""
    tensor = tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()
    rows = members.all_gather(torch.tensor([tensor.shape[0]], device=members.device)).tolist()
    most = max(rows)
    padded = tensor.new_zeros((most, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = members.all_gather(padded)
    return [gathered[rank * most : rank * most + count] for rank, count in enumerate(rows)]


def gather_items(items: Sequence[Any], round: Round | None, collectives: Collectives) -> list[Any]:
    """The items of all ranks' lists that belong to data.

    Args:
        items: This rank's, one for each of its samples. They are pickled.
        round: The step's `Round`: ``loader.round``.
        collectives: Those of the ranks that share out the data.
    """
    parts = holders(round, collectives).all_gather_object(list(items))
    if round is not None and round.whole:
        parts = parts[: round.rows]
    gathered = [item for part in parts for item in part]
    return gathered[: round.rows] if round is not None and round.padded and not round.whole else gathered


def gather_for_metrics(
    input_data: Any,
    gradient_state: GradientState,
    *,
    use_gather_object: bool = False,
    data_ranks: Callable[[], DataRanks] | None = None,
) -> Any:
    """Brings together what the ranks made of the current batch of the loader that is being iterated over.

    Args:
        input_data: A tensor, or lists, tuples and mappings of tensors, with a row for each sample; or a list of any
            picklable objects, one for each sample.
        gradient_state: Knows the loader. Outside of any prepared loader's loop nothing is left out.
        use_gather_object: Gather tensors as objects.
        data_ranks: Tells who shares out the data outside of any prepared loader's loop; None: all ranks.

    Returns:
        The same structure with the rows (a list with the items) of all ranks, without those of repeated samples. With
        uneven batches the last step may have a batch on some ranks only; only these call this then, and the others'
        result lacks those samples. Rank 0 always has them all.
    """
    loader = gradient_state.active_dataloader
    comm = _collectives_of(loader, data_ranks)
    round = loader.round if isinstance(loader, DataLoaderStateMixin) else None
    if use_gather_object or not holds_only_tensors(input_data):
        return _gathered_objects(input_data, round, comm, _rest(loader))
    if round is None and comm is world.current().collectives:
        gathered = operations.gather(input_data)  # compares shapes in debug mode
    else:
        gathered = map_tensors("gather_for_metrics", _rows, input_data, round, comm)
    rest = _rest(loader)
    return gathered if rest is None else recursively_apply(lambda tensor: tensor[:rest], gathered)


def _rows(tensor: torch.Tensor, round: Round | None, comm: Collectives) -> torch.Tensor:
    if tensor.device == comm.device:
        return gather_rows(tensor, round, comm)
    return gather_rows(tensor.to(comm.device), round, comm).to(tensor.device)


def _gathered_objects(data: Any, round: Round | None, comm: Collectives, rest: int | None) -> Any:
    if comm.size == 1:
        gathered = data
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, Mapping)):
        gathered = gather_items(list(data), round, comm)
    else:
        raise TypeError(
            f"gather_for_metrics joins tensors, or lists of objects with an item for each sample; got a "
            f"{type(data).__name__}: {data!r:.80}. Put it into a list."
        )
    return gathered if rest is None else gathered[:rest]


def _rest(loader: Any) -> int | None:
    """What to trim by for a loader of another library that has registered with `GradientState`: it has no `round`."""
    if loader is None or isinstance(loader, DataLoaderStateMixin):
        return None
    ends = getattr(loader, "end_of_dataloader", False) and getattr(loader, "remainder", -1) > 0
    return int(loader.remainder) if ends else None


def _collectives_of(loader: Any, data_ranks: Callable[[], DataRanks] | None) -> Collectives:
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
    return everyone if ranks.group is None else _of_group(ranks.group, everyone)


_by_group: weakref.WeakKeyDictionary[Any, Collectives] = weakref.WeakKeyDictionary()
world.when_leaving(_by_group.clear)
world.when_leaving(_groups.clear)


def _of_group(group: Any, everyone: Collectives) -> Collectives:
    if group not in _by_group:
        _by_group[group] = TorchCollectives(everyone.device, group)
    return _by_group[group]
