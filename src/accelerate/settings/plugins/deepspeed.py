"""`DeepSpeedPlugin`: the configuration of DeepSpeed, by fields or by DeepSpeed's own format, and dummy objects.

Constructing a plugin does not need DeepSpeed; methods that do import it when called. A field left None is read from the
launcher's variables. ``"auto"`` values of DeepSpeed's configuration are filled in from the fields, the rest by ``prepare``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .. import env
from ..env_defaults import resolve, variable
from .deepspeed_config import HfDeepSpeedConfig

if TYPE_CHECKING:
    import torch

AUTO = "auto"


class _Field(NamedTuple):
    """A plugin field with a counterpart in DeepSpeed's configuration: the key there, and the default."""

    key: str
    default: Any


# Named like the launcher's options.
_FIELDS = {
    "gradient_accumulation_steps": _Field("gradient_accumulation_steps", AUTO),
    "gradient_clipping": _Field("gradient_clipping", AUTO),
    "zero_stage": _Field("zero_optimization.stage", 2),
    "offload_optimizer_device": _Field("zero_optimization.offload_optimizer.device", "none"),
    "offload_param_device": _Field("zero_optimization.offload_param.device", "none"),
    "zero3_save_16bit_model": _Field("zero_optimization.stage3_gather_16bit_weights_on_model_save", False),
    "offload_optimizer_nvme_path": _Field("zero_optimization.offload_optimizer.nvme_path", "none"),
    "offload_param_nvme_path": _Field("zero_optimization.offload_param.nvme_path", "none"),
}
_PRECISIONS = ("fp16", "bf16")
# Keys that `deepspeed.zero.Init` reads when a model is built, before `prepare` fills them in -> a value without effect on
# it; None: omit the key.
_ZERO_INIT_VALUES = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "train_batch_size": None,
    "gradient_clipping": None,
    "zero_optimization.reduce_bucket_size": None,
    "zero_optimization.stage3_prefetch_bucket_size": None,
    "zero_optimization.stage3_param_persistence_threshold": None,
    "zero_optimization.stage3_max_live_parameters": None,
    "zero_optimization.stage3_max_reuse_distance": None,
}


