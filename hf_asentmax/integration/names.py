"""The names that the integration uses on transformers' objects and in config.json."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..config import PRESETS, ASEntmaxConfig

# "attn_implementation" in config.json. transformers without the plugin refuses an unknown implementation and quotes its
# name in the error, so the name tells the user what to do.
FILE_IMPLEMENTATION = (
    'hf_asentmax: pip install hf_asentmax, then "import hf_asentmax" before loading, or pass trust_remote_code=True'
)
# The module that is saved in a checkpoint for trust_remote_code=True, and its class.
REMOTE_MODULE = "configuration_hf_asentmax"
REMOTE_CLASS = "ASEntmaxAutoConfig"

# In config.json beside "asentmax" (the flags): the name of the preset that the model was built with.
PRESET_ENTRY = "asentmax_preset"

# Attributes of an attention module: its settings, and the module of its length scaling.
SETTINGS_ATTRIBUTE = "asentmax_settings"
SCALING_ATTRIBUTE = "length_scaling"
# Keyword arguments that pass the layer's input, and for ALiBi heads the cache, to the attention function.
HIDDEN_STATES_ARGUMENT = "asentmax_hidden_states"
CACHE_ARGUMENT = "asentmax_cache"


def preset_of(config: PreTrainedConfig) -> str | None:
    """The preset that a config's attention implementation names, or None for other implementations."""
    implementation = getattr(config, "_attn_implementation", None)
    return implementation if implementation in PRESETS else None


def flags_of(config: PreTrainedConfig) -> ASEntmaxConfig:
    """The flags of a config whose attention implementation is a preset."""
    name = preset_of(config)
    assert name is not None
    return ASEntmaxConfig.from_preset(name, getattr(config, "asentmax", None))


def preset_for_flags(config: PreTrainedConfig, flags: ASEntmaxConfig) -> str:
    """The preset that the flags were saved with, else the preset with their mapping and scaling, else `asentmax`."""
    saved = getattr(config, PRESET_ENTRY, None)
    if saved in PRESETS:
        return saved
    for name, preset in PRESETS.items():
        same_top_k = (flags.top_k is not None) == ("top_k" in preset)
        if same_top_k and flags.alpha == preset["alpha"] and flags.scaling == preset["scaling"]:
            return name
    return "asentmax"
