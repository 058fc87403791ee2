"""Adds the parameters and hooks of ASEntmax to a model's attention modules, by one rule for every family."""

from __future__ import annotations

import functools
import inspect
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config import ASEntmaxConfig
from ..scaling.modules import LengthScaling, build_scaling
from .families import rotary_argument, turn_off_positions, without_rotation
from .names import CACHE_ARGUMENT, HIDDEN_STATES_ARGUMENT, SCALING_ATTRIBUTE, SETTINGS_ATTRIBUTE, flags_of, preset_of
from .packing import packing_pre_hook

__all__ = ["AttentionSettings", "check_no_own_table", "install", "installed_attentions", "scaling_of"]

_SUPPORTED_MODELS = (
    "Use a decoder that does (Llama, Mistral, Qwen, Gemma, OLMo, Phi-3, GPT-2, GPT-NeoX and most recent families). For "
    "a composite model name the parts: attn_implementation={'text_config': 'asentmax', 'vision_config': 'sdpa'}, with "
    "flags in config.text_config.asentmax"
)


@dataclass(frozen=True)
class AttentionSettings:
    """The settings of one attention module.

    Attributes:
        flags: the flags of the attention.
        num_heads: the number of query heads.
        num_alibi_heads: the number of leading heads with ALiBi.
        rotary_argument: the index of (cos, sin) among the arguments of the module's ``forward`` if they are to be
            replaced, else None.
    """

    flags: ASEntmaxConfig
    num_heads: int
    num_alibi_heads: int
    rotary_argument: int | None

    @property
    def num_unscaled_heads(self) -> int:
        """The number of leading heads without length scaling: under NAPE the ALiBi heads, as in the authors' code."""
        return self.num_alibi_heads if self.flags.positions == "nape" else 0


@functools.cache
def calls_attention_interface(cls: type) -> bool:
    """Whether a module's class calls transformers' ``ALL_ATTENTION_FUNCTIONS``."""
    for member in vars(cls).values():
        function = inspect.unwrap(member) if callable(member) else member
        if isinstance(function, types.FunctionType) and "ALL_ATTENTION_FUNCTIONS" in function.__code__.co_names:
            return True
    return any(calls_attention_interface(base) for base in cls.__bases__ if base not in (nn.Module, object))


def check_no_own_table(model: PreTrainedModel, preset: str) -> None:
    """Refuse a model that looks its attention class up in a table of its own, before the lookup fails.

    Older families (Falcon, GPT-J) have a dict in their modeling file from the implementation to a class. It is found
    through the constructors: those of the model's class, and of the classes that they name. Constructors of models
    inside the model are left to these models' own check.

    Raises:
        NotImplementedError: such a table has no entry for the preset.
    """
    seen: set[Any] = set()
    classes: list[type] = [type(model)]
    while classes:
        constructor = inspect.unwrap(classes.pop().__init__)  # type: ignore[misc]
        if constructor in seen or not isinstance(constructor, types.FunctionType):
            continue
        seen.add(constructor)
        for name in _names_in(constructor.__code__):
            value = constructor.__globals__.get(name)
            if isinstance(value, dict) and "eager" in value and preset not in value and _holds_modules(value):
                raise NotImplementedError(
                    f"{type(model).__name__} (model_type {model.config.model_type!r}) chooses its attention from a "
                    f"table of its own, {name} (entries: {', '.join(map(str, value))}), and not through transformers' "
                    f"attention interface, so hf_asentmax cannot change it. {_SUPPORTED_MODELS}"
                )
            if isinstance(value, type) and issubclass(value, nn.Module) and not issubclass(value, PreTrainedModel):
                classes.append(value)


def _names_in(code: types.CodeType) -> Iterator[str]:
    """The global names that a function's code uses, with those of comprehensions and functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _holds_modules(table: dict[Any, Any]) -> bool:
    return all(isinstance(value, type) and issubclass(value, nn.Module) for value in table.values())


def _own_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model, except those of models inside it, whose own ``post_init`` installs them."""

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if not isinstance(child, PreTrainedModel):
                yield f"{prefix}{name}", child
                yield from walk(f"{prefix}{name}.", child)

    return walk("", model)


def installed_attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The names and attention modules of a model that `install` has prepared."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, SETTINGS_ATTRIBUTE))


def install(model: PreTrainedModel) -> None:
    """Prepare a model that is being built, before its weights are initialised or loaded.

    Each attention module gets its settings, the parameters of its length scaling, and a pre-hook that passes the
    layer's input to the attention function. Models with other attention implementations are not changed.

    Raises:
        NotImplementedError: the model is not supported; the message says why.
        ValueError: the flags do not fit the model.
    """
    if preset_of(model.config) is None:
        return
    flags = flags_of(model.config)
    attentions = {name: module for name, module in _own_modules(model) if calls_attention_interface(type(module))}  # type: ignore[arg-type]
    if not attentions:
        _check_parts(model)
        return
    for name, attention in attentions.items():
        _check_attention(model, name, attention, flags)
    if flags.positions != "model":
        turn_off_positions(model, list(attentions.values()), flags.positions)
    for attention in attentions.values():
        _install_attention(attention, model.config, flags)
    model.register_forward_pre_hook(packing_pre_hook, with_kwargs=True)