@dataclass
class DeepSpeedPlugin:
    """Configures DeepSpeed.

    Attributes:
        deepspeed_config: The configuration passed to DeepSpeed.
        dschf: transformers' `HfDeepSpeedConfig`, kept alive because transformers holds a weak reference; or None.

    Raises:
        ValueError: if a value is unknown, or DeepSpeed's configuration contradicts other settings.

    Example:
        ```python
        plugin = DeepSpeedPlugin(zero_stage=3, gradient_accumulation_steps=2)
        accelerator = Accelerator(deepspeed_plugin=plugin)
        ```
    """

    hf_ds_config: Any = None
    """DeepSpeed's configuration: a path, a mapping, or an `HfDeepSpeedConfig`; converted to the latter."""
    gradient_accumulation_steps: int | str | None = None
    """Micro-batches per optimizer step; ``"auto"``: `Accelerator`'s setting."""
    gradient_clipping: float | str | None = None
    """Maximum gradient norm; ``"auto"``: the training loop's."""
    zero_stage: int | None = None
    """ZeRO stage. 0: nothing is partitioned; 1: optimizer states; 2 (the default): gradients too; 3: parameters too."""
    is_train_batch_min: bool = True
    """Whether the smallest batch size of several loaders, not the largest, sets ``train_micro_batch_size_per_gpu``."""
    offload_optimizer_device: str | None = None
    """Device to which optimizer states are offloaded: ``none`` (the default), ``cpu``, ``nvme``."""
    offload_param_device: str | None = None
    """Device to which parameters are offloaded in stage 3: ``none`` (the default), ``cpu``, ``nvme``."""
    offload_optimizer_nvme_path: str | None = None
    """NVMe folder for optimizer states."""
    offload_param_nvme_path: str | None = None
    """NVMe folder for parameters."""
    zero3_init_flag: bool | None = None
    """Whether models are built under ``deepspeed.zero.Init``; applies to stage 3, where it is the default."""
    zero3_save_16bit_model: bool | None = None
    """Whether to gather 16-bit weights for saving in stage 3; False."""
    transformer_moe_cls_names: str | None = None
    """Class names of mixture-of-experts layers, separated by commas."""
    enable_msamp: bool | None = None
    """Whether to train in fp8 with MS-AMP; False."""
    msamp_opt_level: Literal["O1", "O2"] | None = None
    """Optimization level of MS-AMP; O1 by default."""

    def __post_init__(self) -> None:
        self._selected = False
        self.dschf: Any = None
        explicit = {name: self._explicit(name) for name in _FIELDS}  # by an argument or a variable; None: unset
        source = self.hf_ds_config
        if source is None:
            source = resolve(None, "hf_ds_config", "deepspeed_config_file")
        if source in (None, "none"):
            self.hf_ds_config = HfDeepSpeedConfig({})
            self._write_fields(explicit)
        else:
            self.hf_ds_config = source if hasattr(source, "config") else HfDeepSpeedConfig(source)
            self._merge_fields(explicit)
        self.deepspeed_config: dict[str, Any] = self.hf_ds_config.config
        self.deepspeed_config["steps_per_print"] = float("inf")  # the training loop reports, not the engine
        self.deepspeed_config.setdefault("zero_allow_untested_optimizer", True)
        self.hf_ds_config.set_stage_and_offload()
        self.zero3_init_flag = resolve(self.zero3_init_flag, "zero3_init_flag", "zero3_init_flag", self.zero_stage == 3)
        if self.transformer_moe_cls_names is None:
            self.transformer_moe_cls_names = variable("deepspeed_moe_layer_cls_names")
        self._resolve_msamp()

    def _explicit(self, name: str) -> Any:
        given = getattr(self, name)
        if AUTO in (given, variable(name) if given is None else None):
            return AUTO
        return resolve(given, name, name, None)

    def _write_fields(self, explicit: dict[str, Any]) -> None:
        """Builds DeepSpeed's configuration from the fields."""
        self.hf_ds_config.config.update(train_batch_size=AUTO, train_micro_batch_size_per_gpu=AUTO)
        for name, field in _FIELDS.items():
            value = field.default if explicit[name] is None else explicit[name]
            setattr(self, name, value)
            if not name.endswith("nvme_path") or value != "none":
                self.hf_ds_config.set_value(field.key, value)
        for what in ("optimizer", "param"):
            device, path = getattr(self, f"offload_{what}_device"), getattr(self, f"offload_{what}_nvme_path")
            if device == "nvme" and path == "none":
                raise ValueError(
                    f"offload_{what}_device='nvme' needs a folder on NVMe: set offload_{what}_nvme_path "
                    f"(--offload_{what}_nvme_path)."
                )

    def _merge_fields(self, explicit: dict[str, Any]) -> None:
        """Fills the fields into missing and ``"auto"`` keys of DeepSpeed's configuration, and reads all fields back."""
        config = self.hf_ds_config
        self._reject_ignored()
        mismatches = []
        for name, field in _FIELDS.items():
            there = config.get_value(field.key)
            if there == AUTO:
                there = field.default if explicit[name] is None else explicit[name]
            elif there is None:
                there = explicit[name]
            elif explicit[name] not in (None, AUTO, there):
                mismatches.append(f"{name}={explicit[name]!r}, but {field.key} is {there!r}")
            if name.endswith("nvme_path") and there == "none":
                config.del_config_sub_tree(field.key)
            elif there is not None:
                config.set_value(field.key, there)
            # Unset in both: DeepSpeed's own default, which is one micro-batch, no partitioning and no clipping.
            own = {"gradient_accumulation_steps": 1, "zero_stage": 0, "gradient_clipping": 0.0}.get(name, field.default)
            setattr(self, name, own if there is None else there)
        _raise_mismatches(mismatches)
        config.config.setdefault("gradient_accumulation_steps", self.gradient_accumulation_steps)

    def _reject_ignored(self) -> None:
        """Raises if the launcher's configuration file sets fields that DeepSpeed's configuration decides."""
        written = (env.get("ACCELERATE_CONFIG_DS_FIELDS") or "").split(",")
        ignored = [name for name, field in _FIELDS.items() if name in written and not self.is_auto(field.key)]
        if not ignored:
            return
        if any(
            self.hf_ds_config.is_true(f"{name}.enabled") and not self.is_auto(f"{name}.enabled") for name in _PRECISIONS
        ):
            ignored.append("mixed_precision")
        raise ValueError(
            "When using `deepspeed_config_file`, the following accelerate config variables will be ignored:\n"
            f"{ignored}.\n"
            "Please specify them appropriately in the DeepSpeed config file.\n"
            "If you are using an accelerate config file, remove other config variables mentioned in the above specified "
            "list.\n"
            "The easiest method is to create a new config following the questionnaire via `accelerate config`.\n"
            "It will only ask for the necessary config variables when using `deepspeed_config_file`."
        )

    def _resolve_msamp(self) -> None:
        own = self.hf_ds_config.get_value("msamp.enabled", False)
        self.enable_msamp = bool(own) if self.enable_msamp is None else self.enable_msamp
        if not self.enable_msamp:
            return
        if self.zero_stage == 3:
            raise ValueError("enable_msamp=True goes with ZeRO stages 1 and 2: MS-AMP does not work with zero_stage=3.")
        level = self.hf_ds_config.get_value("msamp.opt_level")
        self.msamp_opt_level = resolve(self.msamp_opt_level or level, "msamp_opt_level", "fp8_opt_level", "O1")
        self.deepspeed_config["msamp"] = {"enabled": True, "opt_level": self.msamp_opt_level}

    # DeepSpeed's configuration ---------------------------------------------------------------------------------------

    def is_auto(self, ds_key_long: str) -> bool:
        """Returns whether a key (``"zero_optimization.stage"``) is ``"auto"``."""
        return bool(self.hf_ds_config.get_value(ds_key_long) == AUTO)

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """Returns the value of a key, or `default` if it is missing."""
        return self.hf_ds_config.get_value(ds_key_long, default)

    def fill_match(
        self, ds_key_long: str, mismatches: list[str] | None = None, must_match: bool = True, **kwargs: Any
    ) -> None:
        """Fills in one ``"auto"``, or compares an existing value.

        Args:
            ds_key_long: The dotted key.
            mismatches: Receives a line for a value that does not match.
            must_match: Whether to compare existing values.
            **kwargs: Values by dotted key.

        Raises:
            ValueError: if the value is ``"auto"`` and `kwargs` does not have the key.
        """
        node, last = self.hf_ds_config.find_config_node(ds_key_long)
        if node is None or last not in node:
            return
        if node[last] == AUTO:
            if ds_key_long not in kwargs:
                raise ValueError(
                    f"{ds_key_long} is 'auto' in the DeepSpeed configuration, and no argument or loader determines it: "
                    "write a value instead."
                )
            node[last] = kwargs[ds_key_long]
        elif must_match and ds_key_long in kwargs and node[last] != kwargs[ds_key_long] and mismatches is not None:
            mismatches.append(f"{ds_key_long} is {node[last]!r}, but {kwargs[ds_key_long]!r} follows from the rest")

    def deepspeed_config_process(
        self,
        prefix: str = "",
        mismatches: list[str] | None = None,
        config: dict[str, Any] | None = None,
        must_match: bool = True,
        **kwargs: Any,
    ) -> None:
        """Fills in every ``"auto"`` and compares existing values.

        Args:
            prefix: The parents of `config`, each followed by a dot.
            mismatches: Receives a line for each value that does not match; the outermost call raises them.
            config: A sub-tree of the configuration; None: all of it.
            must_match: Whether to compare existing values.
            **kwargs: Values by dotted key.

        Raises:
            ValueError: if an ``"auto"`` has no value, or values do not match.
        """
        found = [] if mismatches is None else mismatches
        for key, value in list((self.deepspeed_config if config is None else config).items()):
            if isinstance(value, dict):
                self.deepspeed_config_process(f"{prefix}{key}.", found, value, must_match, **kwargs)
            else:
                self.fill_match(prefix + key, found, must_match, **kwargs)
        if mismatches is None:
            _raise_mismatches(found)
            self.hf_ds_config.set_stage_and_offload()

    def set_mixed_precision(self, mixed_precision: str) -> None:
        """Sets the mixed precision in DeepSpeed's configuration.

        Args:
            mixed_precision: ``no``, ``fp16``, ``bf16`` or ``fp8``.

        Raises:
            ValueError: if the configuration has another one.
        """
        for name in _PRECISIONS:
            wanted, there = mixed_precision == name, self.get_value(f"{name}.enabled")
            if mixed_precision in _PRECISIONS and there not in (None, AUTO, wanted):
                raise ValueError(
                    f"mixed_precision={mixed_precision!r}, but the DeepSpeed configuration has {name}.enabled = {there!r}. "
                    f"Set it there to {str(wanted).lower()} or 'auto', or leave mixed_precision to it."
                )
        for name in _PRECISIONS:
            wanted = mixed_precision == name
            if self.is_auto(f"{name}.enabled"):
                self.hf_ds_config.set_value(f"{name}.enabled", wanted)
            elif name not in self.deepspeed_config:
                cast = {"auto_cast": True} if wanted and name == "fp16" else {}
                self.deepspeed_config[name] = {"enabled": wanted, **cast}

    @property
    def mixed_precision(self) -> str:
        """Returns the mixed precision of DeepSpeed's configuration: ``fp16``, ``bf16`` or ``no``."""
        return next((name for name in _PRECISIONS if self.get_value(f"{name}.enabled") is True), "no")

    # Building models -------------------------------------------------------------------------------------------------

    def is_zero3_init_enabled(self) -> bool:
        """Returns whether parameters are partitioned while models are built."""
        return bool(self.zero3_init_flag) and self.zero_stage == 3

    def set_deepspeed_weakref(self) -> None:
        """Registers the configuration with transformers, whose ``from_pretrained`` then partitions models as it builds them.

        Raises:
            ImportError: if ``zero3_init_flag`` is in effect and DeepSpeed is not installed.
        """
        self.dschf = None  # ends the registration: transformers holds a weak reference
        if not self.is_zero3_init_enabled() or importlib.util.find_spec("transformers") is None:
            return
        _deepspeed("zero3_init_flag")
        config = HfDeepSpeedConfig(self.deepspeed_config)
        for key, value in _ZERO_INIT_VALUES.items():
            if config.get_value(key) == AUTO:
                config.del_config_sub_tree(key) if value is None else config.set_value(key, value)
        self.dschf = importlib.import_module("transformers.integrations").HfDeepSpeedConfig(config.config)

    @contextmanager
    def zero3_init_context_manager(self, enable: bool = False) -> Iterator[None]:
        """Context manager that turns `zero3_init_flag` on or off."""
        before = self.zero3_init_flag
        self.zero3_init_flag = enable
        try:
            self.set_deepspeed_weakref()
            yield
        finally:
            self.zero3_init_flag = before
            self.set_deepspeed_weakref()

    def set_moe_leaf_modules(self, model: torch.nn.Module) -> None:
        """Marks the layers in `transformer_moe_cls_names` as leaf modules of ZeRO stage 3, which are gathered whole.

        Raises:
            ValueError: if the model has no such layer.
            ImportError: if DeepSpeed is not installed.
        """
        if self.zero_stage != 3 or not self.transformer_moe_cls_names:
            return
        here = {type(module).__name__: type(module) for module in model.modules()}
        names = [name.strip() for name in self.transformer_moe_cls_names.split(",")]
        if missing := [name for name in names if name not in here]:
            raise ValueError(
                f"transformer_moe_cls_names: {type(model).__name__} has no {', '.join(missing)}; it is built of "
                f"{', '.join(sorted(here))}."
            )
        _deepspeed("transformer_moe_cls_names")
        utils = importlib.import_module("deepspeed.utils")
        utils.set_z3_leaf_modules(model, [here[name] for name in names])

    # One of several --------------------------------------------------------------------------------------------------

    @property
    def selected(self) -> bool:
        """Returns whether this is the active plugin, of several."""
        return self._selected

    @selected.setter
    def selected(self, value: bool) -> None:
        raise ValueError("`selected` follows from AcceleratorState().select_deepspeed_plugin(name): call that.")

    def select(self, _from_accelerator_state: bool = False) -> None:
        """Activates the plugin; called by `AcceleratorState.select_deepspeed_plugin`.

        Raises:
            ValueError: if called directly, which would leave two plugins active.
        """
        if not _from_accelerator_state:
            raise ValueError("select a DeepSpeed plugin by name: AcceleratorState().select_deepspeed_plugin(name).")
        self._selected = True
        self.set_deepspeed_weakref()

    def _unselect(self) -> None:
        self._selected = False


