"""Wraps a few methods of transformers, each for one reason. Models with other attentions behave as before."""

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
from .install import check_no_own_table, install, installed_attentions
from .names import FILE_IMPLEMENTATION, preset_for_flags, preset_of
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
    """Wrap transformers' methods. Methods that are already wrapped are skipped."""
    _wrap(PreTrainedModel, "_from_config", _leaving_the_config_alone)
    _wrap(PreTrainedModel, "_check_and_adjust_attn_implementation", _resolving_flags)
    _wrap(PreTrainedModel, "post_init", _installing)
    _wrap(PreTrainedModel, "_initialize_weights", _initialising_scalings)
    _wrap(PreTrainedModel, "set_attn_implementation", _refusing_to_switch)
    _wrap(trainer_pt_utils, "get_parameter_names", _without_scalings)
    _wrap(PreTrainedConfig, "to_dict", _with_plain_flags)
    _wrap(PreTrainedConfig, "to_json_file", _writing_flags)
    _allow_output_attentions()


def resolve_implementation(config: PreTrainedConfig, requested: str | None) -> str | None:
    """The attention implementation to run, from a config and the requested implementation.

    Args:
        config: the model's config, which may have flags.
        requested: the ``attn_implementation`` argument, or the entry of config.json; None if there is neither.

    Raises:
        ValueError: the flags and the requested implementation contradict each other.
        TypeError: config.asentmax is neither an ASEntmaxConfig nor a dict of its flags.
    """
    flags = getattr(config, "asentmax", None)
    if requested == FILE_IMPLEMENTATION:
        if flags is None:
            raise ValueError(
                'this config.json names hf_asentmax as its "attn_implementation" but has no "asentmax" flags; the '
                "file was edited or truncated. Restore the flags, or pass attn_implementation explicitly"
            )
        return preset_for_flags(config, ASEntmaxConfig.from_preset("asentmax", flags))
    if requested in PRESETS:
        if _from_file(flags):
            saved = ASEntmaxConfig.from_preset("asentmax", flags)
            if requested != preset_for_flags(config, saved):
                raise ValueError(
                    f"this checkpoint was saved with {saved}, which attn_implementation={requested!r} contradicts. "
                    "Leave attn_implementation out to restore it, or set config.asentmax to the flags you want"
                )
        ASEntmaxConfig.from_preset(requested, flags)  # raises if the flags contradict the preset
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
    """Whether the flags were read from a config.json that the plugin wrote: a dict with all flags."""
    return isinstance(flags, dict) and set(flags) == set(ASEntmaxConfig().to_dict())


def _asks_for_a_preset(attn_implementation: str | dict[str, Any] | None) -> bool:
    """Whether an implementation, or that of any sub-config, is a preset."""
    if isinstance(attn_implementation, dict):
        return any(_asks_for_a_preset(part) for part in attn_implementation.values())
    return attn_implementation in PRESETS


