"""The two ways in which ranks that share sequences attend to the whole of them, and what each cannot do.

Under context parallelism (``cp``) keys and values travel to the queries; under sequence parallelism (``sp``) heads are
exchanged for pieces of the sequence. The block in `context_parallel` cuts tensors and replaces attention for either.
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
from .ring_attention import Layout, gathered, ring
from .ulysses import exchanged, not_divided

if TYPE_CHECKING:
    from ....parallelism_config import ParallelismConfig

ATTENTION = "scaled_dot_product_attention"
original = functional.scaled_dot_product_attention


class Way(ABC):
    """What the two have in common.

    Attributes:
        called: Its name, for messages.

    Args:
        mesh: The ranks that share a sequence.
    """

    called: ClassVar[str]

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    @abstractmethod
    def layout(self, length: int) -> Layout:
        """Who has which part of sequences of this length.

        Raises:
            ValueError: when they cannot be cut into equal parts, or are not those that were announced.
        """

    @abstractmethod
    def attend(self, layout: Layout, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        """Attention of this rank's tokens to those of all ranks, from the arguments that torch's takes."""

    @abstractmethod
    def instead_of(self, mask: Tensor, length: int) -> dict[str, Any]:
        """What attention is given in place of a mask that a model has passed to it.

        Args:
            mask: The mask.
            length: How many tokens this rank has.

        Raises:
            ValueError: for a mask that cannot be shared.
        """

    def check_model(self, model: nn.Module) -> None:  # noqa: B027 - cp takes what sp refuses
        """Refuses what can be seen of a model before it runs.

        Raises:
            ValueError: saying what does not fit.
        """

    def check_loader(self) -> None:  # noqa: B027 - as above
        """Refuses to have a loader cut sequences.

        Raises:
            ValueError: where that is asked for.
        """

    def fused(self, layout: Layout, length: int | None) -> AbstractContextManager[Callable[..., Tensor] | None]:
        """A context that gives an implementation of the device's own, or None."""
        return nullcontext()


