"""ASEntmaxConfig: types, ranges and combinations of flags, presets, and round trips through config.json."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_asentmax import ASEntmaxConfig
from hf_asentmax.config import ALIBI_SLOPES, POSITIONS, PRESETS, SCALINGS

from tiny_models import tiny_config

FLAGS = ("alpha", "scaling", "delta", "gamma_range", "positions", "alibi_heads", "alibi_slopes", "top_k")
# For each flag a valid value, and the flags that this value needs
EXAMPLES: dict[str, dict[str, Any]] = {
    "alpha": {"alpha": 1.25},
    "scaling": {"scaling": "ssmax"},
    "delta": {"delta": 0.5},
    "gamma_range": {"gamma_range": 3.0},
    "positions": {"positions": "nope"},
    "alibi_heads": {"alibi_heads": 2, "positions": "nape"},
    "alibi_slopes": {"alibi_slopes": "geometric", "positions": "alibi"},
    "top_k": {"top_k": 8},
}
NOT_NUMBERS = ("1.5", True, False, [1.5], {}, 1j)
NOT_WHOLE = ("2", True, 2.0, 2.5, [2])
NOT_STRINGS = (1, True, 1.0, ["nape"], b"nape")


def error_of(expected: type[Exception], **flags: Any) -> str:
    with pytest.raises(expected) as caught:
        ASEntmaxConfig(**flags)
    return str(caught.value)


# --- defaults and presets


def test_defaults_are_the_papers():
    assert ASEntmaxConfig().to_dict() == {
        "alpha": 1.5,
        "scaling": "asentmax",
        "delta": 1.0,
        "gamma_range": 2.0,
        "positions": "model",
        "alibi_heads": None,
        "alibi_slopes": None,
        "top_k": None,
    }


def test_the_contracts_example():
    config = ASEntmaxConfig(alpha=1.5, scaling="asentmax", positions="nape")
    assert (config.positions, config.alibi_heads, config.alibi_slopes) == ("nape", None, "harmonic")
    assert config.num_alibi_heads(8) == 4


@pytest.mark.parametrize(
    ("name", "alpha", "scaling"),
    [
        ("asentmax", 1.5, "asentmax"),
        ("entmax", 1.5, "none"),
        ("ssmax", 1.0, "ssmax"),
        ("adaptive_temperature", 1.0, "adaptive_temperature"),
        ("topk_softmax", 1.0, "none"),
    ],
)
def test_preset(name: str, alpha: float, scaling: str):
    config = ASEntmaxConfig.from_preset(name)
    assert (config.alpha, config.scaling) == (alpha, scaling)
    assert (config.top_k is not None) == (name == "topk_softmax")
    assert config.positions == "model"


def test_presets_are_exactly_the_contracts():
    assert set(PRESETS) == {"asentmax", "entmax", "ssmax", "adaptive_temperature", "topk_softmax"}


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("asentmax", {"alpha": 2.0}, {"alpha": 2.0, "scaling": "asentmax"}),
        ("asentmax", {"scaling": "none"}, {"alpha": 1.5, "scaling": "none", "delta": None}),
        ("asentmax", {"delta": 0.0}, {"delta": 0.0}),
        ("asentmax", {"gamma_range": 3}, {"gamma_range": 3.0}),
        ("asentmax", {"positions": "nape", "alibi_heads": 1}, {"positions": "nape", "alibi_heads": 1}),
        ("entmax", {"scaling": "learned"}, {"alpha": 1.5, "scaling": "learned", "delta": 1.0}),
        ("ssmax", {"alpha": 1.25}, {"alpha": 1.25, "scaling": "ssmax"}),
        ("topk_softmax", {"top_k": 3}, {"top_k": 3, "alpha": 1.0}),
        ("topk_softmax", {"scaling": "ssmax"}, {"top_k": PRESETS["topk_softmax"]["top_k"], "scaling": "ssmax"}),
        # equal to another preset's value, but given explicitly: it still overrides
        ("ssmax", {"scaling": "asentmax"}, {"alpha": 1.0, "scaling": "asentmax", "gamma_range": 2.0}),
        ("entmax", {"alpha": 1.5, "scaling": "asentmax"}, {"scaling": "asentmax"}),
    ],
)
def test_explicit_flag_wins_over_the_preset(name: str, flags: dict[str, Any], expected: dict[str, Any], as_dict: bool):
    config = ASEntmaxConfig.from_preset(name, flags if as_dict else ASEntmaxConfig(**flags))
    assert {flag: getattr(config, flag) for flag in expected} == expected


def test_a_default_that_was_not_given_does_not_win():
    """ASEntmaxConfig() does not override `ssmax`: its alpha of 1.5 is a default and was not given."""
    assert ASEntmaxConfig.from_preset("ssmax", ASEntmaxConfig(positions="nope")).alpha == 1.0


def test_flags_that_can_only_mean_softmax_imply_it():
    assert ASEntmaxConfig(top_k=8).to_dict()["alpha"] == 1.0
    assert ASEntmaxConfig(top_k=8).scaling == "none"
    assert ASEntmaxConfig(scaling="adaptive_temperature").alpha == 1.0


def test_unknown_preset_lists_the_presets():
    with pytest.raises(ValueError, match=r"'asentmaxx'.*asentmax, entmax, ssmax, adaptive_temperature, topk_softmax"):
        ASEntmaxConfig.from_preset("asentmaxx")


@pytest.mark.parametrize("flags", [3, "asentmax", ["alpha"], 1.5, True])
def test_flags_of_a_wrong_type_are_refused(flags: Any):
    with pytest.raises(TypeError, match=r"config\.asentmax must be an ASEntmaxConfig or a dict.*got"):
        ASEntmaxConfig.from_preset("asentmax", flags)


@pytest.mark.parametrize("flags", [{1: 2}, {None: 1}, {"alpha": 1.5, 2.0: "x"}, {("alpha",): 1.5}])
def test_names_of_flags_must_be_strings(flags: dict[Any, Any]):
    with pytest.raises(TypeError, match="names of flags must be strings"):
        ASEntmaxConfig.from_preset("asentmax", flags)


def test_a_clash_with_the_preset_names_the_preset():
    with pytest.raises(ValueError, match=r"attn_implementation='topk_softmax'.*alpha=1"):
        ASEntmaxConfig.from_preset("topk_softmax", {"alpha": 1.5})


# --- unknown flags


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("alfa", "alpha"),
        ("Alpha", "alpha"),
        ("scalings", "scaling"),
        ("position", "positions"),
        ("alibi_head", "alibi_heads"),
        ("topk", "top_k"),
        ("gamma_ranges", "gamma_range"),
    ],
)
def test_unknown_flag_is_named_with_a_suggestion(name: str, meant: str):
    message = error_of(TypeError, **{name: 1})
    assert f"{name!r} (did you mean {meant!r}?)" in message
    assert ", ".join(FLAGS) in message


def test_unknown_flag_without_a_neighbour_lists_the_flags():
    message = error_of(TypeError, temperature=1)
    assert "unknown flag 'temperature'" in message and "did you mean" not in message
    assert ", ".join(FLAGS) in message


def test_private_names_and_positional_arguments_are_no_flags():
    assert "unknown flag '_given'" in error_of(TypeError, _given={})
    with pytest.raises(TypeError):
        ASEntmaxConfig(1.5)  # type: ignore[misc]


# --- types


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(("alpha", "delta", "gamma_range"), NOT_NUMBERS),
        *itertools.product(("alibi_heads", "top_k"), NOT_WHOLE),
        *itertools.product(("scaling", "positions", "alibi_slopes"), NOT_STRINGS),
    ],
    ids=repr,
)
def test_wrong_type(name: str, value: Any):
    message = error_of(TypeError, **{**EXAMPLES[name], name: value})
    expected = {"alpha": "a number", "delta": "a number", "gamma_range": "a number"}
    expected |= {"alibi_heads": "a whole number", "top_k": "a whole number"}
    assert message == f"{name} must be {expected.get(name, 'a string')}, got {value!r}"


def test_whole_numbers_are_numbers():
    config = ASEntmaxConfig(alpha=2, delta=0, gamma_range=3)
    assert [type(value) for value in (config.alpha, config.delta, config.gamma_range)] == [float] * 3


def test_none_means_left_out():
    assert ASEntmaxConfig(**dict.fromkeys(FLAGS)) == ASEntmaxConfig()


# --- ranges


@pytest.mark.parametrize("value", [0.99, 0, -1, 2.0001, 3, float("nan"), float("inf"), float("-inf")])
def test_alpha_out_of_range(value: float):
    message = error_of(ValueError, alpha=value)
    assert "alpha must lie between 1 (softmax) and 2 (sparsemax)" in message and repr(value) in message


@pytest.mark.parametrize("value", [1, 1.0, 1.0001, 1.25, 1.5, 2, 2.0])
def test_alpha_in_range(value: float):
    assert ASEntmaxConfig(alpha=value).alpha == value


@pytest.mark.parametrize("value", [-0.1, -1, float("nan"), float("inf")])
def test_delta_out_of_range(value: float):
    message = error_of(ValueError, delta=value)
    assert message == f"delta must be a finite number of at least 0, got {value!r}"


@pytest.mark.parametrize("value", [0, 0.0, -2, float("nan"), float("inf")])
def test_gamma_range_out_of_range(value: float):
    message = error_of(ValueError, gamma_range=value)
    assert message == f"gamma_range must be a finite number above 0, got {value!r}"


@pytest.mark.parametrize("value", [0, -1])
def test_alibi_heads_out_of_range(value: int):
    message = error_of(ValueError, positions="nape", alibi_heads=value)
    assert f"alibi_heads must be at least 1, got {value}" in message and "positions='nope'" in message


@pytest.mark.parametrize("value", [0, -5])
def test_top_k_out_of_range(value: int):
    assert error_of(ValueError, top_k=value) == f"top_k must be at least 1, got {value}"


@pytest.mark.parametrize(
    ("name", "allowed"), [("scaling", SCALINGS), ("positions", POSITIONS), ("alibi_slopes", ALIBI_SLOPES)]
)
@pytest.mark.parametrize("value", ["unknown", "", "NAPE", "Asentmax", " none"])
def test_unknown_name_lists_the_allowed(name: str, allowed: tuple[str, ...], value: str):
    message = error_of(ValueError, **{**EXAMPLES[name], name: value})
    assert message == f"{name} must be one of {', '.join(allowed)}; got {value!r}"


def test_the_names_are_the_contracts():
    assert SCALINGS == ("none", "ssmax", "asentmax", "learned", "adaptive_temperature")
    assert POSITIONS == ("model", "nope", "alibi", "nape")
    assert ALIBI_SLOPES == ("harmonic", "geometric")


# --- combinations


@pytest.mark.parametrize("scaling", ["none", "ssmax", "adaptive_temperature"])
def test_delta_without_its_scaling(scaling: str):
    message = error_of(ValueError, scaling=scaling, delta=1.0)
    assert "delta belongs to scaling='asentmax' or 'learned'" in message and repr(scaling) in message


@pytest.mark.parametrize("scaling", ["none", "ssmax", "learned", "adaptive_temperature"])
def test_gamma_range_without_its_scaling(scaling: str):
    message = error_of(ValueError, scaling=scaling, gamma_range=2.0)
    assert "gamma_range belongs to scaling='asentmax'" in message and repr(scaling) in message


@pytest.mark.parametrize("positions", ["model", "nope", "alibi"])
def test_alibi_heads_without_nape(positions: str):
    message = error_of(ValueError, positions=positions, alibi_heads=2)
    assert "alibi_heads belongs to positions='nape'" in message and repr(positions) in message


@pytest.mark.parametrize("positions", ["model", "nope"])
def test_alibi_slopes_without_alibi(positions: str):
    message = error_of(ValueError, positions=positions, alibi_slopes="harmonic")
    assert "alibi_slopes belongs to positions='alibi' or 'nape'" in message and repr(positions) in message


@pytest.mark.parametrize("flags", [{"alpha": 1.5}, {"alpha": 1.0, "scaling": "adaptive_temperature"}])
def test_top_k_without_plain_softmax(flags: dict[str, Any]):
    message = error_of(ValueError, top_k=8, **flags)
    assert "top_k" in message and "alpha=1" in message and "adaptive_temperature" in message


def test_adaptive_temperature_without_softmax():
    message = error_of(ValueError, scaling="adaptive_temperature", alpha=1.5)
    assert "needs alpha=1, got 1.5" in message


@pytest.mark.parametrize("flags", [{"scaling": "ssmax"}, {"scaling": "learned"}, {"scaling": "asentmax"}])
def test_top_k_goes_with_a_scaling(flags: dict[str, Any]):
    assert ASEntmaxConfig(top_k=8, **flags).scaling == flags["scaling"]


# --- heads


def test_number_of_alibi_heads():
    assert ASEntmaxConfig().num_alibi_heads(4) == 0
    assert ASEntmaxConfig(positions="nope").num_alibi_heads(4) == 0
    assert ASEntmaxConfig(positions="alibi").num_alibi_heads(4) == 4
    assert ASEntmaxConfig(positions="nape").num_alibi_heads(4) == 2
    assert ASEntmaxConfig(positions="nape", alibi_heads=3).num_alibi_heads(4) == 3
    assert ASEntmaxConfig(positions="nape", alibi_heads=4).num_alibi_heads(4) == 4


def test_more_alibi_heads_than_heads():
    with pytest.raises(ValueError, match=r"alibi_heads must be at most the model's 4 heads, got 5"):
        ASEntmaxConfig(positions="nape", alibi_heads=5).num_alibi_heads(4)


def test_half_of_an_odd_number_of_heads():
    with pytest.raises(ValueError, match=r"half of the heads, but the model has 5; set the number with alibi_heads"):
        ASEntmaxConfig(positions="nape").num_alibi_heads(5)
    assert ASEntmaxConfig(positions="nape", alibi_heads=3).num_alibi_heads(5) == 3


# --- round trips


@st.composite
def flags_of_any_kind(draw: st.DrawFn) -> dict[str, Any]:
    """Any valid combination of flags, each given or left out."""
    flags: dict[str, Any] = {"scaling": draw(st.sampled_from(SCALINGS)), "positions": draw(st.sampled_from(POSITIONS))}
    softmax = flags["scaling"] == "adaptive_temperature" or draw(st.booleans())
    flags["alpha"] = 1.0 if softmax else draw(st.floats(1.0, 2.0))
    if flags["scaling"] in ("asentmax", "learned") and draw(st.booleans()):
        flags["delta"] = draw(st.floats(0, 10))
    if flags["scaling"] == "asentmax" and draw(st.booleans()):
        flags["gamma_range"] = draw(st.floats(0, 10, exclude_min=True))
    if flags["positions"] == "nape" and draw(st.booleans()):
        flags["alibi_heads"] = draw(st.integers(1, 64))
    if flags["positions"] in ("alibi", "nape") and draw(st.booleans()):
        flags["alibi_slopes"] = draw(st.sampled_from(ALIBI_SLOPES))
    if flags["alpha"] == 1.0 and flags["scaling"] != "adaptive_temperature" and draw(st.booleans()):
        flags["top_k"] = draw(st.integers(1, 1000))
    return flags


@given(flags_of_any_kind())
def test_round_trips(flags: dict[str, Any]):
    config = ASEntmaxConfig(**flags)
    assert ASEntmaxConfig(**config.to_dict()) == config
    assert ASEntmaxConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert tuple(config.to_dict()) == FLAGS
    # the flags of a checkpoint override any preset
    for name in PRESETS:
        try:
            resolved = ASEntmaxConfig.from_preset(name, config.to_dict())
        except ValueError:
            continue  # e.g. entmax under topk_softmax
        assert {**resolved.to_dict(), "top_k": None} == {**config.to_dict(), "top_k": None}
    assert ASEntmaxConfig.from_preset("asentmax", config.to_dict()) == config


def test_copy_and_pickle_keep_what_was_given():
    config = ASEntmaxConfig(positions="nope")
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert ASEntmaxConfig.from_preset("ssmax", other).alpha == 1.0


def test_it_is_frozen_and_shows_its_flags():
    config = ASEntmaxConfig(alpha=1.25)
    with pytest.raises(AttributeError):
        config.alpha = 2.0  # type: ignore[misc]
    assert re.match(r"ASEntmaxConfig\(alpha=1\.25, scaling='asentmax', delta=1\.0", repr(config))
    assert "_given" not in repr(config)
    assert hash(config) == hash(ASEntmaxConfig(alpha=1.25))


def test_to_dict_is_a_copy():
    config = ASEntmaxConfig()
    config.to_dict()["alpha"] = 7
    assert config.alpha == 1.5


@pytest.mark.parametrize("as_dict", [False, True])
def test_on_a_models_config(as_dict: bool):
    """config.asentmax, as an object or a dict, survives transformers' dicts, JSON and copies."""
    flags = ASEntmaxConfig(positions="nape", alibi_heads=1)
    config = tiny_config("llama")
    config.asentmax = flags.to_dict() if as_dict else flags
    for entries in (config.to_dict(), config.to_diff_dict(), json.loads(config.to_json_string())):
        assert entries["asentmax"] == flags.to_dict()
    for other in (copy.deepcopy(config), type(config).from_dict(config.to_dict())):
        assert ASEntmaxConfig.from_preset("asentmax", other.asentmax) == flags
    assert "nape" in repr(config)
