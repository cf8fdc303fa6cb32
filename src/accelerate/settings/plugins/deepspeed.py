"""`DeepSpeedPlugin`: how DeepSpeed is set up, by fields or by its own configuration; and what stands in for its objects.

Made without DeepSpeed installed; what needs DeepSpeed imports it when called. A field left None is read from the
launcher's variables. A value ``"auto"`` of DeepSpeed's configuration is filled in from the fields, the rest on ``prepare``.
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
    """A field of the plugin that DeepSpeed's configuration has too: its key there, and its default."""

    key: str
    default: Any


# Each is named like the launcher's option.
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
# Keys that `deepspeed.zero.Init` reads when a model is built, long before `prepare` can fill them in -> a value that
# changes nothing for it; None: leave the key out.
_WHILE_BUILDING = {
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
    """How DeepSpeed is set up.

    Attributes:
        deepspeed_config: DeepSpeed's configuration as it will be given to it.
        dschf: What keeps transformers' view of the configuration alive, or None.

    Raises:
        ValueError: for unknown values, and where DeepSpeed's configuration and other settings contradict each other.

    Example:
        ```python
        plugin = DeepSpeedPlugin(zero_stage=3, gradient_accumulation_steps=2)
        accelerator = Accelerator(deepspeed_plugin=plugin)
        ```
    """

    hf_ds_config: Any = None
    """DeepSpeed's configuration: a path, a mapping, or an `HfDeepSpeedConfig`, which the field holds afterwards."""
    gradient_accumulation_steps: int | str | None = None
    """Micro-batches per step; ``"auto"``: what `Accelerator` says."""
    gradient_clipping: float | str | None = None
    """The largest norm of the gradient; ``"auto"``: what the training loop says."""
    zero_stage: int | None = None
    """0: nothing is divided, 1: optimizer states, 2 (the default): gradients too, 3: parameters too."""
    is_train_batch_min: bool = True
    """Of several loaders, the smallest batch decides ``train_micro_batch_size_per_gpu``, not the largest."""
    offload_optimizer_device: str | None = None
    """Where optimizer states are kept: ``none`` (the default), ``cpu``, ``nvme``."""
    offload_param_device: str | None = None
    """Where parameters are kept in stage 3: ``none`` (the default), ``cpu``, ``nvme``."""
    offload_optimizer_nvme_path: str | None = None
    """The folder on NVMe for optimizer states."""
    offload_param_nvme_path: str | None = None
    """The folder on NVMe for parameters."""
    zero3_init_flag: bool | None = None
    """Build models under ``deepspeed.zero.Init``; by default in stage 3, and it counts there only."""
    zero3_save_16bit_model: bool | None = None
    """Gather the 16-bit weights for saving in stage 3; False."""
    transformer_moe_cls_names: str | None = None
    """Class names of mixture-of-experts layers, by commas."""
    enable_msamp: bool | None = None
    """Train in fp8 with MS-AMP; False."""
    msamp_opt_level: Literal["O1", "O2"] | None = None
    """What MS-AMP keeps in 8 bits; O1 by default."""

    def __post_init__(self) -> None:
        self._selected = False
        self.dschf: Any = None
        said = {name: self._said(name) for name in _FIELDS}  # by an argument or a variable; None: by nobody
        source = self.hf_ds_config
        if source is None:
            source = resolve(None, "hf_ds_config", "deepspeed_config_file")
        if source in (None, "none"):
            self.hf_ds_config = HfDeepSpeedConfig({})
            self._write_fields(said)
        else:
            self.hf_ds_config = source if hasattr(source, "config") else HfDeepSpeedConfig(source)
            self._merge_fields(said)
        self.deepspeed_config: dict[str, Any] = self.hf_ds_config.config
        self.deepspeed_config["steps_per_print"] = float("inf")  # the training loop reports, not the engine
        self.deepspeed_config.setdefault("zero_allow_untested_optimizer", True)
        self.hf_ds_config.set_stage_and_offload()
        self.zero3_init_flag = resolve(self.zero3_init_flag, "zero3_init_flag", "zero3_init_flag", self.zero_stage == 3)
        if self.transformer_moe_cls_names is None:
            self.transformer_moe_cls_names = variable("deepspeed_moe_layer_cls_names")
        self._resolve_msamp()

    def _said(self, name: str) -> Any:
        given = getattr(self, name)
        if AUTO in (given, variable(name) if given is None else None):
            return AUTO
        return resolve(given, name, name, None)

    def _write_fields(self, said: dict[str, Any]) -> None:
        """DeepSpeed's configuration where there is none of its own."""
        self.hf_ds_config.config.update(train_batch_size=AUTO, train_micro_batch_size_per_gpu=AUTO)
        for name, field in _FIELDS.items():
            value = field.default if said[name] is None else said[name]
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

    def _merge_fields(self, said: dict[str, Any]) -> None:
        """Fills the fields into DeepSpeed's own configuration where that leaves room, and reads them back from it."""
        config = self.hf_ds_config
        self._reject_ignored()
        mismatches = []
        for name, field in _FIELDS.items():
            there = config.get_value(field.key)
            if there == AUTO:
                there = field.default if said[name] is None else said[name]
            elif there is None:
                there = said[name]
            elif said[name] not in (None, AUTO, there):
                mismatches.append(f"{name}={said[name]!r}, but {field.key} is {there!r}")
            if name.endswith("nvme_path") and there == "none":
                config.del_config_sub_tree(field.key)
            elif there is not None:
                config.set_value(field.key, there)
            # What neither says is DeepSpeed's own default: one micro-batch, nothing divided or clipped.
            own = {"gradient_accumulation_steps": 1, "zero_stage": 0, "gradient_clipping": 0.0}.get(name, field.default)
            setattr(self, name, own if there is None else there)
        _raise_mismatches(mismatches)
        config.config.setdefault("gradient_accumulation_steps", self.gradient_accumulation_steps)

    def _reject_ignored(self) -> None:
        """The launcher's configuration file must not say what DeepSpeed's configuration decides."""
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
        """Whether a key (``"zero_optimization.stage"``) is still to be filled in."""
        return bool(self.hf_ds_config.get_value(ds_key_long) == AUTO)

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """The value of a key, or `default` when it is not there."""
        return self.hf_ds_config.get_value(ds_key_long, default)

    def fill_match(
        self, ds_key_long: str, mismatches: list[str] | None = None, must_match: bool = True, **kwargs: Any
    ) -> None:
        """Fills one ``"auto"`` in, or compares a value that is there.

        Args:
            ds_key_long: The key with its parents.
            mismatches: What does not match is added to this list.
            must_match: Compare where there is a value.
            **kwargs: Values by such keys.

        Raises:
            ValueError: when the value is ``"auto"`` and `kwargs` does not have it.
        """
        node, last = self.hf_ds_config.find_config_node(ds_key_long)
        if node is None or last not in node:
            return
        if node[last] == AUTO:
            if ds_key_long not in kwargs:
                raise ValueError(
                    f"{ds_key_long} is 'auto' in the DeepSpeed configuration, but nothing here says what it should be: "
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
        """Fills every ``"auto"`` in, and compares the values that are there.

        Args:
            prefix: The parents of `config`, each followed by a dot.
            mismatches: What does not match is added to this list, and raised by the outermost call.
            config: A part of the configuration; None: all of it.
            must_match: Compare as well.
            **kwargs: Values by keys with their parents.

        Raises:
            ValueError: for an ``"auto"`` that nothing fills, and for values that do not match.
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
        """Says in DeepSpeed's configuration what the run computes in.

        Args:
            mixed_precision: ``no``, ``fp16``, ``bf16`` or ``fp8``.

        Raises:
            ValueError: when the configuration says otherwise.
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
        """What DeepSpeed's configuration computes in: ``fp16``, ``bf16`` or ``no``."""
        return next((name for name in _PRECISIONS if self.get_value(f"{name}.enabled") is True), "no")

    # Building models -------------------------------------------------------------------------------------------------

    def is_zero3_init_enabled(self) -> bool:
        """Whether models are divided while they are built."""
        return bool(self.zero3_init_flag) and self.zero_stage == 3

    def set_deepspeed_weakref(self) -> None:
        """Tells transformers, if it is there, whether ``from_pretrained`` divides models while it builds them.

        Raises:
            ImportError: when it should, and DeepSpeed is not installed.
        """
        self.dschf = None  # transformers looks at it through a weak reference
        if not self.is_zero3_init_enabled() or importlib.util.find_spec("transformers") is None:
            return
        _deepspeed("zero3_init_flag")
        config = HfDeepSpeedConfig(self.deepspeed_config)
        for key, value in _WHILE_BUILDING.items():
            if config.get_value(key) == AUTO:
                config.del_config_sub_tree(key) if value is None else config.set_value(key, value)
        self.dschf = importlib.import_module("transformers.integrations").HfDeepSpeedConfig(config.config)

    @contextmanager
    def zero3_init_context_manager(self, enable: bool = False) -> Iterator[None]:
        """A block in which models are (or are not) divided while they are built."""
        before = self.zero3_init_flag
        self.zero3_init_flag = enable
        try:
            self.set_deepspeed_weakref()
            yield
        finally:
            self.zero3_init_flag = before
            self.set_deepspeed_weakref()

    def set_moe_leaf_modules(self, model: torch.nn.Module) -> None:
        """Tells DeepSpeed that the layers in `transformer_moe_cls_names` are gathered whole in stage 3.

        Raises:
            ValueError: when the model has no such layer.
            ImportError: when DeepSpeed is not installed.
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
        """Whether this is the plugin in use, of several."""
        return self._selected

    @selected.setter
    def selected(self, value: bool) -> None:
        raise ValueError("`selected` follows from AcceleratorState().select_deepspeed_plugin(name): call that.")

    def select(self, _from_accelerator_state: bool = False) -> None:
        """Makes this the plugin in use; `AcceleratorState.select_deepspeed_plugin` calls it.

        Raises:
            ValueError: when anybody else does: the plugin in use until now would not learn of it.
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
    """The DeepSpeed plugin in use.

    Args:
        state: An `AcceleratorState`.

    Raises:
        ValueError: when the run has none.
    """
    plugin = state.deepspeed_plugin
    if not isinstance(plugin, DeepSpeedPlugin):
        raise ValueError("this run has no DeepSpeed plugin: it was started without DeepSpeed.")
    return plugin


class DummyOptim:
    """Stands in for the optimizer that DeepSpeed's configuration describes.

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate, for an ``"auto"`` in the configuration.
        weight_decay: The same.
        **kwargs: Other such values.
    """

    def __init__(self, params: Any, lr: float = 0.001, weight_decay: float = 0, **kwargs: Any) -> None:
        self.params = params
        self.lr = lr
        self.weight_decay = weight_decay
        self.kwargs = kwargs


class DummyScheduler:
    """Stands in for the scheduler that DeepSpeed's configuration describes.

    Args:
        optimizer: The optimizer it belongs to.
        total_num_steps: All steps, for an ``"auto"`` in the configuration.
        warmup_num_steps: The same.
        lr_scheduler_callable: Makes a scheduler of the real optimizer instead.
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
