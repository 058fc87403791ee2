"""The models whose training steps and generation are timed: Llama with the attentions that are compared."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import hf_asentmax  # noqa: F401  (registers the presets)

__all__ = ["METHODS", "SIZES", "build", "sharpen"]

SIZES: dict[str, dict[str, Any]] = {
    "124M": {  # GPT-2's size in Llama's architecture
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
    },
    "1B": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
    "tiny": {  # to try a script without a GPU
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    },
}
# (attn_implementation, flags); the first is what the others are compared with
METHODS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "softmax, RoPE (sdpa)": ("sdpa", None),
    "ASEntmax, RoPE": ("asentmax", {}),
    "ASEntmax, NAPE": ("asentmax", {"positions": "nape"}),
    "entmax, NAPE": ("entmax", {"positions": "nape"}),
}


def build(
    method: str, size: str, length: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """An untrained model.

    Args:
        method: a key of METHODS.
        size: a key of SIZES.
        length: the most tokens that it will see.
        dtype: of the weights.
        device: where to make them.
    """
    implementation, flags = METHODS[method]
    config = LlamaConfig(
        vocab_size=32_000, max_position_embeddings=length, tie_word_embeddings=True, eos_token_id=None, **SIZES[size]
    )
    if flags is not None:
        config.asentmax = flags
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)


@torch.no_grad()
def sharpen(model: PreTrainedModel, factor: float) -> None:
    """Multiplies the query projections in place, so that compiled code stays valid."""
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(factor)
