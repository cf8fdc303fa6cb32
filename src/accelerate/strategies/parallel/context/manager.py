"""`ContextParallelManager`: a block in which tensors are sharded along the sequence and attention spans all ranks.

In the block, ``torch.nn.functional.scaled_dot_product_attention`` is patched with that of a backend. A model that computes
attention in another way would silently attend to its own shard only; hooks and call counts detect that and raise.
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
from .backends import SDPA_NAME, SequenceParallelBackend, select_backend, torch_sdpa
from .ring_attention import SequenceSharding
from .sdpa_capture import find_captured_function
from .unshard_outputs import ShardedSequence, unshard_outputs

if TYPE_CHECKING:
    from ....parallelism_config import ParallelismConfig

# Remedy in errors about unsupported models.
_ADVICE = (
    "call `torch.nn.functional.scaled_dot_product_attention` through its module (with transformers: "
    "attn_implementation='sdpa')."
)


def context_parallel_manager(mesh: DeviceMesh | None, sizes: ParallelismConfig | None) -> ContextParallelManager | None:
    """Returns the manager of a run; None for a mesh without context or sequence parallelism."""
    backend = None if mesh is None or sizes is None else select_backend(mesh, sizes)
    return None if backend is None else ContextParallelManager(backend)


class ContextParallelManager:
    """Shards sequences over ranks, checks that models support it, and unshards their outputs.

    Args:
        backend: Computes attention over sharded sequences.
    """

    def __init__(self, backend: SequenceParallelBackend) -> None:
        self.backend = backend
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._unchecked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._forward_calls = self._sdpa_calls = 0
        self._active = False
        self._sequence: ShardedSequence | None = None  # set by the latest block, in the loop over `_loader`
        self._loader: Callable[[], Any] = _no_loader
        self._attention_impl: Callable[..., Tensor] = torch_sdpa
        self._sdpa = _as_sdpa(self._intercept_sdpa)
        self._mask_cache: tuple[weakref.ref[Tensor], int, int, dict[str, Any]] | None = None

    # Hooks of models refer to this object: copies of a model share it, and a pickled model gets an inactive one.

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextParallelManager:
        return self

    def __reduce__(self) -> Any:
        return ContextParallelManager, (None,)

    def check_model(self, model: nn.Module) -> None:
        """Raises if the model does not support context parallelism.

        Raises:
            ValueError: naming the reason.
        """
        self.backend.check_model(unwrap_module(model))

    def register_hooks(self, model: nn.Module) -> None:
        """Registers pre-forward hooks that count calls and reject inputs that a sequence shard would misinterpret."""
        if model not in self._models:
            self._models.add(model)
            self._unchecked.add(model)
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            for name, module in model.named_modules():
                if name.rpartition(".")[2] == "self_attn":  # the name in transformers
                    module.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def _check_models(self) -> None:
        for model in self._unchecked:
            holder = find_captured_function(torch_sdpa, model)
            if holder is not None:
                raise ValueError(
                    f"{holder} refers to the function {SDPA_NAME} itself, so that its attention cannot be replaced: "
                    f"{_ADVICE}"
                )
        self._unchecked.clear()

    def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._forward_calls += 1
        bare = unwrap_module(model)
        if not self._active or not hasattr(bare, "config"):  # only transformers' models have one
            return
        taken = inspect.signature(bare.forward)
        given = {**taken.bind_partial(*args, **kwargs).arguments, **kwargs}
        inside: Any = getattr(bare, "get_base_model", None)
        base = bare if inside is None else inside()  # peft's models forward their arguments
        if "position_ids" in inspect.signature(base.forward).parameters and given.get("position_ids") is None:
            raise ValueError(
                f"{type(bare).__name__} got no position_ids and would count them from 0 on each rank: pass positions of the "
                "whole sequence, sharded like the tokens (maybe_context_parallel's buffers)."
            )
        mask, sequence = given.get("attention_mask"), self._sequence
        if sequence is None or not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != sequence.length:
            return
        if not bool(mask.all()):
            raise ValueError(
                f"{type(bare).__name__} got an attention_mask of all {sequence.length} tokens and would apply its beginning "
                "to the shard of each rank: leave it out, or shard it like the tokens (maybe_context_parallel's buffers)."
            )

    def _before_attention(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if not self._active or not isinstance(hidden, Tensor):
            return None
        # Ranks may have built different masks, or none. Communication depends on the mask, so it is normalized here.
        mask = kwargs.get("attention_mask")
        instead = self._normalize_mask(mask, hidden.shape[-2]) if isinstance(mask, Tensor) else {}
        if "attn_mask" in instead:
            return None
        self._check_sliding_window(module)
        return (args, {**kwargs, "attention_mask": None, **instead}) if instead else None

    def _normalize_mask(self, mask: Tensor, length: int) -> dict[str, Any]:
        """Caches `SequenceParallelBackend.normalize_mask`, which reads the mask's values, for layers that share a mask."""
        if mask.is_inference():  # has no version counter
            return self.backend.normalize_mask(mask, length)
        latest = self._mask_cache
        if latest is not None and latest[0]() is mask and latest[1:3] == (mask._version, length):
            return latest[3]
        instead = self.backend.normalize_mask(mask, length)
        kept = {} if "attn_mask" in instead else instead  # a result with the mask would keep it alive
        self._mask_cache = (weakref.ref(mask), mask._version, length, instead) if kept else None
        return instead

    def _check_sliding_window(self, module: nn.Module) -> None:
        """Raises for a sliding window that the model drops because a shard is no longer than the window."""
        window = getattr(module, "sliding_window", getattr(getattr(module, "config", None), "sliding_window", None))
        if isinstance(window, int) and self._sequence is not None and window < self._sequence.length:
            raise ValueError(
                f"{type(module).__name__} limits attention to {window} tokens (sliding_window), and sequences have "
                f"{self._sequence.length}: under {self.backend.display_name} tokens would attend to all earlier ones. "
                f"Truncate sequences to {window} tokens."
            )

    @contextmanager
    def shard_buffers(
        self,
        buffers: Sequence[Tensor] | None,
        dims: Sequence[int] | None,
        no_restore: Iterable[Tensor] | None,
    ) -> Iterator[None]:
        """Shards `buffers` in place for a block, in which attention spans the whole sequence.

        Args:
            buffers: Tensors of equal sequence length.
            dims: Sequence dimension of each buffer.
            no_restore: Buffers that stay sharded after the block.

        Raises:
            ValueError: for tensors that cannot be sharded; nothing has changed then.
            RuntimeError: at the end of the block, if models ran without calling the patched attention.
        """
        buffers, dims = list(buffers or ()), list(dims or ())
        kept = _check_buffers(buffers, dims, list(no_restore or ()))
        length = buffers[0].shape[dims[0]] if buffers else None
        self._check_models()
        mesh = self.backend.mesh
        sharding = SequenceSharding(mesh.size(), False) if length is None else self.backend.sharding(length)
        self._forward_calls = self._sdpa_calls = 0
        with ExitStack() as stack:
            stack.enter_context(_sharded_buffers(buffers, dims, kept, sharding, mesh.get_local_rank()))
            native_kernel = stack.enter_context(self.backend.native_kernel(sharding, length))
            attention = native_kernel or functools.partial(self.backend.attention, sharding)
            stack.enter_context(_patched_sdpa(self._sdpa))
            self._attention_impl, self._active = attention, True
            self._remember_sharding(length, sharding)
            try:
                yield
            finally:
                self._active = False
        if self._forward_calls and not self._sdpa_calls:
            raise RuntimeError(
                f"the model ran under {self.backend.display_name}, but its attention did not go through "
                f"torch's {SDPA_NAME}, so each rank attended to its own shard of the sequence only: {_ADVICE}"
            )

    def _remember_sharding(self, length: int | None, sharding: SequenceSharding) -> None:
        self._sequence = None if length is None else ShardedSequence(length, sharding)
        loader = GradientState().active_dataloader
        self._loader = _no_loader if loader is None else weakref.ref(loader)

    def unshard_outputs(self, data: Any, device: torch.device) -> Any:
        """Unshards outputs that were computed in the latest block. Collective over the ranks that share sequences."""
        loader = GradientState().active_dataloader
        # The outputs of another loop (evaluation after training) may come from whole sequences.
        sequence = self._sequence if loader is None or loader is self._loader() else None
        return unshard_outputs(data, TorchCollectives(device, self.backend.mesh.get_group()), sequence)

    def _intercept_sdpa(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._sdpa_calls += 1
        given = dict(kwargs)
        for position, value_given in enumerate(args):  # torch 2.6 cannot compile dict(zip(...))
            given[("attn_mask", "dropout_p", "is_causal")[position]] = value_given
        if query.shape[-2] != key.shape[-2]:
            raise ValueError(
                f"{self.backend.display_name} supports self-attention only, found {query.shape[-2]} queries and "
                f"{key.shape[-2]} keys."
            )
        mask = given.pop("attn_mask", None)
        if mask is not None:
            given.update(self._normalize_mask(mask, query.shape[-2]))
        return self._attention_impl(query, key, value, **given)


def _no_loader() -> None:
    """Stands for a weak reference to a loader, outside of any loop."""


@contextmanager
def _sharded_buffers(
    buffers: Sequence[Tensor], dims: Sequence[int], kept: Sequence[bool], sharding: SequenceSharding, rank: int
) -> Iterator[None]:
    whole = [buffer.data for buffer in buffers]
    parts = [sharding.shard(data, dim, rank) for data, dim in zip(whole, dims, strict=True)]
    # Buffers may be views of one tensor: replace their data instead of resizing it.
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.data = part
    try:
        yield
    finally:
        for buffer, data, stays in zip(buffers, whole, kept, strict=True):
            if not stays:
                buffer.data = data


def _as_sdpa(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps attention in a plain function for torch.compile; all blocks use the same, to avoid recompiling."""

    @functools.wraps(torch_sdpa)
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, **kwargs)

    return scaled_dot_product_attention


@contextmanager
def _patched_sdpa(attention: Callable[..., Tensor]) -> Iterator[None]:
    before = functional.scaled_dot_product_attention
    setattr(functional, SDPA_NAME, attention)
    try:
        yield
    finally:
        setattr(functional, SDPA_NAME, before)


# Checks --------------------------------------------------------------------------------------------------------------


def _check_buffers(buffers: Sequence[Any], dims: Sequence[Any], no_restore: Sequence[Any]) -> list[bool]:
    """Checks the arguments of `shard_buffers`, and returns for each buffer whether it stays sharded."""
    if len(buffers) != len(dims):
        raise ValueError(
            f"maybe_context_parallel needs the dimension of the sequence for each buffer: buffers has {len(buffers)} "
            f"tensors, buffer_seq_dims {len(dims)} numbers."
        )
    lengths = set()
    for buffer, dim in zip(buffers, dims, strict=True):
        if not isinstance(buffer, Tensor) or buffer.requires_grad:
            what = "a tensor that requires gradients" if isinstance(buffer, Tensor) else type(buffer).__name__
            raise ValueError(f"maybe_context_parallel shards tensors of data, found {what}: leave it out of buffers.")
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
