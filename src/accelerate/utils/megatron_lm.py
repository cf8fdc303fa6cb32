"""Megatron-LM: what stands in for its objects."""

from __future__ import annotations

from ..settings.megatron import MegatronLMDummyScheduler

__all__ = ["MegatronLMDummyScheduler"]