class KeysTravel(Way):
    """Context parallelism: each rank keeps its queries, and attends to all keys and values.

    Args:
        mesh: The ranks that share a sequence.
        method: How they travel: ``allgather`` or ``alltoall``.
    """

    called = "context parallelism"

    def __init__(self, mesh: DeviceMesh, method: str) -> None:
        super().__init__(mesh)
        self._method = method

    def layout(self, length: int) -> Layout:
        return Layout.of(length, self.mesh.size())

    def attend(self, layout: Layout, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        group = self.mesh.get_group()
        dropped = given.get("dropout_p", 0.0)
        causal = bool(given.pop("is_causal", False))
        if self._method == "alltoall":
            if dropped:
                raise ValueError(
                    f"attention drops out {dropped} of its weights, which cp_comm_strategy='alltoall' cannot: set the "
                    "model's attention dropout to 0, or use 'allgather'."
                )
            return ring(query, key, value, group=group, layout=layout, is_causal=causal, scale=given.get("scale"))
        return gathered(original, query, key, value, group=group, layout=layout, is_causal=causal, **given)

    def instead_of(self, mask: Tensor, length: int) -> dict[str, Any]:
        causal = _causal(mask)
        # Positions jump from one chunk to the next, which models may take for the start of another sequence.
        half = causal.shape[0] // 2
        apart = causal.clone()
        apart[half:, :half] = False
        if not _is_one_of(mask, [causal, apart]):
            raise ValueError(
                "context parallelism takes causal attention and attention without a mask; this mask is another. Leave the "
                "attention mask out, and pack or truncate sequences instead of padding them."
            )
        return {"is_causal": True}

    @contextmanager
    def fused(self, layout: Layout, length: int | None) -> Iterator[Callable[..., Tensor] | None]:
        """Torch's own attention over the same chunks, which uses the fused kernels of CUDA."""
        if self.mesh.device_type != "cuda" or length is None or not layout.balanced:
            yield None
            return
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import set_rotate_method

        set_rotate_method(self._method)
        example = torch.empty(length, device=self.mesh.device_type)  # what it is to cut, which has been done already
        with context_parallel(self.mesh, buffers=[example], buffer_seq_dims=[0], no_restore_buffers={example}):
            yield functional.scaled_dot_product_attention


class HeadsTravel(Way):
    """Sequence parallelism: each rank attends with some of the heads, over the whole sequence.

    Args:
        mesh: The ranks that share a sequence.
        fixed: The length of all sequences; None: they differ.
        tensor_ranks: How many ranks share a layer's tensors, and with them its heads.
    """

    called = "sequence parallelism"

    def __init__(self, mesh: DeviceMesh, fixed: int | None, tensor_ranks: int) -> None:
        super().__init__(mesh)
        self._fixed = fixed
        self._tensor_ranks = tensor_ranks

    def layout(self, length: int) -> Layout:
        if self._fixed not in (None, length):
            raise ValueError(
                f"sp_seq_length={self._fixed} with sp_seq_length_is_variable=False announces the length of all sequences, "
                f"and this batch has {length} tokens: pad or pack to {self._fixed}, or set sp_seq_length_is_variable=True."
            )
        return Layout.of(length, self.mesh.size(), setting="sp_size", in_order=True)

    def attend(self, layout: Layout, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        return exchanged(original, query, key, value, group=self.mesh.get_group(), **given)

    def instead_of(self, mask: Tensor, length: int) -> dict[str, Any]:
        whole = length * self.mesh.size()
        if tuple(mask.shape[-2:]) in ((whole, whole), (1, whole)):
            return {"attn_mask": mask}
        # What a model makes of this rank's tokens tells nothing of the others: it may only have meant that tokens see those
        # before them.
        if not _is_one_of(mask, [_causal(mask)]):
            raise ValueError(
                "sequence parallelism takes causal attention, attention without a mask, and masks of the whole sequence, "
                f"(..., {whole}, {whole}) or (..., 1, {whole}) for {self.mesh.size()} ranks with {length} tokens each. This "
                f"one, {tuple(mask.shape)}, is another. Leave masks out of buffers, and pass them whole: to models of "
                "transformers with four dimensions. Causal attention needs none for padding at the end."
            )
        return {"is_causal": True}

    def check_model(self, model: nn.Module) -> None:
        config, name = getattr(model, "config", None), type(model).__name__
        kind = getattr(config, "_attn_implementation", None)
        if kind not in (None, "sdpa"):
            raise ValueError(
                f"{name} has attn_implementation={kind!r}, and ranks exchange heads around torch's {ATTENTION}: load it "
                "with attn_implementation='sdpa'."
            )
        heads = getattr(config, "num_attention_heads", None)
        if not isinstance(heads, int) or heads % self._tensor_ranks:  # the latter, tensor parallelism says itself
            return
        here = heads // self._tensor_ranks
        if here % self.mesh.size():
            shared = f"num_attention_heads {heads}"
            if self._tensor_ranks > 1:
                shared = f"{shared} / tp_size {self._tensor_ranks} = {here}"
            raise ValueError(
                f"{name} cannot share out the heads of its attention: {not_divided(shared, here, self.mesh.size())}."
            )

    def check_loader(self) -> None:
        raise ValueError(
            "deepspeed_ulysses_dl_adapter belongs to DeepSpeed, as the way in which transformers' Trainer computes losses "
            "with sp_size above 1 does, and this run is without DeepSpeed: write the loop, and cut each batch with "
            "`accelerator.maybe_context_parallel`; or set cp_size instead of sp_size, with which the Trainer works."
        )


def way_of(mesh: DeviceMesh, sizes: ParallelismConfig) -> Way | None:
    """How ranks of this run share sequences; None where they have whole ones."""
    names = mesh.mesh_dim_names or ()
    if "cp" in names:
        contexts = sizes.cp_handler or TorchContextParallelConfig()
        return KeysTravel(mesh["cp"], contexts.cp_comm_strategy or "allgather")
    if "sp" in names:
        sequences = sizes.sp_handler or DeepSpeedSequenceParallelConfig()
        fixed = None if sequences.sp_seq_length_is_variable else sequences.sp_seq_length
        return HeadsTravel(mesh["sp"], fixed, sizes.tp_size or 1)
    return None


def check_details(sizes: ParallelismConfig) -> None:
    """Refuses what the settings ask of sequence parallelism and it cannot do without DeepSpeed.

    Raises:
        ValueError: saying what.
    """
    handler = sizes.sp_handler
    if handler is None or not sizes.sp_enabled:
        return
    if handler.sp_attn_implementation not in (None, "sdpa"):
        raise ValueError(
            f"sp_attn_implementation={handler.sp_attn_implementation!r} needs DeepSpeed, which is not part of this version: "
            f"without it, ranks exchange heads around torch's {ATTENTION}, which has kernels of flash attention itself. Set "
            "'sdpa'."
        )
    size, length = sizes.sp_size or 1, handler.sp_seq_length
    if length is not None and not handler.sp_seq_length_is_variable and length % size:
        why = not_divided(f"sp_seq_length={length}", length, size)
        raise ValueError(f"sequences of one length cannot be cut into equal parts: {why}.")


def _causal(mask: Tensor) -> Tensor:
    size = mask.shape[-1]
    return torch.ones(size, size, dtype=torch.bool, device=mask.device).tril()


def _is_one_of(mask: Tensor, patterns: Sequence[Tensor]) -> bool:
    """Whether all matrices of a mask say the same as one of some others."""
    if mask.shape[-2:] != patterns[0].shape:
        return False
    seen = mask if mask.dtype == torch.bool else mask == 0
    fits = [(seen == pattern).all(-1).all(-1) for pattern in patterns]
    return bool(torch.stack(fits).any(0).all())
