"""Options of the dimensions of a device mesh: tensor, context and sequence parallelism.

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

# Attention implementations of transformers that Ulysses supports.
_SEQUENCE_PARALLEL_ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass
class TorchTensorParallelPlugin:
    """Configures tensor parallelism; superseded by `ParallelismConfig(tp_size=...)`.

    Raises:
        ValueError: if the size is below 1.
    """

    tp_size: int = 1
    """Number of ranks over which each layer's tensors are sharded."""
    torch_device_mesh: DeviceMesh | None = None
    """An existing mesh whose dimension ``tp`` has `tp_size` ranks."""

    def __post_init__(self) -> None:
        if isinstance(self.tp_size, bool) or not isinstance(self.tp_size, int) or self.tp_size < 1:
            raise ValueError(f"tp_size={self.tp_size!r}: expected a number of ranks, 1 or more.")


@dataclass
class TorchTensorParallelConfig:
    """Options of tensor parallelism."""

    enable_async_tp: bool = False
    """Overlap communication with computation in the compiler; accepted, without effect."""
    plan: dict[str, Any] | None = field(default=None, repr=False)
    """Sharding plan: patterns of module FQNs -> styles of ``torch.distributed.tensor.parallel``, or transformers' names of
    them (``"colwise"``, ``"rowwise"`` …). None: the model's own plan, its ``_tp_plan``."""

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
    """Options of context parallelism, which shards sequences over ranks.

    Raises:
        ValueError: if the communication strategy is unknown.
    """

    cp_comm_strategy: str | None = None
    """Communication of keys and values: ``allgather`` (the default), or ``alltoall`` (ring attention, less memory)."""

    def __post_init__(self) -> None:
        self.cp_comm_strategy = resolve(
            self.cp_comm_strategy, "cp_comm_strategy", "parallelism_config_cp_comm_strategy"
        )


@dataclass
class DeepSpeedSequenceParallelConfig:
    """Options of DeepSpeed-Ulysses sequence parallelism, which trades sequence shards for attention heads by all-to-all.

    Raises:
        ValueError: if the attention implementation is unsupported, or a fixed sequence length is missing.
    """

    sp_seq_length: int | None = None
    """Length of all sequences if `sp_seq_length_is_variable` is False; batches are checked against it."""
    sp_seq_length_is_variable: bool | None = None
    """Whether lengths differ from batch to batch; True."""
    sp_attn_implementation: str | None = None
    """The model's attention: ``sdpa``, or with DeepSpeed also ``flash_attention_2`` …; None: the model's own."""

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
                f"sp_attn_implementation={self.sp_attn_implementation!r} does not support sequence parallelism: choose from "
                f"{', '.join(_SEQUENCE_PARALLEL_ATTENTION)}."
            )
        if not self.sp_seq_length_is_variable and self.sp_seq_length is None:
            raise ValueError(
                "sp_seq_length_is_variable=False needs the length that all sequences have: set sp_seq_length."
            )
