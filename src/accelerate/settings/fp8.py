"""Recipes of 8-bit floating point (FP8) training, one per backend: TransformerEngine, MS-AMP, torchao.

A field left None is read from the launcher's ``ACCELERATE_FP8_*`` variables and falls back to the default of the
launcher's option.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import Any, Literal

from . import env
from .env_defaults import default, resolve
from .handlers import KwargsHandler

OptLevel = Literal["O1", "O2"]
FP8Format = Literal["HYBRID", "E4M3", "E5M2"]
AmaxComputeAlgorithm = Literal["max", "most_recent"]
Backend = Literal["MSAMP", "TE"]

# field -> the launcher's option
_TE_OPTIONS = {
    "use_autocast_during_eval": "fp8_use_autocast_during_eval",
    "margin": "fp8_margin",
    "interval": "fp8_interval",
    "fp8_format": "fp8_format",
    "amax_history_len": "fp8_amax_history_len",
    "amax_compute_algo": "fp8_amax_compute_algo",
    "override_linear_precision": "fp8_override_linear_precision",
    "use_mxfp8_block_scaling": "fp8_use_mxfp8_block_scaling",
}


@dataclass
class TERecipeKwargs(KwargsHandler):
    """The recipe for NVIDIA's TransformerEngine.

    Example:
        ```python
        accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[TERecipeKwargs(fp8_format="HYBRID")])
        ```
    """

    use_autocast_during_eval: bool | None = None
    """Compute in fp8 in evaluation too; False (the default) usually measures better."""
    margin: int | None = None
    """Margin of the scaling factor; 0."""
    interval: int | None = None
    """Steps between two computations of the scaling factor; 1."""
    fp8_format: FP8Format | None = None
    """``HYBRID`` (the default: E4M3 forward, E5M2 backward), ``E4M3`` or ``E5M2``."""
    amax_history_len: int | None = None
    """Length of the amax history that the scaling factor is computed from, in steps; 1024."""
    amax_compute_algo: AmaxComputeAlgorithm | None = None
    """``most_recent`` (the default) or ``max`` of that history."""
    override_linear_precision: tuple[bool, bool, bool] | None = None
    """Compute forward, data-gradient and weight-gradient GEMMs in higher precision; one bool applies to all three."""
    use_mxfp8_block_scaling: bool | None = None
    """Use MXFP8 block scaling, on devices that support it."""

    def __post_init__(self) -> None:
        if self.override_linear_precision is None:
            parts = [env.flag(f"ACCELERATE_FP8_OVERRIDE_{name}") for name in ("FPROP", "DGRAD", "WGRAD")]
            self.override_linear_precision = (parts[0], parts[1], parts[2])
        for name, option in _TE_OPTIONS.items():
            setattr(self, name, resolve(getattr(self, name), name, option))

    def _defaults(self) -> dict[str, Any]:
        # The launcher's defaults, not the variables': a value set by a variable counts as changed.
        return {name: default(option) for name, option in _TE_OPTIONS.items()}


@dataclass
class MSAMPRecipeKwargs(KwargsHandler):
    """The recipe for MS-AMP."""

    opt_level: OptLevel | None = None
    """``O1``: weight gradients and their reduction in fp8; ``O2`` (the default): optimizer states as well."""

    def __post_init__(self) -> None:
        self.opt_level = resolve(self.opt_level, "opt_level", "fp8_opt_level")

    def _defaults(self) -> dict[str, Any]:
        return {"opt_level": default("fp8_opt_level")}


@dataclass
class FP8RecipeKwargs(TERecipeKwargs, MSAMPRecipeKwargs):
    """The recipe of the backend named by `backend`; `TERecipeKwargs` and `MSAMPRecipeKwargs` have the fields of one each.

    Example:
        ```python
        recipe = FP8RecipeKwargs(backend="msamp", optimization_level="O2")
        accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[recipe])
        ```
    """

    backend: Backend | None = None
    """``MSAMP`` or ``TE``, case-insensitive. None: the launcher's, else MS-AMP if it is installed, else TE."""
    optimization_level: InitVar[OptLevel | None] = None
    """Alias of `opt_level`."""

    def __post_init__(self, optimization_level: OptLevel | None) -> None:
        if optimization_level is not None:
            if self.opt_level not in (None, optimization_level):
                raise ValueError(
                    f"opt_level={self.opt_level!r} and optimization_level={optimization_level!r} are two names of one "
                    "setting: give one of them."
                )
            self.opt_level = optimization_level
        self.backend = self._backend()
        TERecipeKwargs.__post_init__(self)
        MSAMPRecipeKwargs.__post_init__(self)

    def _backend(self) -> Backend:
        named = resolve(self.backend, "backend", "fp8_backend")
        if named is None:
            return "MSAMP" if importlib.util.find_spec("msamp") is not None else "TE"
        if named == "ao":
            raise ValueError("FP8RecipeKwargs takes the backends 'te' and 'msamp'; for torchao pass AORecipeKwargs().")
        return "TE" if named == "te" else "MSAMP"

    def _defaults(self) -> dict[str, Any]:
        return {**TERecipeKwargs._defaults(self), **MSAMPRecipeKwargs._defaults(self)}


@dataclass
class AORecipeKwargs(KwargsHandler):
    """The recipe for torchao's float8 training.

    Raises:
        ImportError: if torchao is not installed.
        ValueError: if both `config` and a field that is part of it are given.
    """

    config: Any = None
    """torchao's own `Float8LinearConfig`; None builds one from the fields below."""
    module_filter_func: Callable[..., bool] | None = None
    """Called with a module and its FQN; returns whether to convert it. None: all linear layers but the first and last."""
    pad_inner_dim: bool | None = None
    """Pad the inner dimension to a multiple of 16, as fp8 GEMMs need; True."""
    enable_fsdp_float8_all_gather: bool | None = None
    """All-gather weights in fp8 under FSDP2; True."""

    def __post_init__(self) -> None:
        try:
            float8 = importlib.import_module("torchao.float8")
        except ImportError as error:
            raise ImportError("AORecipeKwargs needs torchao 0.6.1 or later: `pip install torchao`.") from error
        if self.config is not None:
            parts = {
                "pad_inner_dim": self.pad_inner_dim,
                "enable_fsdp_float8_all_gather": self.enable_fsdp_float8_all_gather,
            }
            both = [name for name, value in parts.items() if value is not None]
            if both:
                raise ValueError(
                    f"config comes with {' and '.join(both)}: set that on the config, or leave config out."
                )
            self.pad_inner_dim = self.config.pad_inner_dim
            self.enable_fsdp_float8_all_gather = self.config.enable_fsdp_float8_all_gather
            return
        for name in ("pad_inner_dim", "enable_fsdp_float8_all_gather"):
            setattr(self, name, resolve(getattr(self, name), name, f"fp8_{name}"))
        self.config = float8.Float8LinearConfig(
            pad_inner_dim=self.pad_inner_dim, enable_fsdp_float8_all_gather=self.enable_fsdp_float8_all_gather
        )
