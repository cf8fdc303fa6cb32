"""Megatron-LM: placeholder classes."""

from __future__ import annotations

from ..runtime.collectives import avg_losses_across_data_parallel_group
from ..settings.planned import AbstractTrainStep, BertTrainStep, GPTTrainStep, MegatronLMDummyDataLoader, T5TrainStep
from ..settings.plugins.megatron import MegatronLMDummyScheduler

__all__ = [
    "AbstractTrainStep",
    "BertTrainStep",
    "GPTTrainStep",
    "MegatronLMDummyDataLoader",
    "MegatronLMDummyScheduler",
    "T5TrainStep",
    "avg_losses_across_data_parallel_group",
]
