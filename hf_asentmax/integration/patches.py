"""The few methods of transformers that are wrapped, each for one reason. Other models pass through unchanged."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, trainer_pt_utils

from ..config import PRESETS, ASEntmaxConfig
from ..scaling.modules import LengthScaling
from .install import install, installed_attentions
from .names import FILE_IMPLEMENTATION, preset_for_flags
from .saving import drop_own_class, is_ours, write_config_file

__all__ = ["apply_patches"]

_MARK = "_wrapped_by_hf_asentmax"


def _wrap(owner: type | ModuleType, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    method = inspect.getattr_static(owner, name)
    original = method.__func__ if isinstance(method, classmethod) else method
    if getattr(original, _MARK, False):
        return
    wrapped = functools.wraps(original)(make(original))
    setattr(wrapped, _MARK, True)
    setattr(owner, name, classmethod(wrapped) if isinstance(method, classmethod) else wrapped)


def apply_patches() -> None:
    """Wrap transformers' methods, once per process."""
    _wrap(PreTrainedModel, "_from_config", _leaving_the_config_alone)
    _wrap(PreTrainedModel, "_check_and_adjust_attn_implementation", _resolving_flags)
    _wrap(PreTrainedModel, "post_init", _installing)
    _wrap(PreTrainedModel, "_initialize_weights", _initialising_scalings)
    _wrap(PreTrainedModel, "set_attn_implementation", _refusing_to_switch)
    _wrap(trainer_pt_utils, "get_parameter_names", _without_scalings)
    _wrap(PreTrainedConfig, "to_dict", _with_plain_flags)
    _wrap(PreTrainedConfig, "to_json_file", _writing_flags)


def resolve_implementation(config: PreTrainedConfig, requested: str | None) -> str | None:
    """The attention implementation to run for a config and what was asked for, checking the flags.

    Raises:
        ValueError: the flags and the implementation contradict each other.
    """
    flags = getattr(config, "asentmax", None)
    if requested == FILE_IMPLEMENTATION:
        if flags is None:
            raise ValueError(
                'this config.json names hf_asentmax as its "attn_implementation" but has no "asentmax" flags; it was '
                "edited by hand or cut. Restore them, or pass attn_implementation explicitly"
            )
        return preset_for_flags(config, ASEntmaxConfig.from_preset("asentmax", flags))
    if requested in PRESETS:
        if _from_file(flags):
            saved = ASEntmaxConfig.from_preset("asentmax", flags)
            if requested != preset_for_flags(config, saved):
                raise ValueError(
                    f"this checkpoint was saved with {saved}, which attn_implementation={requested!r} contradicts. "
                    "Leave attn_implementation out to restore it, or set config.asentmax to the flags that you want"
                )
        ASEntmaxConfig.from_preset(requested, flags)  # raises where flags and preset don't go together
        return requested
    if flags is None:
        return requested
    if requested is None:
        return preset_for_flags(config, ASEntmaxConfig.from_preset("asentmax", flags))
    raise ValueError(
        f"config.asentmax is set ({flags}), but attn_implementation={requested!r} would ignore it and run another "
        "attention. Use attn_implementation='asentmax' (or leave it out), or delete config.asentmax first"
    )


def _from_file(flags: Any) -> bool:
    """Whether flags were read from a config.json that the plugin wrote: a dict that names all of them."""
    return isinstance(flags, dict) and set(flags) == set(ASEntmaxConfig().to_dict())


def _asks_for_a_preset(attn_implementation: str | dict[str, Any] | None) -> bool:
    """Whether an implementation, or one of those given per sub-config, is a preset."""
    if isinstance(attn_implementation, dict):
        return any(_asks_for_a_preset(part) for part in attn_implementation.values())
    return attn_implementation in PRESETS


