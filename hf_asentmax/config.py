"""ASEntmaxConfig: the flags of the attention with their meanings and ranges, and the presets."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["ALIBI_SLOPES", "POSITIONS", "PRESETS", "SCALINGS", "ASEntmaxConfig"]

SCALINGS = ("none", "ssmax", "asentmax", "learned", "adaptive_temperature")
POSITIONS = ("model", "nope", "alibi", "nape")
ALIBI_SLOPES = ("harmonic", "geometric")

# The flags that each `attn_implementation` stands for. A flag that is given explicitly overrides the preset.
PRESETS: dict[str, dict[str, Any]] = {
    "asentmax": {"alpha": 1.5, "scaling": "asentmax"},
    "entmax": {"alpha": 1.5, "scaling": "none"},
    "ssmax": {"alpha": 1.0, "scaling": "ssmax"},
    "adaptive_temperature": {"alpha": 1.0, "scaling": "adaptive_temperature"},
    "topk_softmax": {"alpha": 1.0, "scaling": "none", "top_k": 64},
}


@dataclass(frozen=True, init=False)
class ASEntmaxConfig:
    """The flags of the attention ("Long-Context Generalization with Sparse Attention", ICLR 2026, sections 2 and 3).

    Set it on a model's config before the model is built::

        config.asentmax = ASEntmaxConfig(positions="nape")  # or a dict of flags
        model = AutoModelForCausalLM.from_config(config, attn_implementation="asentmax")

    A flag that is left out (or None) comes from the preset that ``attn_implementation`` names: `asentmax`, `entmax`,
    `ssmax`, `adaptive_temperature` or `topk_softmax`. Without an ``attn_implementation`` it comes from `asentmax`.

    Attributes:
        alpha: the alpha of alpha-entmax, the mapping from scores to weights. 1 is softmax, 1.5 is the value of the
            method, 2 is sparsemax.
        scaling: the factor on query i's scores, where n_i is the number of keys that the query sees.
            ``none``: 1. ``ssmax``: s_h log n_i, with one learned s per head (Nakanishi 2025). ``asentmax``: delta +
            beta (log(1 + n_i))^gamma, where beta and gamma are learned projections of the layer's input. ``learned``:
            the same with one learned beta and gamma per head. ``adaptive_temperature``: a function of the softmax
            row's entropy without parameters, used outside training only (Velickovic et al. 2024; alpha = 1 only).
        delta: the constant of `asentmax` and `learned`, >= 0, by default 1 (None for the other scalings).
        gamma_range: the factor in gamma = gamma_range * tanh(...) of `asentmax`, > 0, by default 2 (None for the other
            scalings).
        positions: ``model``: the model's own positions. ``nope``: none. ``alibi``: ALiBi on every head. ``nape``:
            ALiBi on the first `alibi_heads` heads, and no positions on the others; only these others are scaled. All
            values but ``model`` switch the model's own positions off.
        alibi_heads: the number of heads with ALiBi under `nape`, by default half of all heads (None for other
            positions).
        alibi_slopes: ``harmonic`` (slope 1/h for head h = 1, 2, ...) or ``geometric`` (1/2^(h-1)); None without ALiBi
            heads.
        top_k: each query keeps its k keys with the largest scores, and softmax runs over them (alpha = 1 only). None
            keeps all keys.

    Raises:
        TypeError: a flag is unknown, or a value has the wrong type.
        ValueError: a value is out of range, or flags contradict each other.
    """

    alpha: float
    scaling: str
    delta: float | None
    gamma_range: float | None
    positions: str
    alibi_heads: int | None
    alibi_slopes: str | None
    top_k: int | None
    # The flags that were given explicitly. They override a preset.
    _given: dict[str, Any] = field(repr=False, compare=False)

    def __init__(
        self,
        *,
        alpha: float | None = None,
        scaling: str | None = None,
        delta: float | None = None,
        gamma_range: float | None = None,
        positions: str | None = None,
        alibi_heads: int | None = None,
        alibi_slopes: str | None = None,
        top_k: int | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(_unknown_flags_message(unknown))
        given = {
            name: value
            for name, value in {
                "alpha": alpha,
                "scaling": scaling,
                "delta": delta,
                "gamma_range": gamma_range,
                "positions": positions,
                "alibi_heads": alibi_heads,
                "alibi_slopes": alibi_slopes,
                "top_k": top_k,
            }.items()
            if value is not None
        }
        object.__setattr__(self, "_given", given)
        values: dict[str, Any] = {**PRESETS["asentmax"], **_implied_by(given), **given}
        self._set(values)

    def _set(self, values: dict[str, Any]) -> None:
        values = {"positions": "model", **values}
        _check_types(values)
        if values["scaling"] in ("asentmax", "learned"):
            values.setdefault("delta", 1.0)
        if values["scaling"] == "asentmax":
            values.setdefault("gamma_range", 2.0)
        if values["positions"] in ("alibi", "nape"):
            values.setdefault("alibi_slopes", "harmonic")
        _check_ranges(values)
        _check_combinations(values)
        for name in _FLAGS:
            value = values.get(name)
            if isinstance(value, int) and name in ("alpha", "delta", "gamma_range"):
                value = float(value)
            object.__setattr__(self, name, value)

    @classmethod
    def from_preset(cls, name: str, flags: ASEntmaxConfig | dict[str, Any] | None = None) -> ASEntmaxConfig:
        """The flags of a preset, overridden by the flags that were given explicitly.

        Args:
            name: one of `asentmax`, `entmax`, `ssmax`, `adaptive_temperature`, `topk_softmax`.
            flags: an ASEntmaxConfig, a dict of flags, or None.

        Raises:
            TypeError, ValueError: the name or a flag is unknown, or a value has a wrong type or range or contradicts
                another flag.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
        if flags is None:
            flags = {}
        if isinstance(flags, dict):
            if not all(isinstance(name, str) for name in flags):
                raise TypeError(f"the names of flags must be strings, got {list(flags)}")
            flags = cls(**flags)
        if not isinstance(flags, ASEntmaxConfig):
            raise TypeError(f"config.asentmax must be an ASEntmaxConfig or a dict of its flags, got {flags!r}")
        config = object.__new__(cls)
        object.__setattr__(config, "_given", dict(flags._given))
        try:
            config._set({**PRESETS[name], **flags._given})
        except ValueError as error:
            raise ValueError(f"attn_implementation={name!r} with {flags._given}: {error}") from error
        return config

    def to_dict(self) -> dict[str, Any]:
        """All flags, for config.json. A flag without meaning in this combination is None."""
        return {name: getattr(self, name) for name in _FLAGS}

    def num_alibi_heads(self, num_heads: int) -> int:
        """The number of heads with ALiBi in a model with `num_heads` heads.

        Raises:
            ValueError: there are more ALiBi heads than heads, or the default is half of an odd number.
        """
        if self.positions == "alibi":
            return num_heads
        if self.positions != "nape":
            return 0
        if self.alibi_heads is None:
            if num_heads % 2 != 0:
                raise ValueError(
                    f"positions='nape' gives ALiBi to half of the heads, but the model has {num_heads}; "
                    "set the number with alibi_heads"
                )
            return num_heads // 2
        if self.alibi_heads > num_heads:
            raise ValueError(f"alibi_heads must be at most the model's {num_heads} heads, got {self.alibi_heads}")
        return self.alibi_heads