def _check_parts(model: PreTrainedModel) -> None:
    """Check a model whose attention belongs to models inside it: a base model, or the parts of a composite model."""
    installed = [attention for _, attention in installed_attentions(model)]
    if not installed:
        raise NotImplementedError(_no_attention_message(model))
    flags = getattr(model.config, "asentmax", None)
    if flags is not None and all(attention.config is not model.config for attention in installed):
        raise ValueError(
            f"config.asentmax is set on {type(model.config).__name__}, but the attention belongs to a part of "
            f"{type(model).__name__}, which does not read it: set it on that part, e.g. config.text_config.asentmax"
        )


def _no_attention_message(model: PreTrainedModel) -> str:
    return (
        f"{type(model).__name__} (model_type {model.config.model_type!r}) has no attention that goes through "
        "transformers' attention interface (ALL_ATTENTION_FUNCTIONS), so hf_asentmax cannot change it. "
        f"{_SUPPORTED_MODELS}"
    )


def _check_attention(model: PreTrainedModel, name: str, attention: nn.Module, flags: ASEntmaxConfig) -> None:
    where = f"{type(attention).__name__} at {name!r} of {type(model).__name__}"
    if getattr(attention, "is_cross_attention", False) or not getattr(attention, "is_causal", True):
        raise NotImplementedError(
            f"hf_asentmax supports causal self-attention (decoders), but {where} is not causal. For a multimodal "
            "model set the implementation of the text part only: "
            "attn_implementation={'text_config': 'asentmax', 'vision_config': 'sdpa'}"
        )
    parameters = inspect.signature(attention.forward).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise NotImplementedError(
            f"{where} takes no **kwargs, so the layer's input, from which beta and gamma are projected, cannot reach "
            "the attention function; use a family whose attention takes **kwargs"
        )


def _install_attention(attention: nn.Module, config: Any, flags: ASEntmaxConfig) -> None:
    num_heads = config.num_attention_heads
    settings = AttentionSettings(
        flags=flags,
        num_heads=num_heads,
        num_alibi_heads=flags.num_alibi_heads(num_heads),
        rotary_argument=None if flags.positions == "model" else rotary_argument(attention),
    )
    scaling = build_scaling(
        flags.scaling,
        num_heads=num_heads - settings.num_unscaled_heads,
        hidden_size=_input_width(attention, config.hidden_size),
        delta=flags.delta,
        gamma_range=flags.gamma_range,
    )
    setattr(attention, SETTINGS_ATTRIBUTE, settings)
    if scaling is not None and scaling.num_heads > 0:
        setattr(attention, SCALING_ATTRIBUTE, scaling)
    attention.register_forward_pre_hook(_attention_pre_hook, with_kwargs=True)


def _input_width(attention: nn.Module, hidden_size: int) -> int:
    """The width of the attention's input, by its projections: the width that most of them read, else hidden_size.

    The two differ where the input is a concatenation (Zamba: the hidden states and the embeddings). hidden_size wins
    a tie, because the output projection reads another width.
    """
    counts = Counter(child.in_features for child in attention.children() if isinstance(child, nn.Linear))
    return max(counts, key=lambda width: (counts[width], width == hidden_size), default=hidden_size)


def _attention_pre_hook(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the layer's input and the cache to the attention function, and switch rotary positions off."""
    settings: AttentionSettings = getattr(attention, SETTINGS_ATTRIBUTE)
    if preset_of(attention.config) is None:  # type: ignore[arg-type]
        raise RuntimeError(
            f"the config of a model with hf_asentmax's attention was changed to attn_implementation="
            f"{attention.config._attn_implementation!r} after it was built, so the model would run another attention. "  # type: ignore[union-attr]
            "Give each model its own config"
        )
    kwargs = dict(kwargs)
    kwargs[HIDDEN_STATES_ARGUMENT] = args[0] if args else kwargs.get("hidden_states")
    if settings.num_alibi_heads > 0 and kwargs.get("past_key_values") is not None:
        kwargs[CACHE_ARGUMENT] = kwargs["past_key_values"]
    place = settings.rotary_argument
    if place is not None:
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = without_rotation(kwargs["position_embeddings"])
        elif place < len(args) and args[place] is not None:
            args = (*args[:place], without_rotation(args[place]), *args[place + 1 :])
    return args, kwargs


def scaling_of(attention: nn.Module) -> LengthScaling | None:
    """The module of the length scaling (the wrapper under an adapter), or None."""
    return getattr(attention, SCALING_ATTRIBUTE, None)
