"""Backends of attention over sharded sequences, and checks of models and masks that they do not support.

`RingBackend` serves context parallelism (``cp``): keys and values are communicated. `UlyssesBackend` serves sequence
parallelism (``sp``): heads are exchanged for sequence shards. `manager` shards tensors and patches attention for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from ....settings.parallel import DeepSpeedSequenceParallelConfig, TorchContextParallelConfig
from .ring_attention import SequenceSharding, allgather_kv_attention, ring_attention
from .ulysses import divisibility_error, ulysses_attention

if TYPE_CHECKING:
    from ....parallelism_config import ParallelismConfig

SDPA_NAME = "scaled_dot_product_attention"
torch_sdpa = functional.scaled_dot_product_attention


class SequenceParallelBackend(ABC):
    """Interface of a backend.

    Attributes:
        display_name: Name in error messages.

    Args:
        mesh: One-dimensional mesh of the ranks that share a sequence.
    """

    display_name: ClassVar[str]

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    @abstractmethod
    def sharding(self, length: int) -> SequenceSharding:
        """Returns the sharding of sequences of this length.

        Raises:
            ValueError: if the length is not divisible by the number of ranks, or is not the configured one.
        """

    @abstractmethod
    def attention(self, sharding: SequenceSharding, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        """Computes the attention of this rank's tokens to those of all ranks; takes the arguments of torch's attention."""

    @abstractmethod
    def normalize_mask(self, mask: Tensor, length: int) -> dict[str, Any]:
        """Returns the arguments of attention that replace a mask: ``is_causal``, or a mask of the whole sequence.

        Args:
            mask: Mask that the model passes to attention.
            length: Number of tokens of this rank's shard.

        Raises:
            ValueError: for a mask that the backend does not support.
        """

    def check_model(self, model: nn.Module) -> None:  # noqa: B027 - nothing to check by default
        """Raises if the model does not support this backend, as far as its configuration shows.

        Raises:
            ValueError: naming the unsupported setting.
        """

    def check_data_loader(self) -> None:  # noqa: B027 - as above
        """Raises if the backend needs a data loader of DeepSpeed.

        Raises:
            ValueError: for sequence parallelism.
        """

    def native_kernel(
        self, sharding: SequenceSharding, length: int | None
    ) -> AbstractContextManager[Callable[..., Tensor] | None]:
        """Returns a context that yields torch's own context-parallel attention where the device has one, else None."""
        return nullcontext()


