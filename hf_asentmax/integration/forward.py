"""The attention function that transformers calls for every preset."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import TransformersKwargs, logging

from ..attention import entmax_attention
from ..eager import eager_attention
from ..mappings import adaptive_temperature_softmax, entmax, top_k_softmax
from ..masks import mask_with_key_start, query_positions, visible_count
from ..positions import alibi_slopes
from ..scaled_query import scaled_query
from .install import AttentionSettings, scaling_of
from .key_norms import key_norm_bound
from .masks import key_start_of
from .names import CACHE_ARGUMENT, HIDDEN_STATES_ARGUMENT, SETTINGS_ATTRIBUTE

__all__ = ["asentmax_attention_forward"]

logger = logging.get_logger(__name__)

# Arguments that change the scores or the keys in ways that no preset has: refused, never dropped.
_REFUSED_ARGUMENTS = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a learned position bias on the scores",
    "head_mask": "a mask over heads",
    "cache": "a paged cache (continuous batching); use generate()",
    "block_table": "a paged cache (continuous batching); use generate()",
}
_COUNT = "_asentmax_visible_count"  # on a traced mask
# Arguments that are known and need nothing here.
_KNOWN_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | {
    "cache_position",
    "layer_idx",
    "logits_to_keep",
    "output_attentions",
    "use_cache",
}


def asentmax_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as the module's settings say, by transformers' attention interface.

    Args:
        module: an attention module that `install` has prepared.
        query: (batch, heads, q_len, head_dim).
        key, value: (batch, kv_heads, kv_len, head_dim).
        attention_mask: what `asentmax_mask` made: bool (batch, 1, q_len, kv_len) that holds everything, bool
            (batch, kv_len) padding beside causality, int32 (batch or 1, 1, q_len, 1) first keys beside causality, or
            None where purely causal.
        scaling: the model's own factor on the scores, default 1/sqrt(head_dim).
        dropout: probability of dropping a weight.
        softcap: cap on the (length-scaled) scores.
        sliding_window: the layer's window; already part of a 4D mask.
        is_causal: False for a model that was configured to be bidirectional.

    Returns:
        The output (batch, q_len, heads, head_dim), and the weights if ``output_attentions`` was asked for.

    Raises:
        RuntimeError: the module was not prepared.
        NotImplementedError: an argument that changes the attention in a way that is not supported.
    """
    settings: AttentionSettings | None = getattr(module, SETTINGS_ATTRIBUTE, None)
    if settings is None:
        raise RuntimeError(
            f"{type(module).__name__} was built without hf_asentmax's parameters; build or load the model with "
            'attn_implementation="asentmax" after importing hf_asentmax, rather than changing it afterwards'
        )
    _check_arguments(module, kwargs)
    if query.shape[1] != settings.num_heads:
        raise NotImplementedError(
            f"{type(module).__name__} has {query.shape[1]} heads where its config says {settings.num_heads}"
        )
    key_start = None if attention_mask is None else key_start_of(attention_mask)
    if key_start is not None:
        attention_mask, sliding_window = None, None  # windows are in it
    cache, bound = kwargs.get(CACHE_ARGUMENT), None
    if cache is not None:  # without one the layer's index stays unread: torch.compile would compile every layer anew
        bound = key_norm_bound(cache, getattr(module, "layer_idx", None), key, query.shape[2])
    query, key, value = _one_dtype(query, key, value)
    flags = settings.flags
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = causal or key_start is not None
    if attention_mask is None and causal and 1 < query.shape[2] < key.shape[2]:
        # An empty static cache that a prompt has just been written to: transformers leaves the mask out, and the
        # slots after the prompt are not filled yet.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if attention_mask is not None:
        attention_mask = _boolean_mask(attention_mask)
        if attention_mask.ndim == 4:
            causal, sliding_window = False, None  # the mask holds both

    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    length_scaling = scaling_of(module)
    if length_scaling is not None:
        hidden_states = kwargs.get(HIDDEN_STATES_ARGUMENT)
        if hidden_states is None:
            raise RuntimeError(f"the layer's input did not reach the attention function of {type(module).__name__}")
        count = _visible_count(query, key, causal, attention_mask, sliding_window)
        if key_start is not None:
            count = (count - key_start[:, None]).clamp_min(0)
        if count.shape[1] > 1:  # a mask per head
            count = count[:, settings.num_unscaled_heads :]
        query = scaled_query(query, length_scaling(hidden_states, count), settings.num_unscaled_heads)
    slopes = None
    if settings.num_alibi_heads > 0:
        slopes = alibi_slopes(
            settings.num_heads, settings.num_alibi_heads, flags.alibi_slopes or "harmonic", query.device
        )

    return_weights = bool(kwargs.get("output_attentions"))
    mapping = _mapping(settings, module.training)
    if mapping is None and dropout == 0.0 and not return_weights:
        output = entmax_attention(
            query,
            key,
            value,
            alpha=flags.alpha,
            scale=scale,
            is_causal=causal,
            attention_mask=attention_mask,
            alibi_slopes=slopes,
            sliding_window=sliding_window,
            key_start=key_start,
            softcap=softcap,
            key_norm_bound=bound,
        )
        return output.transpose(1, 2).contiguous(), None
    if query.device.type == "cuda" and not torch.compiler.is_compiling():
        reason = "they have no dropout and return no weights"
        if mapping is not None:
            reason = "top-k softmax and adaptive temperature, which need all scores at once, have none"
        logger.warning_once(
            f"hf_asentmax runs this attention in plain PyTorch (memory square in length), not in kernels: {reason}"
        )
    if key_start is not None:
        attention_mask = mask_with_key_start(attention_mask, key_start, query.shape[0], key.shape[2])
    output, weights = eager_attention(
        query,
        key,
        value,
        mapping=mapping or partial(entmax, alpha=flags.alpha),
        scale=scale,
        is_causal=causal,
        attention_mask=attention_mask,
        sliding_window=sliding_window,
        alibi_slopes=slopes,
        softcap=softcap,
        dropout=dropout,
        return_weights=return_weights,
    )
    return output.transpose(1, 2).contiguous(), weights


