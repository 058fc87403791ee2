"""The attention function that transformers calls for every preset."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

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

# Arguments that change the scores or the keys in a way that no preset supports. They are refused.
_REFUSED_ARGUMENTS = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "keys selected by an indexer",
    "block_indices": "blocks of keys selected by an indexer",
    "position_bias": "a learned position bias on the scores",
    "head_mask": "a mask over heads",
    "cache": "a paged cache (continuous batching); use generate()",
    "block_table": "a paged cache (continuous batching); use generate()",
}
# Arguments that change no score, with the reason. Every other argument that is not None is refused.
_HARMLESS_ARGUMENTS = {
    HIDDEN_STATES_ARGUMENT: "the layer's input, for the length scaling",
    CACHE_ARGUMENT: "the cache, for the bound on the norms of the keys",
    "cache_position": "the model's mask and cache use it",
    "cu_seq_lens_k": "packing: the hook on the model's inputs uses it",
    "cu_seq_lens_q": "packing: the hook on the model's inputs uses it",
    "deterministic": "chooses among flash attention's backward passes",
    "layer_idx": "the index of the layer",
    "logits_to_keep": "the language model head uses it",
    "max_length_k": "packing: follows from cu_seq_lens_k",
    "max_length_q": "packing: follows from cu_seq_lens_q",
    "mm_token_type_ids": "the model's mask uses it",
    "num_items_in_batch": "the loss uses it",
    "output_attentions": "chooses what is returned",
    "output_hidden_states": "chooses what is returned",
    "output_router_logits": "chooses what is returned",
    "position_ids": "rotary positions and the model's mask use them",
    "return_dict": "chooses what is returned",
    "seq_idx": "packing: state space layers use it",
    "token_type_ids": "the model's mask uses it",
    "use_cache": "the model's cache uses it",
}
_COUNT_ATTRIBUTE = "_asentmax_visible_count"  # on a 4D mask while a decoding step is traced


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
    """Run the attention of a prepared module, with the signature of transformers' attention interface.

    Args:
        module: an attention module that `install` has prepared.
        query: (batch, heads, q_len, head_dim), float.
        key, value: (batch, kv_heads, kv_len, head_dim), float.
        attention_mask: a mask that `asentmax_mask` made, or None where attention is purely causal; see `_masks`.
        scaling: the model's factor on the scores, by default 1/sqrt(head_dim).
        dropout: the probability of dropping a weight.
        softcap: the cap on the length-scaled scores.
        sliding_window: the layer's window, which a 4D mask already contains.
        is_causal: False for a model that was configured to be bidirectional.

    Returns:
        The output (batch, q_len, heads, head_dim), and the weights if ``output_attentions``, the argument or the
        config's, asks for them.

    Raises:
        RuntimeError: the module was not prepared.
        NotImplementedError: an argument changes the attention in an unsupported way.
    """
    settings = _checked_settings(module, query.shape[1], kwargs)
    masks = _masks(module, attention_mask, is_causal, sliding_window)
    cache, q_len = kwargs.get(CACHE_ARGUMENT), query.shape[2]
    scoring = Scoring(
        scale=scaling,
        alpha=settings.flags.alpha,
        mapping=_mapping(settings, module.training),
        softcap=softcap,
        alibi_slopes=_slopes(settings, query.device),
        # Without a cache layer_idx is not read: torch.compile would compile every layer again.
        key_norm_bound=None if cache is None else key_norm_bound(cache, getattr(module, "layer_idx", None), key, q_len),
    )
    if not query.dtype == key.dtype == value.dtype:
        query, key, value = _one_dtype(query, key, value)
    if attention_mask is None and masks.is_causal and 1 < q_len < key.shape[2]:
        # A prompt was written to an empty static cache. transformers passes no mask for it, and the slots after the
        # prompt are not filled yet.
        key, value = key[:, :, :q_len], value[:, :, :q_len]
    factor = _length_factor(module, settings, kwargs.get(HIDDEN_STATES_ARGUMENT), masks, key.shape[2])
    if factor is not None:
        query = scaled_query(query, factor, settings.num_unscaled_heads)
    return_weights = kwargs.get("output_attentions")
    if return_weights is None:
        return_weights = getattr(module.config, "output_attentions", False)
    output, weights = attend(
        Call.checked(query, key, value, masks, scoring, dropout=dropout, return_weights=bool(return_weights))
    )
    return output.transpose(1, 2).contiguous(), weights


def _checked_settings(module: nn.Module, heads: int, kwargs: dict[str, Any]) -> AttentionSettings:
    """The module's settings, after checking the number of heads and the other arguments of the call."""
    settings: AttentionSettings | None = getattr(module, SETTINGS_ATTRIBUTE, None)
    if settings is None:
        raise RuntimeError(
            f"{type(module).__name__} was built without hf_asentmax's parameters; build or load the model with "
            'attn_implementation="asentmax" after importing hf_asentmax, and do not change the implementation later'
        )
    for name, value in kwargs.items():
        if value is None or name in _HARMLESS_ARGUMENTS:
            continue
        if name in _REFUSED_ARGUMENTS:
            raise NotImplementedError(
                f"{type(module).__name__} asks for {_REFUSED_ARGUMENTS[name]} ({name}), which hf_asentmax does not have"
            )
        raise NotImplementedError(
            f"{type(module).__name__} passes {name}={_shown(value)} to its attention function. hf_asentmax does not "
            "know this argument, and ignoring it could change the attention. If you passed it to the model yourself, "
            "leave it out; if the model makes it, use another family or another attn_implementation"
        )
    if heads != settings.num_heads:
        raise NotImplementedError(
            f"{type(module).__name__} has {heads} query heads, but its config says {settings.num_heads}; hf_asentmax "
            "needs config.num_attention_heads to hold for every layer"
        )
    return settings