class RingBackend(SequenceParallelBackend):
    """Context parallelism: each rank keeps its queries and attends to the keys and values of all ranks.

    Args:
        mesh: One-dimensional mesh of the ranks that share a sequence.
        method: ``allgather`` for a KV all-gather, ``alltoall`` for ring attention.
    """

    display_name = "context parallelism"

    def __init__(self, mesh: DeviceMesh, method: str) -> None:
        super().__init__(mesh)
        self._method = method

    def sharding(self, length: int) -> SequenceSharding:
        return SequenceSharding.for_length(length, self.mesh.size())

    def attention(self, sharding: SequenceSharding, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        group = self.mesh.get_group()
        dropped = given.get("dropout_p", 0.0)
        causal = bool(given.pop("is_causal", False))
        if self._method == "alltoall":
            if dropped:
                raise ValueError(
                    f"attention drops out {dropped} of its weights, which cp_comm_strategy='alltoall' cannot: set the "
                    "model's attention dropout to 0, or use 'allgather'."
                )
            return ring_attention(
                query, key, value, group=group, sharding=sharding, is_causal=causal, scale=given.get("scale")
            )
        return allgather_kv_attention(
            torch_sdpa, query, key, value, group=group, sharding=sharding, is_causal=causal, **given
        )

    def normalize_mask(self, mask: Tensor, length: int) -> dict[str, Any]:
        causal = _causal_mask(mask)
        # Position ids jump between the two chunks. Models with packed sequences take a jump for the start of a document.
        half = causal.shape[0] // 2
        apart = causal.clone()
        apart[half:, :half] = False
        if not _matches_any(mask, [causal, apart]):
            raise ValueError(
                "context parallelism supports causal attention and attention without a mask, not this mask. Leave the "
                "attention mask out, and pack or truncate sequences instead of padding them."
            )
        return {"is_causal": True}

    @contextmanager
    def native_kernel(self, sharding: SequenceSharding, length: int | None) -> Iterator[Callable[..., Tensor] | None]:
        """Enters torch's context_parallel, whose attention over head-tail shards uses fused CUDA kernels."""
        if self.mesh.device_type != "cuda" or length is None or not sharding.head_tail:
            yield None
            return
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import set_rotate_method

        set_rotate_method(self._method)
        example = torch.empty(length, device=self.mesh.device_type)  # a dummy: buffers are sharded already
        with context_parallel(self.mesh, buffers=[example], buffer_seq_dims=[0], no_restore_buffers={example}):
            yield functional.scaled_dot_product_attention


class UlyssesBackend(SequenceParallelBackend):
    """Sequence parallelism: each rank computes some of the heads, over the whole sequence.

    Args:
        mesh: One-dimensional mesh of the ranks that share a sequence.
        seq_length: Length of all sequences; None if it varies.
        tp_size: Number of tensor-parallel ranks, which divide the heads as well.
    """

    display_name = "sequence parallelism"

    def __init__(self, mesh: DeviceMesh, seq_length: int | None, tp_size: int) -> None:
        super().__init__(mesh)
        self._seq_length = seq_length
        self._tp_size = tp_size

    def sharding(self, length: int) -> SequenceSharding:
        if self._seq_length not in (None, length):
            raise ValueError(
                f"sp_seq_length={self._seq_length} with sp_seq_length_is_variable=False announces the length of all "
                f"sequences, and this batch has {length} tokens: pad or pack to {self._seq_length}, or set "
                "sp_seq_length_is_variable=True."
            )
        return SequenceSharding.for_length(length, self.mesh.size(), setting="sp_size", contiguous=True)

    def attention(self, sharding: SequenceSharding, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        return ulysses_attention(torch_sdpa, query, key, value, group=self.mesh.get_group(), **given)

    def normalize_mask(self, mask: Tensor, length: int) -> dict[str, Any]:
        whole = length * self.mesh.size()
        if tuple(mask.shape[-2:]) in ((whole, whole), (1, whole)):
            return {"attn_mask": mask}
        # A mask that the model builds from this rank's shard has no information about the other shards. Only a causal mask
        # can be extended to the whole sequence.
        if not _matches_any(mask, [_causal_mask(mask)]):
            raise ValueError(
                "sequence parallelism supports causal attention, no mask, and masks of the whole sequence, "
                f"(..., {whole}, {whole}) or (..., 1, {whole}) for {self.mesh.size()} ranks with {length} tokens; "
                f"found a mask of shape {tuple(mask.shape)}. Leave masks out of buffers and pass them whole, to models of "
                "transformers with four dimensions. Causal attention needs no mask for padding at the end."
            )
        return {"is_causal": True}

    def check_model(self, model: nn.Module) -> None:
        config, name = getattr(model, "config", None), type(model).__name__
        kind = getattr(config, "_attn_implementation", None)
        if kind not in (None, "sdpa"):
            raise ValueError(
                f"{name} has attn_implementation={kind!r}, and ranks exchange heads around torch's {SDPA_NAME}: load it "
                "with attn_implementation='sdpa'."
            )
        heads = getattr(config, "num_attention_heads", None)
        if not isinstance(heads, int) or heads % self._tp_size:  # tensor parallelism reports the latter
            return
        here = heads // self._tp_size
        if here % self.mesh.size():
            shared = f"num_attention_heads {heads}"
            if self._tp_size > 1:
                shared = f"{shared} / tp_size {self._tp_size} = {here}"
            raise ValueError(
                f"{name} cannot divide its attention heads over ranks: {divisibility_error(shared, here, self.mesh.size())}."
            )

    def check_data_loader(self) -> None:
        raise ValueError(
            "deepspeed_ulysses_dl_adapter needs DeepSpeed, and so does transformers' Trainer with sp_size above 1; this run "
            "is without DeepSpeed. Write the training loop, and shard each batch with `accelerator.maybe_context_parallel`; "
            "or set cp_size instead of sp_size, which the Trainer supports."
        )


def select_backend(mesh: DeviceMesh, sizes: ParallelismConfig) -> SequenceParallelBackend | None:
    """Returns the backend for a mesh; None for a mesh without ``cp`` and ``sp``."""
    names = mesh.mesh_dim_names or ()
    if "cp" in names:
        contexts = sizes.cp_handler or TorchContextParallelConfig()
        return RingBackend(mesh["cp"], contexts.cp_comm_strategy or "allgather")
    if "sp" in names:
        sequences = sizes.sp_handler or DeepSpeedSequenceParallelConfig()
        seq_length = None if sequences.sp_seq_length_is_variable else sequences.sp_seq_length
        return UlyssesBackend(mesh["sp"], seq_length, sizes.tp_size or 1)
    return None


def validate_config(sizes: ParallelismConfig) -> None:
    """Raises for settings of sequence parallelism that are not supported without DeepSpeed.

    Raises:
        ValueError: naming the setting.
    """
    handler = sizes.sp_handler
    if handler is None or not sizes.sp_enabled:
        return
    if handler.sp_attn_implementation not in (None, "sdpa"):
        raise ValueError(
            f"sp_attn_implementation={handler.sp_attn_implementation!r} needs DeepSpeed, which is not part of this version: "
            f"without it, ranks exchange heads around torch's {SDPA_NAME}, which has flash attention kernels. Set 'sdpa'."
        )
    size, length = sizes.sp_size or 1, handler.sp_seq_length
    if length is not None and not handler.sp_seq_length_is_variable and length % size:
        why = divisibility_error(f"sp_seq_length={length}", length, size)
        raise ValueError(f"sequences cannot be split into equal shards: {why}.")


def _causal_mask(mask: Tensor) -> Tensor:
    size = mask.shape[-1]
    return torch.ones(size, size, dtype=torch.bool, device=mask.device).tril()


def _matches_any(mask: Tensor, patterns: Sequence[Tensor]) -> bool:
    """Returns whether each matrix of a mask equals one of the patterns."""
    if mask.shape[-2:] != patterns[0].shape:
        return False
    seen = mask if mask.dtype == torch.bool else mask == 0
    fits = [(seen == pattern).all(-1).all(-1) for pattern in patterns]
    return bool(torch.stack(fits).any(0).all())
