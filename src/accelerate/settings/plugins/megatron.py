"""`MegatronLMPlugin`: the configuration of Megatron-LM, and a placeholder for its scheduler.

A field left None is read from the launcher's ``MEGATRON_LM_*`` variables and falls back to the plugin's default.
`megatron_lm_default_args` collects all of them under Megatron's own names; Megatron is never imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..env_defaults import resolve
from .megatron_models import network_arguments

if TYPE_CHECKING:
    import torch

# Field (the launcher's option without its prefix) -> Megatron's argument, and the default.
_LAUNCHED: dict[str, tuple[str, Any]] = {
    "tp_degree": ("tensor_model_parallel_size", 1),
    "pp_degree": ("pipeline_model_parallel_size", 1),
    "num_micro_batches": ("num_micro_batches", 1),
    "gradient_clipping": ("clip_grad", 1.0),
    "sequence_parallelism": ("sequence_parallel", False),
    "recompute_activations": ("recompute_activations", False),
    "recompute_granularity": ("recompute_granularity", "full"),
    "recompute_method": ("recompute_method", "uniform"),
    "recompute_num_layers": ("recompute_num_layers", 1),
    "use_distributed_optimizer": ("use_distributed_optimizer", False),
    "use_custom_fsdp": ("use_custom_fsdp", False),
    "no_load_optim": ("no_load_optim", False),
    "no_save_optim": ("no_save_optim", False),
    "eod_mask_loss": ("eod_mask_loss", False),
    "optimizer_cpu_offload": ("optimizer_cpu_offload", False),
    "overlap_cpu_optimizer_d2h_h2d": ("overlap_cpu_optimizer_d2h_h2d", False),
    "use_precision_aware_optimizer": ("use_precision_aware_optimizer", False),
    "decoder_last_pipeline_num_layers": ("decoder_last_pipeline_num_layers", None),
    "attention_backend": ("attention_backend", True),
    "attention_dropout": ("attention_dropout", 0.0),
    "attention_softmax_in_fp32": ("attention_softmax_in_fp32", True),
    "hidden_dropout": ("hidden_dropout", 0.0),
    "expert_model_parallel_size": ("expert_model_parallel_size", 1),
    "expert_tensor_parallel_size": ("expert_tensor_parallel_size", 1),
    "context_parallel_size": ("context_parallel_size", 1),
    "calculate_per_token_loss": ("calculate_per_token_loss", True),
    "use_rotary_position_embeddings": ("use_rotary_position_embeddings", True),
}
# Fields passed to Megatron under the same name.
_PASSED_ON = (
    "pipeline_model_parallel_split_rank", "num_layers_per_virtual_pipeline_stage", "consumed_samples",
    "no_wd_decay_cond", "scale_lr_cond", "lr_mult", "megatron_dataset_flag", "eval_iters", "eval_interval",
)  # fmt: skip
_SCHEDULE = (
    "train_iters", "train_samples", "lr_decay_style", "lr_decay_iters", "lr_decay_samples", "min_lr", "lr_warmup_iters",
    "lr_warmup_samples", "lr_warmup_fraction",
)  # fmt: skip
_LOGGING = {
    "tensorboard_log_interval": 1,
    "tensorboard_queue_size": 1000,
    "log_timers_to_tensorboard": True,
    "log_batch_size_to_tensorboard": True,
    "log_memory_to_tensorboard": True,
    "log_world_size_to_tensorboard": True,
    "log_validation_ppl_to_tensorboard": True,
}


@dataclass
class MegatronLMPlugin:
    """Configures Megatron-LM.

    Attributes:
        megatron_lm_default_args: Megatron's arguments.
        DDP_impl: ``local`` or ``torch``: Megatron's data parallelism, or PyTorch's (which supports no pipeline).
        data_parallel_size, micro_batch_size, global_batch_size: Set by `set_training_args`.
        dataset_args: Arguments of Megatron's datasets.

    Raises:
        ValueError: if a value is invalid for Megatron's option.

    Example:
        ```python
        plugin = MegatronLMPlugin(tp_degree=2, pp_degree=2, num_micro_batches=2, other_megatron_args={"fp32_residual": True})
        ```
    """

    tp_degree: int | None = None
    """Degree of tensor parallelism."""
    pp_degree: int | None = None
    """Degree of pipeline parallelism (stages)."""
    use_custom_fsdp: bool | None = None
    overlap_cpu_optimizer_d2h_h2d: bool | None = None
    no_load_optim: bool | None = None
    eod_mask_loss: bool | None = None
    no_save_optim: bool | None = None
    optimizer_cpu_offload: bool | None = None
    use_precision_aware_optimizer: bool | None = None
    decoder_last_pipeline_num_layers: int | None = None
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    attention_backend: bool | str | None = None
    """Name of the attention implementation, or whether Megatron chooses it."""
    expert_model_parallel_size: int | None = None
    context_parallel_size: int | None = None
    attention_dropout: float | None = None
    hidden_dropout: float | None = None
    attention_softmax_in_fp32: bool | None = None
    expert_tensor_parallel_size: int | None = None
    calculate_per_token_loss: bool | None = None
    use_rotary_position_embeddings: bool | None = None
    num_micro_batches: int | None = None
    """Micro-batches per pipeline step, which is Megatron's gradient accumulation."""
    gradient_clipping: float | None = None
    """Maximum gradient norm; 0 disables clipping."""
    sequence_parallelism: bool | None = None
    recompute_activations: bool | None = None
    """Whether to recompute the memory-intensive parts of attention (selective recomputation)."""
    use_distributed_optimizer: bool | None = None
    pipeline_model_parallel_split_rank: int | None = None
    """The first pipeline stage of the decoder."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    is_train_batch_min: bool | str = True
    """Whether, with several loaders, the smallest batch size sets the micro-batch size instead of the largest."""
    train_iters: int | None = None
    train_samples: int | None = None
    weight_decay_incr_style: str = "constant"
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    lr_decay_style: str = "linear"
    lr_decay_iters: int | None = None
    lr_decay_samples: int | None = None
    lr_warmup_iters: int | None = None
    lr_warmup_samples: int | None = None
    lr_warmup_fraction: float | None = None
    min_lr: float = 0
    consumed_samples: list[int] | None = None
    no_wd_decay_cond: Callable[..., bool] | None = None
    scale_lr_cond: Callable[..., bool] | None = None
    lr_mult: float = 1.0
    megatron_dataset_flag: bool = False
    """Whether data comes from Megatron's indexed datasets."""
    seq_length: int | None = None
    encoder_seq_length: int | None = None
    decoder_seq_length: int | None = None
    tensorboard_dir: str | None = None
    set_all_logging_options: bool = False
    """Whether to write all of Megatron's metrics to `tensorboard_dir`."""
    eval_iters: int = 100
    eval_interval: int = 1000
    return_logits: bool = False
    """Whether a GPT model returns logits in addition to the loss, on the last stage."""
    custom_train_step_class: Any = None
    custom_train_step_kwargs: dict[str, Any] | None = None
    custom_model_provider_function: Callable[..., Any] | None = None
    custom_prepare_model_function: Callable[..., Any] | None = None
    custom_megatron_datasets_provider_function: Callable[..., Any] | None = None
    custom_get_batch_function: Callable[..., Any] | None = None
    custom_loss_function: Callable[..., Any] | None = None
    other_megatron_args: dict[str, Any] | None = None
    """Additional arguments of Megatron, which take precedence over all fields."""

    def __post_init__(self) -> None:
        for name, (_, default) in _LAUNCHED.items():
            setattr(self, name, resolve(getattr(self, name), name, f"megatron_lm_{name}", default))
        if self.attention_backend in ("true", "false"):
            self.attention_backend = self.attention_backend == "true"
        # PyTorch's DDP supports neither pipeline stages nor a distributed optimizer.
        local = self.pp_degree != 1 or self.use_distributed_optimizer
        self.DDP_impl = "local" if local else "torch"
        if self.consumed_samples is not None:  # of training, validation and test
            self.consumed_samples = [*self.consumed_samples, 0, 0, 0][:3]
        self.data_parallel_size: int | None = None
        self.micro_batch_size: int | None = None
        self.global_batch_size: int | None = None
        self.dataset_args: dict[str, Any] = {}
        arguments = {theirs: getattr(self, name) for name, (theirs, _) in _LAUNCHED.items()}
        arguments |= {name: getattr(self, name) for name in _PASSED_ON}
        self.megatron_lm_default_args: dict[str, Any] = {**arguments, "DDP_impl": self.DDP_impl}
        if self.tensorboard_dir is not None:
            self.megatron_lm_default_args["tensorboard_dir"] = self.tensorboard_dir
        if self.set_all_logging_options:
            self.set_tensorboard_logging_options()
        self.megatron_lm_default_args.update(self.other_megatron_args or {})

    def set_network_size_args(self, model: torch.nn.Module, batch_data: Any = None) -> None:
        """Sets Megatron's model arguments from a transformers model.

        Args:
            model: A Megatron-BERT, GPT-2, T5 or Llama model.
            batch_data: A batch, for sequence lengths that no field sets.

        Raises:
            ValueError: if the architecture is another one.
        """
        lengths = (self.seq_length, self.encoder_seq_length, self.decoder_seq_length)
        self.megatron_lm_default_args |= network_arguments(model, lengths, batch_data)
        if self.megatron_lm_default_args["model_type_name"] == "gpt":
            self.megatron_lm_default_args["return_logits"] = self.return_logits

    def set_mixed_precision(self, mixed_precision: str) -> None:
        """Sets Megatron's precision: ``fp16``, ``bf16``, or float32 for any other value."""
        if mixed_precision in ("fp16", "bf16"):
            self.megatron_lm_default_args[mixed_precision] = True
        if mixed_precision == "bf16":  # gradients are accumulated in float32
            self.megatron_lm_default_args["accumulate_allreduce_grads_in_fp32"] = True

    def set_training_args(self, micro_batch_size: int, dp_degree: int) -> None:
        """Sets the batch sizes and the degree of data parallelism.

        Args:
            micro_batch_size: Samples per micro-batch and replica.
            dp_degree: Number of model replicas.
        """
        self.data_parallel_size = dp_degree
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = dp_degree * micro_batch_size * (self.num_micro_batches or 1)
        for name in ("data_parallel_size", "micro_batch_size", "global_batch_size"):
            self.megatron_lm_default_args[name] = getattr(self, name)

    def set_optimizer_type(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets Megatron's optimizer arguments to those of an equivalent optimizer.

        Raises:
            ValueError: if `optimizer` is neither SGD nor of the Adam family.
        """
        name, chosen = type(optimizer).__name__.lower(), optimizer.defaults
        if "adam" in name:
            own = {"optimizer": "adam", "adam_eps": chosen["eps"]}
            own["adam_beta1"], own["adam_beta2"] = chosen["betas"]
        elif "sgd" in name:
            own = {"optimizer": "sgd", "sgd_momentum": chosen["momentum"]}
        else:
            raise ValueError(f"Megatron-LM has Adam and SGD, but no {type(optimizer).__name__}: use one of these.")
        decay = chosen["weight_decay"]
        self.megatron_lm_default_args |= {
            **own,
            "lr": chosen["lr"],
            "weight_decay": decay,
            "weight_decay_incr_style": self.weight_decay_incr_style,
            "start_weight_decay": decay if self.start_weight_decay is None else self.start_weight_decay,
            "end_weight_decay": decay if self.end_weight_decay is None else self.end_weight_decay,
        }

    def set_scheduler_args(self, scheduler: Any) -> None:
        """Sets lengths of training and warm-up that no field sets, from a `MegatronLMDummyScheduler`.

        Raises:
            ValueError: if `scheduler` is another scheduler; Megatron's optimizer works only with its own.
        """
        if not isinstance(scheduler, MegatronLMDummyScheduler):
            raise ValueError(
                f"Megatron-LM has a scheduler of its own: pass a MegatronLMDummyScheduler instead of "
                f"{type(scheduler).__name__}."
            )
        if self.train_iters is None and self.train_samples is None:
            self.train_iters = scheduler.total_num_steps
        if self.train_samples is not None and self.lr_warmup_samples is None:
            self.lr_warmup_samples = scheduler.warmup_num_steps
        elif self.train_samples is None and self.lr_warmup_iters is None and self.lr_warmup_fraction is None:
            self.lr_warmup_iters = scheduler.warmup_num_steps
        self.megatron_lm_default_args |= {name: getattr(self, name) for name in _SCHEDULE}

    def set_tensorboard_logging_options(self) -> None:
        """Enables all of Megatron's metrics."""
        self.megatron_lm_default_args |= _LOGGING


class MegatronLMDummyScheduler:
    """Placeholder for Megatron-LM's own scheduler.

    Args:
        optimizer: The scheduled optimizer.
        total_num_steps: Total number of optimizer steps.
        warmup_num_steps: Steps of the linear warm-up.
        **kwargs: Stored, for scripts that pass more.
    """

    def __init__(
        self, optimizer: Any, total_num_steps: int | None = None, warmup_num_steps: int = 0, **kwargs: Any
    ) -> None:
        self.optimizer = optimizer
        self.total_num_steps = total_num_steps
        self.warmup_num_steps = warmup_num_steps
        self.kwargs = kwargs
