"""Context parallelism: inside a block, ranks of one group share each sequence.

Tensors are cut along it, and ``torch.nn.functional.scaled_dot_product_attention`` is replaced by one in which tokens see
those of the other ranks. A model whose attention goes another way would silently see its own part only: it is refused.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from .direct_calls import holder_of
from .shared_attention import Layout, gathered, ring

if TYPE_CHECKING:
    from ..parallelism_config import ParallelismConfig

_ATTENTION = "scaled_dot_product_attention"
_original = functional.scaled_dot_product_attention
# What a model that is refused may be told to use instead.
_ADVICE = (
    "call `torch.nn.functional.scaled_dot_product_attention` through its module (with transformers: "
    "attn_implementation='sdpa')."
)


def shared_sequences(mesh: DeviceMesh | None, sizes: ParallelismConfig | None) -> SharedSequences | None:
    """What a run shares sequences with; None where ranks have whole ones."""
    if mesh is None or sizes is None or sizes.cp_handler is None or "cp" not in (mesh.mesh_dim_names or ()):
        return None
    return SharedSequences(mesh["cp"], sizes.cp_handler.cp_comm_strategy or "allgather")


class SharedSequences:
    """What a run with context parallelism shares sequences with.

    Args:
        mesh: The ranks that share a sequence.
        method: How keys and values travel: ``allgather`` or ``alltoall``.
    """

    def __init__(self, mesh: DeviceMesh, method: str) -> None:
        self._mesh = mesh
        self._method = method
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._unchecked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._forwards = self._calls = 0
        self._open = False

    def watch(self, model: nn.Module) -> None:
        """Has the model's forwards counted."""
        if model not in self._models:
            self._models.add(model)
            self._unchecked.add(model)
            model.register_forward_pre_hook(self._count_forward)
            for name, module in model.named_modules():
                if name.rpartition(".")[2] == "self_attn":  # as transformers calls them
                    module.register_forward_pre_hook(self._without_mask, with_kwargs=True)

    def _check_models(self) -> None:
        for model in self._unchecked:
            holder = holder_of(_original, model)
            if holder is not None:
                raise ValueError(
                    f"{holder} holds the function {_ATTENTION} itself, so that its attention cannot be shared over ranks: "
                    f"{_ADVICE}"
                )
        self._unchecked.clear()

    def _count_forward(self, *_: Any) -> None:
        self._forwards += 1

    def _without_mask(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        # Each rank may have made another mask of its positions, or none, and what is sent along depends on it.
        mask = kwargs.get("attention_mask")
        if not self._open or not isinstance(mask, Tensor):
            return None
        _check_mask(mask)
        return args, {**kwargs, "attention_mask": None, "is_causal": True}

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
        layout = Layout(self._mesh.size(), False) if length is None else Layout.of(length, self._mesh.size())
        self._forwards = self._calls = 0
        with ExitStack() as stack:
            stack.enter_context(_cut(buffers, dims, kept, layout, self._mesh.get_local_rank()))
            attend: Callable[..., Tensor] = functools.partial(self._attend, layout)
            if self._mesh.device_type == "cuda" and length is not None and layout.balanced:
                stack.enter_context(_of_torch(self._mesh, self._method, length))
                attend = functional.scaled_dot_product_attention
            stack.enter_context(_replaced(functools.partial(self._counted, attend)))
            self._open = True
            try:
                yield
            finally:
                self._open = False
        if self._forwards and not self._calls:
            raise RuntimeError(
                "the model ran under context parallelism, but its attention did not go through "
                f"torch's {_ATTENTION}, so each rank has seen its own part of the sequence only: {_ADVICE}"
            )

    def _counted(
        self, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        self._calls += 1
        given = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)), **kwargs}
        if query.shape[-2] != key.shape[-2]:
            raise ValueError(
                f"context parallelism shares self-attention: {query.shape[-2]} queries and {key.shape[-2]} keys are not of "
                "one sequence."
            )
        mask = given.pop("attn_mask", None)
        if mask is not None:
            _check_mask(mask)
            given["is_causal"] = True
        return attention(query, key, value, **given)

    def _attend(self, layout: Layout, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        group = self._mesh.get_group()
        dropped = given.get("dropout_p", 0.0)
        causal = bool(given.pop("is_causal", False))
        if self._method == "alltoall":
            if dropped:
                raise ValueError(
                    f"attention drops out {dropped} of its weights, which cp_comm_strategy='alltoall' cannot: set the "
                    "model's attention dropout to 0, or use 'allgather'."
                )
            return ring(query, key, value, group=group, layout=layout, is_causal=causal, scale=given.get("scale"))
        return gathered(_original, query, key, value, group=group, layout=layout, is_causal=causal, **given)


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


@contextmanager
def _of_torch(mesh: DeviceMesh, method: str, length: int) -> Iterator[None]:
    """Torch's own attention over the same chunks, which uses the fused kernels of CUDA."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(method)
    example = torch.empty(length, device=mesh.device_type)  # what it is to cut, which has been done already
    with context_parallel(mesh, buffers=[example], buffer_seq_dims=[0], no_restore_buffers={example}):
        yield


@contextmanager
def _replaced(attention: Callable[..., Tensor]) -> Iterator[None]:
    before = functional.scaled_dot_product_attention
    setattr(functional, _ATTENTION, attention)
    try:
        yield
    finally:
        setattr(functional, _ATTENTION, before)


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


def _check_mask(mask: Tensor) -> None:
    """A mask is made of this rank's part only. What it must have meant is that tokens see those before them."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    size = mask.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=mask.device).tril()
    # Positions jump from one chunk to the next, which models may take for the start of another sequence.
    half = size // 2
    apart = causal.clone()
    apart[half:, :half] = False
    if mask.shape[-2] != size or not bool(((seen == causal).all(-1).all(-1) | (seen == apart).all(-1).all(-1)).all()):
        raise ValueError(
            "context parallelism takes causal attention and attention without a mask; this mask is another. Leave the "
            "attention mask out, and pack or truncate sequences instead of padding them."
        )