def _shown(value: Any) -> str:
    """An argument for an error message: a tensor's type and shape, a number or text itself, or a class."""
    if isinstance(value, torch.Tensor):
        return f"tensor({value.dtype}, {tuple(value.shape)})"
    return repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__


def _masks(
    module: nn.Module, attention_mask: torch.Tensor | None, is_causal: bool | None, sliding_window: int | None
) -> Masks:
    """The masks of a call.

    Args:
        module: the attention module, whose ``is_causal`` holds where the argument is None.
        attention_mask: None; bool (batch, kv_len) padding, to intersect with causality; int32
            (batch or 1, 1, q_len, 1) first keys, to intersect with causality; or (batch, 1, q_len, kv_len), bool or
            additive, which contains causality and windows.
        is_causal, sliding_window: as for `asentmax_attention_forward`.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is None:
        return Masks(causal, sliding_window=sliding_window)
    key_start = key_start_of(attention_mask)
    if key_start is not None:  # contains the window
        return Masks(True, key_start=key_start)
    attention_mask = _boolean_mask(attention_mask)
    if attention_mask.ndim == 4:
        return Masks(False, attention_mask)
    return Masks(causal, attention_mask, sliding_window)


def _boolean_mask(mask: torch.Tensor) -> torch.Tensor:
    """A 2D mask as it is; a 4D mask as bool. An additive mask is 0 at visible keys and very negative elsewhere."""
    if not mask.is_floating_point():
        return mask if mask.ndim == 2 or mask.dtype == torch.bool else mask.to(torch.bool)
    visible = mask == 0
    shows_or_hides = (visible | (mask <= -1e4)).all()
    message = (
        "the 4D attention_mask adds values other than 0 and minus infinity to the scores; hf_asentmax takes masks "
        "that show or hide keys (boolean, or 0 and torch.finfo(dtype).min)"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(shows_or_hides, message)  # a RuntimeError when the graph runs, without a graph break
    elif not bool(shows_or_hides):
        raise NotImplementedError(message)
    return visible


def _mapping(settings: AttentionSettings, training: bool) -> Mapping | None:
    """The mapping that replaces alpha-entmax, or None."""
    flags = settings.flags
    if flags.top_k is not None:
        return partial(top_k_softmax, k=flags.top_k)
    if flags.scaling == "adaptive_temperature" and not training:
        return adaptive_temperature_softmax
    return None


def _slopes(settings: AttentionSettings, device: torch.device) -> torch.Tensor | None:
    """ALiBi's slope of each head, (heads,) float32; None without ALiBi."""
    if settings.num_alibi_heads == 0:
        return None
    kind = settings.flags.alibi_slopes or "harmonic"
    return alibi_slopes(settings.num_heads, settings.num_alibi_heads, kind, device)


def _one_dtype(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors in autocast's type, or in value's type. Rotary positions leave only query and key in float32."""
    device_type = query.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _length_factor(
    module: nn.Module,
    settings: AttentionSettings,
    hidden_states: torch.Tensor | None,
    masks: Masks,
    kv_len: int,
) -> torch.Tensor | None:
    """The factor of the module's length scaling on its scaled heads, or None without a scaling.

    Args:
        hidden_states: (batch, q_len, hidden_size), the layer's input.

    Returns:
        (batch or 1, heads - num_unscaled_heads, q_len), float32 (float64 for float64 parameters).
    """
    length_scaling = scaling_of(module)
    if length_scaling is None:
        return None
    if hidden_states is None:
        raise RuntimeError(
            f"the layer's input did not reach the attention function of {type(module).__name__}: expected the pre-hook "
            "of hf_asentmax to pass it on; call the attention module itself, not its forward method"
        )
    position = query_positions(hidden_states.shape[1], kv_len, hidden_states.device)
    count = _visible_count(position, kv_len, masks)
    if count.shape[1] > 1:  # one mask per head
        count = count[:, settings.num_unscaled_heads :]
    factor: torch.Tensor = length_scaling(hidden_states, count)
    return factor


def _visible_count(position: torch.Tensor, kv_len: int, masks: Masks) -> torch.Tensor:
    """`visible_count`, computed once for all layers in compiled decoding.

    All layers of one kind share a 4D mask tensor, which keeps its count while the step is traced. Inductor does not
    merge equal sums, and the sum over a long cache would take much of the attention's time.
    """
    mask = masks.attention_mask
    keep = torch.compiler.is_compiling() and position.shape[0] == 1 and mask is not None and mask.ndim == 4
    count = getattr(mask, _COUNT_ATTRIBUTE, None) if keep else None
    if count is None:
        count = visible_count(position, kv_len, masks)
        if keep:
            setattr(mask, _COUNT_ATTRIBUTE, count)
    return count