def _leaving_the_config_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers writes the implementation into the config that it is given, and models read it there in every
    forward: a softmax model built from the same object would turn into another, or an ASEntmax model into softmax.
    """

    def _from_config(cls: type[PreTrainedModel], config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        if _asks_for_a_preset(kwargs.get("attn_implementation")):
            config = copy.deepcopy(config)
        return original(cls, config, **kwargs)

    return _from_config


def _resolving_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """The flags are checked, and a saved name resolved, where transformers settles the implementation."""

    def _check_and_adjust_attn_implementation(
        self: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> Any:
        resolved = resolve_implementation(self.config, attn_implementation)
        if resolved in PRESETS and getattr(self.config, "is_encoder_decoder", False):
            raise NotImplementedError(
                f"hf_asentmax supports decoders, and {type(self).__name__} is an encoder-decoder model; "
                "its cross-attention and encoder have no definition in the paper"
            )
        return original(self, resolved, *args, **kwargs)

    return _check_and_adjust_attn_implementation


def _installing(original: Callable[..., Any]) -> Callable[..., Any]:
    """The parameters must exist before weights are initialised or loaded; ``post_init`` comes right before that."""

    def post_init(self: PreTrainedModel) -> None:
        install(self)
        for cls in type(self).__mro__:  # found here, as importing transformers.generation is slow
            if "init_continuous_batching" in vars(cls):
                _wrap(cls, "init_continuous_batching", _refusing_continuous_batching)
        original(self)

    return post_init


def _initialising_scalings(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers leaves parameters of modules it doesn't know as uninitialised memory."""

    def _initialize_weights(self: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(module, LengthScaling):
            if not getattr(module, "_is_hf_initialized", False):
                module.reset_parameters()  # torch.nn.init, guarded by transformers for parameters already loaded
                module._is_hf_initialized = True  # type: ignore[assignment]
            return
        original(self, module, *args, **kwargs)

    return _initialize_weights


def _refusing_to_switch(original: Callable[..., Any]) -> Callable[..., Any]:
    """A built model has parameters and hooks of its implementation; switching would leave or miss them."""

    def set_attn_implementation(self: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        installed = next(installed_attentions(self), None) is not None
        current = self.config._attn_implementation
        if (installed or _asks_for_a_preset(attn_implementation)) and attn_implementation != current:
            raise ValueError(
                f"the attention of a built model can't be switched from {current!r} to {attn_implementation!r}: "
                "hf_asentmax's presets have parameters and hooks of their own. Load the model again with "
                "from_pretrained(..., attn_implementation=...)"
            )
        original(self, attn_implementation, *args, **kwargs)

    return set_attn_implementation


def _refusing_continuous_batching(original: Callable[..., Any]) -> Callable[..., Any]:
    """Continuous batching knows a few attentions by name and would have a user switch to softmax, or do so itself."""

    def init_continuous_batching(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if next(installed_attentions(self), None) is not None:
            raise NotImplementedError(
                "continuous batching (generate_batch, cache_implementation='paged') expects one of transformers' own "
                f"attention implementations and got {type(self).__name__} with hf_asentmax's "
                f"{self.config._attn_implementation!r}, which has no paged cache. Use generate() with left-padded "
                "batches and a dynamic, static or quantized cache"
            )
        return original(self, *args, **kwargs)

    return init_continuous_batching


def _without_scalings(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """``Trainer`` decays the parameters that this recursive function lists, all but biases and norms."""

    def get_parameter_names(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
        return [] if isinstance(model, LengthScaling) else original(model, *args, **kwargs)

    return get_parameter_names


def _with_plain_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """``config.asentmax`` may be an ASEntmaxConfig; dicts and JSON of a config need plain values."""

    def to_dict(self: PreTrainedConfig) -> dict[str, Any]:
        output = original(self)
        if isinstance(output.get("asentmax"), ASEntmaxConfig):
            output["asentmax"] = output["asentmax"].to_dict()
        return output

    return to_dict


def _writing_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """config.json is the only place that can say that a checkpoint is not softmax."""

    def to_json_file(self: PreTrainedConfig, json_file_path: Any, use_diff: bool = True) -> None:
        if is_ours(self):
            write_config_file(self, json_file_path, use_diff)
        else:
            drop_own_class(self)
            original(self, json_file_path, use_diff)

    return to_json_file
