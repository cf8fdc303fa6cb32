"""Details of the dimensions of a device mesh: how tensors, and sequences, are cut over ranks.

A field left None is read from the launcher's ``PARALLELISM_CONFIG_*`` variables. The sizes are in `parallelism_config`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .env_defaults import resolve, variable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

# What transformers calls the implementations of attention that can exchange heads between ranks.
_SEQUENCE_PARALLEL_ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass
class TorchTensorParallelPlugin:
    """The older way to ask for tensor parallelism; `ParallelismConfig(tp_size=...)` is the present one.

    Raises:
        ValueError: for a size below 1.
    """

    tp_size: int = 1
    """How many ranks share each layer's tensors."""
    torch_device_mesh: DeviceMesh | None = None
    """A mesh that is there already; its dimension ``tp`` has `tp_size` ranks."""

    def __post_init__(self) -> None:
        if isinstance(self.tp_size, bool) or not isinstance(self.tp_size, int) or self.tp_size < 1:
            raise ValueError(f"tp_size={self.tp_size!r}: expected a number of ranks, 1 or more.")


@dataclass
class TorchTensorParallelConfig:
    """Details of tensor parallelism."""

    enable_async_tp: bool = False
    """Overlap communication and computation in the compiler; accepted for scripts that set it, without effect."""
    plan: dict[str, Any] | None = field(default=None, repr=False)
    """How tensors are cut: patterns of modules' names to styles of ``torch.distributed.tensor.parallel``, or to the words
    that transformers uses (``"colwise"``, ``"rowwise"`` …). None: the model's own plan, its ``_tp_plan``."""

    def __post_init__(self) -> None:
        if self.plan is not None and not (
            isinstance(self.plan, dict) and all(isinstance(key, str) for key in self.plan)
        ):
            raise ValueError(f"plan={self.plan!r}: expected a dict of patterns of modules' names to styles.")
        if self.enable_async_tp:
            logger.warning(
                "enable_async_tp=True has no effect: asynchronous tensor parallelism is not part of this version."
            )


@dataclass
class TorchContextParallelConfig:
    """Details of context parallelism, which cuts a sequence over ranks.

    Raises:
        ValueError: for an unknown way to communicate.
    """

    cp_comm_strategy: str | None = None
    """How keys and values travel: ``allgather`` (the default) or ``alltoall`` (in a ring, less memory)."""

    def __post_init__(self) -> None:
        self.cp_comm_strategy = resolve(
            self.cp_comm_strategy, "cp_comm_strategy", "parallelism_config_cp_comm_strategy"
        )


@dataclass
class DeepSpeedSequenceParallelConfig:
    """Details of sequence parallelism (Ulysses), which exchanges heads for pieces of the sequence, as DeepSpeed has it.

    Raises:
        ValueError: for an attention that cannot do it, or a fixed length that is not given.
    """

    sp_seq_length: int | None = None
    """The length of all sequences, where `sp_seq_length_is_variable` is False; batches are compared with it."""
    sp_seq_length_is_variable: bool | None = None
    """Lengths differ from batch to batch; True."""
    sp_attn_implementation: str | None = None
    """The model's attention: ``sdpa``; with DeepSpeed ``flash_attention_2`` … as well; None: the model's own."""

    def __post_init__(self) -> None:
        length = "parallelism_config_sp_seq_length"
        if self.sp_seq_length is not None or variable(length) not in (
            None,
            "None",
        ):  # the launcher writes None as a word
            self.sp_seq_length = resolve(self.sp_seq_length, "sp_seq_length", length)
        self.sp_seq_length_is_variable = resolve(
            self.sp_seq_length_is_variable, "sp_seq_length_is_variable", "parallelism_config_sp_seq_length_is_variable"
        )
        self.sp_attn_implementation = resolve(
            self.sp_attn_implementation, "sp_attn_implementation", "parallelism_config_sp_attn_implementation", None
        )
        if self.sp_attn_implementation not in (None, *_SEQUENCE_PARALLEL_ATTENTION):
            raise ValueError(
                f"sp_attn_implementation={self.sp_attn_implementation!r} cannot share a sequence over ranks: choose from "
                f"{', '.join(_SEQUENCE_PARALLEL_ATTENTION)}."
            )
        if not self.sp_seq_length_is_variable and self.sp_seq_length is None:
            raise ValueError(
                "sp_seq_length_is_variable=False needs the length that all sequences have: set sp_seq_length."
            )
