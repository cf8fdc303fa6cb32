"""Plugins and handlers of single engines: FSDP, DeepSpeed, Megatron-LM, quantization, communication hooks."""

from __future__ import annotations
