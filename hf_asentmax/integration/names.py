"""The names and attributes that the integration puts on transformers' objects, in one place."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..config import PRESETS, ASEntmaxConfig

# In config.json as "attn_implementation". transformers without the plugin refuses to build a model with an
# implementation it doesn't know and quotes its name, so the name says what to do.
FILE_IMPLEMENTATION = (
    'hf_asentmax: pip install hf_asentmax, then "import hf_asentmax" before loading, or pass trust_remote_code=True'
)
# The module that a checkpoint carries for trust_remote_code=True, and its class.
REMOTE_MODULE = "configuration_hf_asentmax"
REMOTE_CLASS = "ASEntmaxAutoConfig"

# Beside "asentmax" (the flags) in config.json: the preset's name that the model was built with.
PRESET_ENTRY = "asentmax_preset"

# On an attention module: its settings, and the module of its length scaling.
SETTINGS_ATTRIBUTE = "asentmax_settings"
SCALING_ATTRIBUTE = "length_scaling"
# The keyword argument that brings the layer's input to the attention function.
HIDDEN_STATES_ARGUMENT = "asentmax_hidden_states"
# The one that brings the cache, where ALiBi heads decode from it.
CACHE_ARGUMENT = "asentmax_cache"


def preset_of(config: PreTrainedConfig) -> str | None:
    """The preset that a model config's attention implementation names, or None for any other implementation."""
    implementation = getattr(config, "_attn_implementation", None)
    return implementation if implementation in PRESETS else None


def flags_of(config: PreTrainedConfig) -> ASEntmaxConfig:
    """The flags of a model config whose attention implementation is one of ours."""
    name = preset_of(config)
    assert name is not None
    return ASEntmaxConfig.from_preset(name, getattr(config, "asentmax", None))


def preset_for_flags(config: PreTrainedConfig, flags: ASEntmaxConfig) -> str:
    """The preset that flags were saved with, else the one that has their mapping and scaling, else `asentmax`."""
    saved = getattr(config, PRESET_ENTRY, None)
    if saved in PRESETS:
        return saved
    for name, preset in PRESETS.items():
        same_top_k = (flags.top_k is not None) == ("top_k" in preset)
        if same_top_k and flags.alpha == preset["alpha"] and flags.scaling == preset["scaling"]:
            return name
    return "asentmax"
