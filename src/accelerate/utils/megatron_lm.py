"""Megatron-LM: what stands in for its objects."""

from __future__ import annotations

from ..runtime.collectives import avg_losses_across_data_parallel_group
from ..settings.megatron import MegatronLMDummyScheduler

__all__ = ["MegatronLMDummyScheduler", "avg_losses_across_data_parallel_group"]
