"""Tiny configs and models of each family, the same for every test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import Cache, QuantizedLayer

import hf_asentmax  # noqa: F401  (registers the presets)

__all__ = [
    "BY_PART",
    "FAMILIES",
    "PRESETS",
    "VOCABULARY",
    "composite_config",
    "generating_model",
    "lossless_quantized_cache",
    "perturb_scalings",
    "perturbed_model",
    "random_ids",
    "tiny_config",
    "tiny_model",
]

VOCABULARY = 64
PRESETS = ("asentmax", "entmax", "ssmax", "adaptive_temperature", "topk_softmax")

# 4 query heads on 2 key/value heads if the family has grouped heads; windows are shorter than the tests' sequences.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_WINDOWED: dict[str, Any] = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
_NEOX = {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}

_SETTINGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _COMMON),
    "mistral": (MistralConfig, {**_COMMON, "sliding_window": 6}),
    "qwen2": (Qwen2Config, _COMMON),
    "qwen3": (Qwen3Config, {**_COMMON, "head_dim": 8}),
    "gemma2": (
        Gemma2Config,
        {**_COMMON, **_WINDOWED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": (Gemma3TextConfig, {**_COMMON, **_WINDOWED}),
    "olmo2": (Olmo2Config, _COMMON),
    "phi3": (Phi3Config, _COMMON),
    "gpt2": (GPT2Config, _GPT2),
    "gpt_neox": (
        GPTNeoXConfig,
        {**_NEOX, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
}
FAMILIES = tuple(_SETTINGS)


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A config of `family` with 2 layers, 4 heads and hidden size 32, changed by `overrides`."""
    config_class, settings = _SETTINGS[family]
    return config_class(**{**settings, **overrides})


def tiny_model(
    family: str,
    attn_implementation: str | None = None,
    flags: Any = None,
    *,
    seed: int = 0,
    model_class: Any = AutoModelForCausalLM,
    **overrides: Any,
) -> PreTrainedModel:
    """A model from `tiny_config` in eval mode, with weights drawn from `seed` and `flags` as config.asentmax.

    Two implementations of one family and seed have different weights, because additional parameters use random
    numbers. Use ``load_state_dict`` to make their weights equal.
    """
    config = tiny_config(family, **overrides)
    if flags is not None:
        config.asentmax = flags
    torch.manual_seed(seed)
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = model_class.from_config(config, **kwargs)
    return model.eval()


def perturb_scalings(model: torch.nn.Module, seed: int = 1) -> None:
    """Move every length scaling away from its initial values, so that its projections have an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".length_scaling." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise.to(parameter.device, parameter.dtype))


def perturbed_model(family: str = "llama", name: str = "asentmax", flags: Any = None, **kwargs: Any) -> PreTrainedModel:
    """`tiny_model` with its length scalings moved away from their initial values."""
    model = tiny_model(family, name, flags, **kwargs)
    perturb_scalings(model)
    return model


def generating_model(
    family: str = "llama", flags: Any = None, name: str = "asentmax", **kwargs: Any
) -> PreTrainedModel:
    """`perturbed_model` that never ends a sequence early."""
    model = perturbed_model(family, name, flags, **kwargs)
    model.generation_config.eos_token_id = None
    return model


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """(batch, length) token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


class _LosslessLayer(QuantizedLayer):
    """A quantized layer (residual window, deferred reordering) with a quantizer that does not round."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.clone()

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor.clone()


def lossless_quantized_cache(model: PreTrainedModel, residual_length: int = 4) -> Cache:
    """A quantized cache that needs no package and must give the same results as a plain cache."""
    return Cache(
        layers=[_LosslessLayer(residual_length=residual_length) for _ in range(model.config.num_hidden_layers)]
    )


_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
# The attention implementation of each part of a composite model
BY_PART = {"text_config": "asentmax", "vision_config": "sdpa"}


def composite_config(kind: str, flags: dict[str, Any] | None = None) -> Any:
    """A config of a vision-language model ("llava" or "gemma3") whose text part has the flags."""
    if kind == "llava":
        config: Any = LlavaConfig(
            text_config=tiny_config("llama"),
            vision_config=CLIPVisionConfig(**_VISION),
            image_token_id=60,
            image_seq_length=4,
        )
    else:
        config = Gemma3Config(
            text_config=tiny_config("gemma3_text"),
            vision_config={**_VISION, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            image_token_index=60,
            boi_token_index=61,
            eoi_token_index=62,
        )
    if flags is not None:
        config.text_config.asentmax = flags
    return config
