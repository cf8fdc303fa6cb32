"""Questions about models, and mixed precision as plain functions."""

from __future__ import annotations

from ..precision.helpers import get_grad_scaler, get_mixed_precision_context_manager
from ..runtime.modules import is_peft_model

__all__ = ["get_grad_scaler", "get_mixed_precision_context_manager", "is_peft_model"]
