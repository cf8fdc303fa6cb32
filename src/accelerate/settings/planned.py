"""Placeholders for documented names that this version does not implement.

Libraries import them, and call ``isinstance`` with them, for features that a run does not use: both work (``isinstance``
is False). Instantiating or calling one raises an error that names the feature.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn


class Placeholder:
    """Base of placeholders.

    Attributes:
        feature: The feature that the name belongs to.

    Raises:
        NotImplementedError: when a subclass is instantiated.
    """

    feature: ClassVar[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{cls.__name__} belongs to {cls.feature}.")


def _placeholder(name: str, feature: str) -> Any:
    text = f"A placeholder: {feature}."
    return type(name, (Placeholder,), {"feature": feature, "__doc__": text, "__module__": __name__})


_TRACKERS = (
    "the built-in trackers, which are not part of this version: pass an instance of your own subclass of "
    "accelerate.tracking.GeneralTracker to Accelerator(log_with=...)"
)
AimTracker = _placeholder("AimTracker", _TRACKERS)
ClearMLTracker = _placeholder("ClearMLTracker", _TRACKERS)
CometMLTracker = _placeholder("CometMLTracker", _TRACKERS)
MLflowTracker = _placeholder("MLflowTracker", _TRACKERS)
TensorBoardTracker = _placeholder("TensorBoardTracker", _TRACKERS)
WandBTracker = _placeholder("WandBTracker", _TRACKERS)

_DEEPSPEED = (
    "training with DeepSpeed, which is not part of this version: FSDP shards models too (fsdp_plugin, --use_fsdp)"
)
DeepSpeedEngineWrapper = _placeholder("DeepSpeedEngineWrapper", _DEEPSPEED)
DeepSpeedOptimizerWrapper = _placeholder("DeepSpeedOptimizerWrapper", _DEEPSPEED)
DeepSpeedSchedulerWrapper = _placeholder("DeepSpeedSchedulerWrapper", _DEEPSPEED)

_MEGATRON = (
    "training with Megatron-LM, which is not part of this version: tensor parallelism is there without it "
    "(ParallelismConfig(tp_size=...))"
)
AbstractTrainStep = _placeholder("AbstractTrainStep", _MEGATRON)
BertTrainStep = _placeholder("BertTrainStep", _MEGATRON)
GPTTrainStep = _placeholder("GPTTrainStep", _MEGATRON)
MegatronLMDummyDataLoader = _placeholder("MegatronLMDummyDataLoader", _MEGATRON)
T5TrainStep = _placeholder("T5TrainStep", _MEGATRON)
add_model_config_to_megatron_parser = _placeholder("add_model_config_to_megatron_parser", _MEGATRON)

_FP8 = "mixed precision fp8, which is not part of this version: use bf16"
apply_fp8_autowrap = _placeholder("apply_fp8_autowrap", _FP8)
contextual_fp8_autocast = _placeholder("contextual_fp8_autocast", _FP8)
convert_model = _placeholder("convert_model", _FP8)
convert_model_to_fp8_ao = _placeholder("convert_model_to_fp8_ao", _FP8)
filter_first_and_last_linear_layers = _placeholder("filter_first_and_last_linear_layers", _FP8)
has_ao_layers = _placeholder("has_ao_layers", _FP8)
has_transformer_engine_layers = _placeholder("has_transformer_engine_layers", _FP8)
