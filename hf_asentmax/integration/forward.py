"""The attention function that transformers calls for every preset."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import TransformersKwargs, logging

from ..attention import attend
from ..call import Call, Scoring
from ..mappings import Mapping, adaptive_temperature_softmax, top_k_softmax
from ..masks import Masks, query_positions, visible_count
from ..positions import alibi_slopes
from ..scaling import scaled_query
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
    cache, key_norms = kwargs.get(CACHE_ARGUMENT), None
    if cache is not None:  # without one the layer's index stays unread: torch.compile would compile every layer anew
        key_norms = key_norm_bound(cache, getattr(module, "layer_idx", None), key, query.shape[2])
    query, key, value = _one_dtype(query, key, value)
    masks = _masks(module, attention_mask, is_causal, sliding_window)
    if attention_mask is None and masks.is_causal and 1 < query.shape[2] < key.shape[2]:
        # An empty static cache that a prompt has just been written to: transformers leaves the mask out, and the
        # slots after the prompt are not filled yet.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    query = _length_scaled(module, settings, query, kwargs.get(HIDDEN_STATES_ARGUMENT), masks, key.shape[2])
    scoring = Scoring(
        scale=scaling,
        alpha=settings.flags.alpha,
        mapping=_mapping(settings, module.training),
        softcap=softcap,
        alibi_slopes=_slopes(settings, query.device),
        key_norm_bound=key_norms,
    )
    weights_too = bool(kwargs.get("output_attentions"))
    call = Call.checked(query, key, value, masks, scoring, dropout=dropout, return_weights=weights_too)
    output, weights = attend(call)
    return output.transpose(1, 2).contiguous(), weights


def _masks(
    module: nn.Module, attention_mask: torch.Tensor | None, is_causal: bool | None, sliding_window: int | None
) -> Masks:
    """The masks of a call, from what `asentmax_mask` made and what the attention module says."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is None:
        return Masks(causal, sliding_window=sliding_window)
    key_start = key_start_of(attention_mask)
    if key_start is not None:  # windows are part of it
        return Masks(True, key_start=key_start)
    attention_mask = _boolean_mask(attention_mask)
    if attention_mask.ndim == 4:  # causality and windows are part of it
        return Masks(False, attention_mask)
    return Masks(causal, attention_mask, sliding_window)


def _length_scaled(
    module: nn.Module,
    settings: AttentionSettings,
    query: torch.Tensor,
    hidden_states: torch.Tensor | None,
    masks: Masks,
    kv_len: int,
) -> torch.Tensor:
    """The query times the factors of the module's length scaling, if it has one."""
    length_scaling = scaling_of(module)
    if length_scaling is None:
        return query
    if hidden_states is None:
        raise RuntimeError(f"the layer's input did not reach the attention function of {type(module).__name__}")
    count = _visible_count(query, kv_len, masks)
    if count.shape[1] > 1:  # a mask per head
        count = count[:, settings.num_unscaled_heads :]
    return scaled_query(query, length_scaling(hidden_states, count), settings.num_unscaled_heads)


def _slopes(settings: AttentionSettings, device: torch.device) -> torch.Tensor | None:
    """ALiBi's slopes, one for each head, or None without ALiBi."""
    if settings.num_alibi_heads == 0:
        return None
    kind = settings.flags.alibi_slopes or "harmonic"
    return alibi_slopes(settings.num_heads, settings.num_alibi_heads, kind, device)


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


def _visible_count(query: torch.Tensor, kv_len: int, masks: Masks) -> torch.Tensor:
    """How many keys each query sees; compiled decoding counts them once for all layers.

    Their 4D mask is one tensor, which remembers its count while the step is traced. Inductor does not merge equal sums,
    and a sum over a long cache takes as long as much of the attention.
    """
    mask = masks.attention_mask
    remembers = torch.compiler.is_compiling() and query.shape[2] == 1 and mask is not None and mask.ndim == 4
    count = getattr(mask, _COUNT, None) if remembers else None
    if count is None:
        count = visible_count(query_positions(query.shape[2], kv_len, query.device), kv_len, masks)
        if remembers:
            setattr(mask, _COUNT, count)
    return count


def _mapping(settings: AttentionSettings, training: bool) -> Mapping | None:
    """The mapping that replaces alpha-entmax, or None."""
    flags = settings.flags
    if flags.top_k is not None:
        return partial(top_k_softmax, k=flags.top_k)
    if flags.scaling == "adaptive_temperature" and not training:
        return adaptive_temperature_softmax
    return None