def _check_arguments(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if value is None or name in (HIDDEN_STATES_ARGUMENT, CACHE_ARGUMENT) or name in _KNOWN_ARGUMENTS:
            continue
        if name in _REFUSED_ARGUMENTS:
            raise NotImplementedError(
                f"{type(module).__name__} asks for {_REFUSED_ARGUMENTS[name]} ({name}), which hf_asentmax does not have"
            )
        if not torch.compiler.is_compiling():
            logger.warning_once(
                f"{type(module).__name__} passes {name!r} to its attention, which hf_asentmax does not know and leaves "
                "out; check that the model's attention does not depend on it"
            )


def _one_dtype(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Under autocast rotary positions leave query and key in float32 and value in half precision: one type for all."""
    if query.dtype == key.dtype == value.dtype:
        return query, key, value
    device_type = query.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _boolean_mask(mask: torch.Tensor) -> torch.Tensor:
    """True where visible. An additive float mask has 0 there and a very negative number elsewhere."""
    if not mask.is_floating_point():
        return mask if mask.ndim == 2 or mask.dtype == torch.bool else mask.to(torch.bool)
    visible = mask == 0
    shows_or_hides = (visible | (mask <= -1e4)).all()
    message = (
        "the 4D attention_mask adds values other than 0 and minus infinity to the scores; hf_asentmax takes masks "
        "that show or hide keys (boolean, or 0 and torch.finfo(dtype).min)"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(shows_or_hides, message)  # a RuntimeError when the graph runs, without breaking it
    elif not bool(shows_or_hides):
        raise NotImplementedError(message)
    return visible


def _visible_count(
    query: torch.Tensor,
    key: torch.Tensor,
    is_causal: bool,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """How many keys each query sees; compiled decoding counts them once for all layers.

    Their 4D mask is one tensor, which remembers its count while the step is traced. Inductor does not merge equal sums,
    and a sum over a long cache takes as long as much of the attention.
    """
    remembers = torch.compiler.is_compiling() and query.shape[2] == 1 and attention_mask is not None
    remembers = remembers and attention_mask.ndim == 4  # type: ignore[union-attr]
    count = getattr(attention_mask, _COUNT, None) if remembers else None
    if count is None:
        count = visible_count(
            query_positions(query.shape[2], key.shape[2], query.device),
            key.shape[2],
            is_causal=is_causal,
            attention_mask=attention_mask,
            sliding_window=sliding_window,
        )
        if remembers:
            setattr(attention_mask, _COUNT, count)
    return count


def _mapping(settings: AttentionSettings, training: bool) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The mapping where it is none that entmax_attention has, else None."""
    flags = settings.flags
    if flags.top_k is not None:
        return partial(top_k_softmax, k=flags.top_k)
    if flags.scaling == "adaptive_temperature" and not training:
        return adaptive_temperature_softmax
    return None
