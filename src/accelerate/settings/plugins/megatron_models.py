"""Megatron-LM's model arguments, derived from a transformers model by one table per architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

Lengths = tuple[int | None, int | None, int | None]
"""Sequence lengths: of a decoder-only or encoder-only model, of the encoder, of the decoder; None: unknown."""


class _Kind(NamedTuple):
    """An architecture.

    Attributes:
        name: Megatron's name of it.
        class_word: A word in the names of transformers' classes for pre-training.
        arguments: Megatron's argument -> the attribute of the transformers configuration.
        fixed: Other arguments.
    """

    name: str
    class_word: str
    arguments: dict[str, str]
    fixed: dict[str, Any]


_COMMON = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "orig_vocab_size": "vocab_size",
}
_GPT = {
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "orig_vocab_size": "vocab_size",
}
_T5 = {
    "hidden_size": "d_model",
    "encoder_num_layers": "num_layers",
    "decoder_num_layers": "num_decoder_layers",
    "num_attention_heads": "num_heads",
    "kv_channels": "d_kv",
    "ffn_hidden_size": "d_ff",
    "max_position_embeddings": "n_positions",
    "relative_attention_num_buckets": "relative_attention_num_buckets",
    "orig_vocab_size": "vocab_size",
}
_LLAMA = {**_COMMON, "ffn_hidden_size": "intermediate_size", "num_query_groups": "num_key_value_heads"}
_KINDS = {
    "megatron-bert": _Kind("bert", "pretraining", _COMMON, {}),
    "gpt2": _Kind("gpt", "lmheadmodel", _GPT, {}),
    "t5": _Kind("t5", "conditionalgeneration", _T5, {}),
    "mt5": _Kind("t5", "conditionalgeneration", _T5, {}),
    "llama": _Kind("gpt", "causallm", _LLAMA, {"swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False}),
}


def network_arguments(model: torch.nn.Module, lengths: Lengths, batch: Any = None) -> dict[str, Any]:
    """Returns Megatron's arguments for an equivalent model.

    Args:
        model: A transformers model.
        lengths: Configured sequence lengths.
        batch: A batch with ``input_ids`` (and ``labels``) of shape (batch, sequence), for lengths that are not configured.

    Raises:
        ValueError: if the architecture has no table.
    """
    config: Any = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", type(model).__name__)).lower()
    kind = _KINDS.get(model_type)
    if kind is None:
        raise ValueError(f"Megatron-LM has no model like {model_type!r}: it has {', '.join(_KINDS)}.")
    found: dict[str, Any] = {theirs: getattr(config, ours, None) for theirs, ours in kind.arguments.items()}
    found |= kind.fixed
    if kind.name == "t5":  # configurations of T5 have no maximum sequence length
        found["max_position_embeddings"] = found["max_position_embeddings"] or 1024
    architecture = (getattr(config, "architectures", None) or [type(model).__name__])[0].lower()
    found["model_type_name"] = kind.name
    found["pretraining_flag"] = kind.class_word in architecture
    return {**found, **_lengths(kind, lengths, found["max_position_embeddings"], batch)}


def _lengths(kind: _Kind, lengths: Lengths, longest: int, batch: Any) -> dict[str, int]:
    length, encoder, decoder = lengths
    tokens = None if batch is None else batch["input_ids"].shape[1]
    if kind.name != "t5":
        return {"seq_length": length or encoder or decoder or tokens or longest}
    labels = None if batch is None or "labels" not in batch else batch["labels"].shape[1]
    return {"encoder_seq_length": encoder or tokens or longest, "decoder_seq_length": decoder or labels or longest}
