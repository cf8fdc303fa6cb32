"""A block in which ranks of one group share each sequence, by context or by sequence parallelism.

Tensors are cut along it, and ``torch.nn.functional.scaled_dot_product_attention`` is replaced by one in which tokens see
those of the other ranks. A model whose attention goes another way would silently see its own part only: it is refused.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from ....runtime.collective_backend import TorchCollectives
from ....runtime.tensors.forward import unwrap_module
from ....state import GradientState
from .backends import ATTENTION, Way, original, way_of
from .ring_attention import Layout
from .sdpa_capture import holder_of
from .unshard_outputs import Cut, put_together

if TYPE_CHECKING:
    from ....parallelism_config import ParallelismConfig

# What a model that is refused may be told to use instead.
_ADVICE = (
    "call `torch.nn.functional.scaled_dot_product_attention` through its module (with transformers: "
    "attn_implementation='sdpa')."
)


def shared_sequences(mesh: DeviceMesh | None, sizes: ParallelismConfig | None) -> SharedSequences | None:
    """What a run shares sequences with; None where ranks have whole ones."""
    way = None if mesh is None or sizes is None else way_of(mesh, sizes)
    return None if way is None else SharedSequences(way)


class SharedSequences:
    """What a run with context or sequence parallelism shares sequences with.

    Args:
        way: How tokens come to see those of other ranks.
    """

    def __init__(self, way: Way) -> None:
        self.way = way
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._unchecked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._forwards = self._calls = 0
        self._open = False
        self._cut: Cut | None = None  # by the latest block, which was in the loop over this loader
        self._loader: Callable[[], Any] = _no_loader
        self._attend: Callable[..., Tensor] = original
        self._attention = _function_of(self._counted)
        self._latest: tuple[weakref.ref[Tensor], int, int, dict[str, Any]] | None = None

    # Models hold on to this by their hooks: a copy is watched as well, and one that was pickled shares nothing.

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedSequences:
        return self

    def __reduce__(self) -> Any:
        return SharedSequences, (None,)

    def check(self, model: nn.Module) -> None:
        """Refuses a model of which can be seen that its sequences cannot be shared.

        Raises:
            ValueError: saying why.
        """
        self.way.check_model(unwrap_module(model))

    def watch(self, model: nn.Module) -> None:
        """Has the model's forwards counted, and looked at for what a part of a sequence would be misunderstood by."""
        if model not in self._models:
            self._models.add(model)
            self._unchecked.add(model)
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            for name, module in model.named_modules():
                if name.rpartition(".")[2] == "self_attn":  # as transformers calls them
                    module.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def _check_models(self) -> None:
        for model in self._unchecked:
            holder = holder_of(original, model)
            if holder is not None:
                raise ValueError(
                    f"{holder} holds the function {ATTENTION} itself, so that its attention cannot be shared over ranks: "
                    f"{_ADVICE}"
                )
        self._unchecked.clear()

    def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._forwards += 1
        bare = unwrap_module(model)
        if not self._open or not hasattr(bare, "config"):  # as transformers' models are called
            return
        taken = inspect.signature(bare.forward)
        given = {**taken.bind_partial(*args, **kwargs).arguments, **kwargs}
        inside: Any = getattr(bare, "get_base_model", None)
        base = bare if inside is None else inside()  # peft's models hand on what they are given
        if "position_ids" in inspect.signature(base.forward).parameters and given.get("position_ids") is None:
            raise ValueError(
                f"{type(bare).__name__} was given no position_ids and would count those of each rank's part from 0: pass "
                "positions of the whole sequence, cut like the tokens (maybe_context_parallel's buffers)."
            )
        mask, cut = given.get("attention_mask"), self._cut
        if cut is None or not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != cut.length:
            return
        if not bool(mask.all()):
            raise ValueError(
                f"{type(bare).__name__} was given an attention_mask of all {cut.length} tokens and would take its "
                "beginning for that of each rank's part: leave it out, or cut it like the tokens (maybe_context_parallel's "
                "buffers)."
            )

    def _before_attention(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if not self._open or not isinstance(hidden, Tensor):
            return None
        # Each rank may have made another mask of its positions, or none, and what is sent along depends on it.
        mask = kwargs.get("attention_mask")
        instead = self._instead_of(mask, hidden.shape[-2]) if isinstance(mask, Tensor) else {}
        if "attn_mask" in instead:
            return None
        self._check_window(module)
        return (args, {**kwargs, "attention_mask": None, **instead}) if instead else None

    def _instead_of(self, mask: Tensor, length: int) -> dict[str, Any]:
        """See `Way.instead_of`, which looks at the values of a mask: once for all layers that are given the same."""
        if mask.is_inference():  # has no version that would show a change
            return self.way.instead_of(mask, length)
        latest = self._latest
        if latest is not None and latest[0]() is mask and latest[1:3] == (mask._version, length):
            return latest[3]
        instead = self.way.instead_of(mask, length)
        kept = {} if "attn_mask" in instead else instead  # which would keep the mask
        self._latest = (weakref.ref(mask), mask._version, length, instead) if kept else None
        return instead

    def _check_window(self, module: nn.Module) -> None:
        """Models narrow attention by masks, which they leave out where a rank's part is no longer than the window."""
        window = getattr(module, "sliding_window", getattr(getattr(module, "config", None), "sliding_window", None))
        if isinstance(window, int) and self._cut is not None and window < self._cut.length:
            raise ValueError(
                f"{type(module).__name__} lets a token see {window} tokens (sliding_window), and sequences have "
                f"{self._cut.length}: {self.way.called} would have them see all before them. Cut sequences to {window} "
                "tokens."
            )

    @contextmanager
    def over(
        self,
        buffers: Sequence[Tensor] | None,
        dims: Sequence[int] | None,
        no_restore: Iterable[Tensor] | None,
    ) -> Iterator[None]:
        """A block in which `buffers` are this rank's part, and attention goes over the whole sequence.

        Raises:
            ValueError: for tensors that cannot be cut; nothing has been changed then.
            RuntimeError: when the block ends and the models' attention has gone past the one that is shared.
        """
        buffers, dims = list(buffers or ()), list(dims or ())
        kept = _check(buffers, dims, list(no_restore or ()))
        length = buffers[0].shape[dims[0]] if buffers else None
        self._check_models()
        mesh = self.way.mesh
        layout = Layout(mesh.size(), False) if length is None else self.way.layout(length)
        self._forwards = self._calls = 0
        with ExitStack() as stack:
            stack.enter_context(_cut(buffers, dims, kept, layout, mesh.get_local_rank()))
            fused = stack.enter_context(self.way.fused(layout, length))
            attend = fused or functools.partial(self.way.attend, layout)
            stack.enter_context(_replaced(self._attention))
            self._attend, self._open = attend, True
            self._note(length, layout)
            try:
                yield
            finally:
                self._open = False
        if self._forwards and not self._calls:
            raise RuntimeError(
                f"the model ran under {self.way.called}, but its attention did not go through "
                f"torch's {ATTENTION}, so each rank has seen its own part of the sequence only: {_ADVICE}"
            )

    def _note(self, length: int | None, layout: Layout) -> None:
        self._cut = None if length is None else Cut(length, layout)
        loader = GradientState().active_dataloader
        self._loader = _no_loader if loader is None else weakref.ref(loader)

    def put_together(self, data: Any, device: torch.device) -> Any:
        """What ranks made of their parts, put together as the latest block has cut them; all that share them call this."""
        loader = GradientState().active_dataloader
        # Another loop, evaluation after training say, may have been without blocks.
        cut = self._cut if loader is None or loader is self._loader() else None
        return put_together(data, TorchCollectives(device, self.way.mesh.get_group()), cut)

    def _counted(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._calls += 1
        given = dict(kwargs)
        for position, value_given in enumerate(args):  # torch 2.6 cannot compile a dict of a zip
            given[("attn_mask", "dropout_p", "is_causal")[position]] = value_given
        if query.shape[-2] != key.shape[-2]:
            raise ValueError(
                f"{self.way.called} shares self-attention: {query.shape[-2]} queries and {key.shape[-2]} keys are not of "
                "one sequence."
            )
        mask = given.pop("attn_mask", None)
        if mask is not None:
            given.update(self._instead_of(mask, query.shape[-2]))
        return self._attend(query, key, value, **given)


def _no_loader() -> None:
    """In the place of a reference to a loader, outside of any loop."""


@contextmanager
def _cut(
    buffers: Sequence[Tensor], dims: Sequence[int], kept: Sequence[bool], layout: Layout, rank: int
) -> Iterator[None]:
    whole = [buffer.data for buffer in buffers]
    parts = [layout.cut(data, dim, rank) for data, dim in zip(whole, dims, strict=True)]
    # Other memory rather than less of the same: buffers may be views of one tensor.
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.data = part
    try:
        yield
    finally:
        for buffer, data, stays in zip(buffers, whole, kept, strict=True):
            if not stays:
                buffer.data = data


def _function_of(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function, the same for all blocks: torch's compiler takes no other in this place, and compiles anew for each."""

    @functools.wraps(original)
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, **kwargs)

    return scaled_dot_product_attention


@contextmanager
def _replaced(attention: Callable[..., Tensor]) -> Iterator[None]:
    before = functional.scaled_dot_product_attention
    setattr(functional, ATTENTION, attention)
    try:
        yield
    finally:
        setattr(functional, ATTENTION, before)


# What is refused -----------------------------------------------------------------------------------------------------


def _check(buffers: Sequence[Any], dims: Sequence[Any], no_restore: Sequence[Any]) -> list[bool]:
    """For each buffer, whether it stays cut afterwards."""
    if len(buffers) != len(dims):
        raise ValueError(
            f"maybe_context_parallel needs the dimension of the sequence for each buffer: buffers has {len(buffers)} "
            f"tensors, buffer_seq_dims {len(dims)} numbers."
        )
    lengths = set()
    for buffer, dim in zip(buffers, dims, strict=True):
        if not isinstance(buffer, Tensor) or buffer.requires_grad:
            what = "a tensor that requires gradients" if isinstance(buffer, Tensor) else type(buffer).__name__
            raise ValueError(f"maybe_context_parallel cuts tensors of data, found {what}: leave it out of buffers.")
        if not -buffer.dim() <= dim < buffer.dim():
            raise ValueError(f"buffer_seq_dims names dimension {dim} of a tensor of shape {tuple(buffer.shape)}.")
        lengths.add(buffer.shape[dim])
    if len(lengths) > 1:
        raise ValueError(
            f"the buffers of maybe_context_parallel have sequences of different lengths {sorted(lengths)}: pass those of "
            "one length."
        )
    if not all(any(one is buffer for buffer in buffers) for one in no_restore):
        raise ValueError("no_restore_buffers has a tensor that is not among buffers.")
    return [any(one is buffer for one in no_restore) for buffer in buffers]
