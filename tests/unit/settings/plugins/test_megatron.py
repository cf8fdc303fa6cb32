"""The plugin of Megatron-LM: its fields, and what they become among Megatron's arguments. Needs no Megatron."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from accelerate.utils import MegatronLMDummyScheduler, MegatronLMPlugin


def like(**config: object) -> nn.Module:
    model = nn.Module()
    model.config = types.SimpleNamespace(**config)
    return model


def test_defaults():
    plugin = MegatronLMPlugin()
    assert (plugin.tp_degree, plugin.pp_degree, plugin.num_micro_batches, plugin.gradient_clipping) == (1, 1, 1, 1.0)
    assert plugin.context_parallel_size == 1 and plugin.attention_backend is True and plugin.DDP_impl == "torch"
    arguments = plugin.megatron_lm_default_args
    assert arguments["tensor_model_parallel_size"] == 1 and arguments["clip_grad"] == 1.0
    assert arguments["eval_iters"] == 100 and "tensorboard_dir" not in arguments


def test_an_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("MEGATRON_LM_TP_DEGREE", "4")
    monkeypatch.setenv("MEGATRON_LM_SEQUENCE_PARALLELISM", "True")
    plugin = MegatronLMPlugin(pp_degree=2)
    assert (plugin.tp_degree, plugin.sequence_parallelism, plugin.DDP_impl) == (4, True, "local")
    assert MegatronLMPlugin(tp_degree=2).megatron_lm_default_args["tensor_model_parallel_size"] == 2
    with pytest.raises(ValueError, match="recompute_method: expected one of uniform, block"):
        MegatronLMPlugin(recompute_method="zz")


def test_more_arguments_overrule_the_rest():
    plugin = MegatronLMPlugin(
        tensorboard_dir="runs", set_all_logging_options=True, consumed_samples=[5], other_megatron_args={"lr_mult": 2.0}
    )
    arguments = plugin.megatron_lm_default_args
    assert (
        arguments["lr_mult"] == 2.0
        and arguments["log_memory_to_tensorboard"]
        and arguments["tensorboard_dir"] == "runs"
    )
    assert plugin.consumed_samples == [5, 0, 0]


def test_batches_and_precision():
    plugin = MegatronLMPlugin(num_micro_batches=4)
    plugin.set_training_args(micro_batch_size=3, dp_degree=2)
    assert plugin.global_batch_size == plugin.megatron_lm_default_args["global_batch_size"] == 24
    plugin.set_mixed_precision("bf16")
    assert (
        plugin.megatron_lm_default_args["bf16"]
        and plugin.megatron_lm_default_args["accumulate_allreduce_grads_in_fp32"]
    )
    assert "fp16" not in plugin.megatron_lm_default_args


def test_optimizers():
    weights = [nn.Parameter(torch.zeros(1))]
    plugin = MegatronLMPlugin(end_weight_decay=0.5)
    plugin.set_optimizer_type(torch.optim.AdamW(weights, lr=0.1, betas=(0.8, 0.9), weight_decay=0.2))
    arguments = plugin.megatron_lm_default_args
    assert (arguments["optimizer"], arguments["adam_beta1"], arguments["lr"]) == ("adam", 0.8, 0.1)
    assert (arguments["start_weight_decay"], arguments["end_weight_decay"]) == (0.2, 0.5)
    plugin.set_optimizer_type(torch.optim.SGD(weights, lr=0.1, momentum=0.7))
    assert (plugin.megatron_lm_default_args["optimizer"], plugin.megatron_lm_default_args["sgd_momentum"]) == (
        "sgd",
        0.7,
    )
    with pytest.raises(ValueError, match="but no Rprop"):
        plugin.set_optimizer_type(torch.optim.Rprop(weights))


def test_schedulers():
    plugin = MegatronLMPlugin()
    plugin.set_scheduler_args(MegatronLMDummyScheduler(None, total_num_steps=100, warmup_num_steps=10))
    assert (plugin.train_iters, plugin.lr_warmup_iters) == (100, 10)
    assert plugin.megatron_lm_default_args["train_iters"] == 100
    plugin = MegatronLMPlugin(train_samples=640)
    plugin.set_scheduler_args(MegatronLMDummyScheduler(None, total_num_steps=100, warmup_num_steps=10))
    assert (plugin.train_iters, plugin.lr_warmup_iters, plugin.lr_warmup_samples) == (None, None, 10)
    with pytest.raises(ValueError, match="pass a MegatronLMDummyScheduler instead of object"):
        plugin.set_scheduler_args(object())


def test_models():
    plugin = MegatronLMPlugin(return_logits=True)
    gpt = like(
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_positions=32,
        vocab_size=99,
    )
    plugin.set_network_size_args(gpt)
    arguments = plugin.megatron_lm_default_args
    wanted = {"model_type_name": "gpt", "hidden_size": 8, "num_layers": 2, "seq_length": 32, "pretraining_flag": True}
    assert wanted.items() <= arguments.items() and arguments["return_logits"]
    t5 = like(
        model_type="mt5", d_model=8, num_layers=2, num_decoder_layers=3, num_heads=2, d_kv=4, d_ff=16, vocab_size=9
    )
    batch = {"input_ids": torch.zeros(2, 5), "labels": torch.zeros(2, 3)}
    plugin.set_network_size_args(t5, batch)
    wanted = {"model_type_name": "t5", "encoder_seq_length": 5, "decoder_seq_length": 3, "decoder_num_layers": 3}
    assert wanted.items() <= plugin.megatron_lm_default_args.items()
    with pytest.raises(ValueError, match="no model like 'vit': it has megatron-bert, gpt2"):
        plugin.set_network_size_args(like(model_type="vit"))