_FLAGS = tuple(flag.name for flag in fields(ASEntmaxConfig) if flag.compare)


def _implied_by(given: dict[str, Any]) -> dict[str, Any]:
    """The flags that other flags imply without a preset: top_k and adaptive temperature are defined on softmax."""
    if "top_k" in given:
        return {"alpha": 1.0, "scaling": "none"}
    if given.get("scaling") == "adaptive_temperature":
        return {"alpha": 1.0}
    return {}


def _unknown_flags_message(unknown: dict[str, Any]) -> str:
    hints = []
    for name in unknown:
        close = difflib.get_close_matches(name, _FLAGS, n=1)
        hints.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    return f"unknown flag {', '.join(hints)}; the flags are {', '.join(_FLAGS)}"


def _check_types(values: dict[str, Any]) -> None:
    for name in ("alpha", "delta", "gamma_range"):
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{name} must be a number, got {value!r}")
    for name in ("alibi_heads", "top_k"):
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
    for name in ("scaling", "positions", "alibi_slopes"):
        value = values.get(name)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be a string, got {value!r}")


def _check_ranges(values: dict[str, Any]) -> None:
    for name, allowed in (("scaling", SCALINGS), ("positions", POSITIONS), ("alibi_slopes", ALIBI_SLOPES)):
        value = values.get(name)
        if value is not None and value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if not 1.0 <= values["alpha"] <= 2.0:
        raise ValueError(
            f"alpha must lie between 1 (softmax) and 2 (sparsemax), got {values['alpha']!r}; the method uses 1.5"
        )
    # NaN fails these comparisons too.
    if values.get("delta") is not None and not 0.0 <= values["delta"] < float("inf"):
        raise ValueError(f"delta must be a finite number of at least 0, got {values['delta']!r}")
    if values.get("gamma_range") is not None and not 0.0 < values["gamma_range"] < float("inf"):
        raise ValueError(f"gamma_range must be a finite number above 0, got {values['gamma_range']!r}")
    if values.get("alibi_heads") is not None and values["alibi_heads"] < 1:
        raise ValueError(
            f"alibi_heads must be at least 1, got {values['alibi_heads']!r}; for none use positions='nope'"
        )
    if values.get("top_k") is not None and values["top_k"] < 1:
        raise ValueError(f"top_k must be at least 1, got {values['top_k']!r}")


def _check_combinations(values: dict[str, Any]) -> None:
    scaling, positions, alpha = values["scaling"], values["positions"], values["alpha"]
    if values.get("delta") is not None and scaling not in ("asentmax", "learned"):
        raise ValueError(f"delta belongs to scaling='asentmax' or 'learned'; with scaling={scaling!r} leave it out")
    if values.get("gamma_range") is not None and scaling != "asentmax":
        raise ValueError(f"gamma_range belongs to scaling='asentmax'; with scaling={scaling!r} leave it out")
    if values.get("alibi_heads") is not None and positions != "nape":
        raise ValueError(
            f"alibi_heads belongs to positions='nape'; with positions={positions!r} leave it out "
            "('alibi' gives ALiBi to every head)"
        )
    if values.get("alibi_slopes") is not None and positions not in ("alibi", "nape"):
        raise ValueError(
            f"alibi_slopes belongs to positions='alibi' or 'nape'; with positions={positions!r} leave it out"
        )
    if values.get("top_k") is not None and (alpha != 1.0 or scaling == "adaptive_temperature"):
        raise ValueError(
            f"top_k keeps the best keys of a softmax: it needs alpha=1 (got {alpha!r}) and a scaling other than "
            f"'adaptive_temperature' (got {scaling!r}); entmax chooses its own number of keys"
        )
    if scaling == "adaptive_temperature" and alpha != 1.0:
        raise ValueError(f"scaling='adaptive_temperature' is defined on softmax: it needs alpha=1, got {alpha!r}")