def _raise_mismatches(mismatches: list[str]) -> None:
    if mismatches:
        raise ValueError(
            "the DeepSpeed configuration contradicts other settings: "
            + "; ".join(mismatches)
            + ". Write 'auto' there, or "
            "leave the other setting out."
        )


def _deepspeed(what: str) -> Any:
    try:
        return importlib.import_module("deepspeed")
    except ImportError as error:
        raise ImportError(
            f'{what} needs DeepSpeed, which is not installed: `pip install "accelerate[deepspeed]"`.'
        ) from error


def get_active_deepspeed_plugin(state: Any) -> DeepSpeedPlugin:
    """Returns the active DeepSpeed plugin.

    Args:
        state: An `AcceleratorState`.

    Raises:
        ValueError: if the run has none.
    """
    plugin = state.deepspeed_plugin
    if not isinstance(plugin, DeepSpeedPlugin):
        raise ValueError("this run has no DeepSpeed plugin: it was started without DeepSpeed.")
    return plugin


class DummyOptim:
    """Placeholder for the optimizer that DeepSpeed's configuration defines.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate, for an ``"auto"`` in the configuration.
        weight_decay: Weight decay, likewise.
        **kwargs: Other such values.
    """

    def __init__(self, params: Any, lr: float = 0.001, weight_decay: float = 0, **kwargs: Any) -> None:
        self.params = params
        self.lr = lr
        self.weight_decay = weight_decay
        self.kwargs = kwargs


class DummyScheduler:
    """Placeholder for the scheduler that DeepSpeed's configuration defines.

    Args:
        optimizer: The scheduled optimizer.
        total_num_steps: Total number of steps, for an ``"auto"`` in the configuration.
        warmup_num_steps: Steps of the warm-up, likewise.
        lr_scheduler_callable: Called with the real optimizer; returns the scheduler to use instead.
        **kwargs: Other such values.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int | None = None,
        warmup_num_steps: int = 0,
        lr_scheduler_callable: Any = None,
        **kwargs: Any,
    ) -> None:
        self.optimizer = optimizer
        self.total_num_steps = total_num_steps
        self.warmup_num_steps = warmup_num_steps
        self.lr_scheduler_callable = lr_scheduler_callable
        self.kwargs = kwargs