def _leaving_the_config_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    """Copies the config before a model with a preset is built.

    transformers writes the implementation into the config that it receives, and models read it there in every forward.
    Two models built from one config object would change each other's attention.
    """

    def _from_config(cls: type[PreTrainedModel], config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        if _asks_for_a_preset(kwargs.get("attn_implementation")):
            config = copy.deepcopy(config)
        return original(cls, config, **kwargs)

    return _from_config


def _resolving_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the flags and resolves the saved implementation where transformers chooses the implementation."""

    def _check_and_adjust_attn_implementation(
        self: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> Any:
        resolved = resolve_implementation(self.config, attn_implementation)
        if resolved in PRESETS and getattr(self.config, "is_encoder_decoder", False):
            raise NotImplementedError(
                f"hf_asentmax supports decoders, but {type(self).__name__} is an encoder-decoder model; the paper "
                "defines no cross-attention and no encoder. Use a decoder, or another attn_implementation"
            )
        if resolved in PRESETS:
            assert resolved is not None
            check_no_own_table(self, resolved)
        return original(self, resolved, *args, **kwargs)

    return _check_and_adjust_attn_implementation


def _installing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Installs the parameters in ``post_init``, which runs right before weights are initialised or loaded."""

    def post_init(self: PreTrainedModel) -> None:
        install(self)
        for cls in type(self).__mro__:  # importing transformers.generation at the top would be slow
            if "init_continuous_batching" in vars(cls):
                _wrap(cls, "init_continuous_batching", _refusing_continuous_batching)
        original(self)

    return post_init


def _initialising_scalings(original: Callable[..., Any]) -> Callable[..., Any]:
    """Initialises length scalings. transformers leaves parameters of unknown modules as uninitialised memory."""

    def _initialize_weights(self: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(module, LengthScaling):
            if not getattr(module, "_is_hf_initialized", False):
                module.reset_parameters()  # transformers guards torch.nn.init for loaded parameters
                module._is_hf_initialized = True  # type: ignore[assignment]
            return
        original(self, module, *args, **kwargs)

    return _initialize_weights


def _refusing_to_switch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses to switch a built model to or from a preset, because its parameters and hooks would not follow."""

    def set_attn_implementation(self: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        installed = next(installed_attentions(self), None) is not None
        current = self.config._attn_implementation
        if (installed or _asks_for_a_preset(attn_implementation)) and attn_implementation != current:
            raise ValueError(
                f"the attention of a built model cannot be switched from {current!r} to {attn_implementation!r}: "
                "hf_asentmax's presets have parameters and hooks of their own. Load the model again with "
                "from_pretrained(..., attn_implementation=...)"
            )
        original(self, attn_implementation, *args, **kwargs)

    return set_attn_implementation


def _refusing_continuous_batching(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses continuous batching, which accepts a few attentions by name and may switch to softmax by itself."""

    def init_continuous_batching(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if next(installed_attentions(self), None) is not None:
            raise NotImplementedError(
                "continuous batching (generate_batch, cache_implementation='paged') expects one of transformers' own "
                f"attention implementations, got {type(self).__name__} with hf_asentmax's "
                f"{self.config._attn_implementation!r}, which has no paged cache. Use generate() with left-padded "
                "batches and a dynamic, static or quantized cache"
            )
        return original(self, *args, **kwargs)

    return init_continuous_batching


def _without_scalings(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Excludes length scalings from the parameters that ``Trainer`` decays, which this recursive function lists."""

    def get_parameter_names(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
        return [] if isinstance(model, LengthScaling) else original(model, *args, **kwargs)

    return get_parameter_names


def _with_plain_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """Writes ``config.asentmax`` as a dict, because a config's dict and JSON need plain values."""

    def to_dict(self: PreTrainedConfig) -> dict[str, Any]:
        output = original(self)
        if isinstance(output.get("asentmax"), ASEntmaxConfig):
            output["asentmax"] = output["asentmax"].to_dict()
        return output

    return to_dict


def _writing_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """Writes the flags into config.json, the only file that can say that a checkpoint is not softmax."""

    def to_json_file(self: PreTrainedConfig, json_file_path: Any, use_diff: bool = True) -> None:
        if is_ours(self):
            write_config_file(self, json_file_path, use_diff)
        else:
            drop_own_class(self)
            original(self, json_file_path, use_diff)

    return to_json_file


def _allow_output_attentions() -> None:
    """Let a config with a preset have ``output_attentions``, which transformers allows only with ``eager``.

    Strict configs keep a list of their class's validators, so the lists of classes that exist already change too.
    """
    _wrap(PreTrainedConfig, "validate_output_attentions", _validating_other_attentions)
    wrapped = PreTrainedConfig.validate_output_attentions
    original = wrapped.__wrapped__  # type: ignore[attr-defined]
    classes = [PreTrainedConfig]
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        if "__class_validators__" in vars(cls):
            validators = cls.__class_validators__  # type: ignore[attr-defined]
            cls.__class_validators__ = [wrapped if each is original else each for each in validators]  # type: ignore[attr-defined]
    whole: property = inspect.getattr_static(PreTrainedConfig, "output_attentions")
    assert whole.fset is not None
    if not getattr(whole.fset, _MARK, False):
        setter = functools.wraps(whole.fset)(_setting_output_attentions(whole.fset))
        setattr(setter, _MARK, True)
        PreTrainedConfig.output_attentions = whole.setter(setter)  # type: ignore[assignment,method-assign]


def _names_our_attention(config: PreTrainedConfig) -> bool:
    """Whether a config's implementation is a preset, or the entry of a config.json that the plugin wrote."""
    return preset_of(config) is not None or config._attn_implementation == FILE_IMPLEMENTATION


def _validating_other_attentions(original: Callable[..., None]) -> Callable[..., None]:
    def validate_output_attentions(self: PreTrainedConfig) -> None:
        if not _names_our_attention(self):
            original(self)

    return validate_output_attentions


def _setting_output_attentions(original: Callable[..., None]) -> Callable[..., None]:
    def output_attentions(self: PreTrainedConfig, value: bool) -> None:
        if _names_our_attention(self):
            self._output_attentions = value
        else:
            original(self, value)

    return output_attentions
