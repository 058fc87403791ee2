"""Contradictions between flags, config.json and arguments, and models that are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_asentmax import ASEntmaxConfig

from checkpoints import VARIANTS, edit_config_file, logits
from tiny_models import perturbed_model, tiny_config, tiny_model


@pytest.mark.parametrize("requested", ["sdpa", "eager", "flash_attention_2"])
def test_asking_for_another_attention_contradicts_the_checkpoint(
    requested: str, checkpoint: tuple[Path, PreTrainedModel]
):
    with pytest.raises(ValueError, match=rf"config\.asentmax is set .*'{requested}' would ignore it"):
        AutoModelForCausalLM.from_pretrained(checkpoint[0], attn_implementation=requested)


@pytest.mark.parametrize("requested", ["ssmax", "entmax", "adaptive_temperature", "topk_softmax"])
def test_asking_for_another_preset_contradicts_the_checkpoint(requested: str, checkpoint: tuple[Path, PreTrainedModel]):
    with pytest.raises(ValueError, match=rf"attn_implementation='{requested}'"):
        AutoModelForCausalLM.from_pretrained(checkpoint[0], attn_implementation=requested)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "learned"])
def test_asking_for_the_name_it_was_built_with_is_no_contradiction(variant: str, tmp_path: Path):
    name, flags = VARIANTS[variant]
    model = perturbed_model("llama", name, flags)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == name
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    assert torch.equal(logits(reloaded), logits(model))


def test_flags_with_another_attention_are_refused():
    config = tiny_config("llama")
    config.asentmax = ASEntmaxConfig(positions="nape")
    with pytest.raises(ValueError, match=r"attn_implementation='sdpa' would ignore it"):
        AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def set_entry(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries.__setitem__(name, value)


def set_flag(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries["asentmax"].__setitem__(name, value)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (set_flag("alpha", 3.0), ValueError, "alpha must lie between 1"),
        (set_flag("alpha", "1.5"), TypeError, "alpha must be a number, got '1.5'"),
        (set_flag("alpha", float("nan")), ValueError, "alpha must lie between 1"),
        (set_flag("scaling", "magic"), ValueError, "scaling must be one of none, ssmax, asentmax"),
        (set_flag("positions", "rope"), ValueError, "positions must be one of model, nope, alibi, nape"),
        (set_flag("alibi_heads", 99), ValueError, "alibi_heads must be at most the model's 4 heads, got 99"),
        (set_flag("top_k", 4), ValueError, "top_k keeps the best keys of a softmax"),
        (set_flag("temperature", 1), TypeError, "unknown flag 'temperature'; the flags are alpha"),
        (set_flag("alfa", 1), TypeError, r"unknown flag 'alfa' \(did you mean 'alpha'\?\)"),
        (set_entry("asentmax", "yes please"), TypeError, "config.asentmax must be an ASEntmaxConfig or a dict"),
        (set_entry("asentmax", []), TypeError, "config.asentmax must be an ASEntmaxConfig or a dict"),
        (set_entry("asentmax", 1.5), TypeError, "config.asentmax must be an ASEntmaxConfig or a dict"),
        (lambda entries: entries.pop("asentmax"), ValueError, 'has no "asentmax" flags'),
        (set_entry("asentmax", None), ValueError, 'has no "asentmax" flags'),
        (set_entry("attn_implementation", "asentmaxx"), ValueError, "asentmaxx"),
        (set_entry("attn_implementation", "sdpa"), ValueError, "would ignore it"),
    ],
)
def test_config_file_edited_into_nonsense(
    edit: Callable[[dict[str, Any]], None],
    error: type[Exception],
    message: str,
    checkpoint: tuple[Path, PreTrainedModel],
):
    path, _ = checkpoint
    edit_config_file(path, edit)
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(path)


def test_config_file_without_the_implementation_entry_still_restores(checkpoint: tuple[Path, PreTrainedModel]):
    path, model = checkpoint
    edit_config_file(path, lambda entries: entries.pop("attn_implementation"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(model))


def test_config_file_with_few_flags_written_by_hand(checkpoint: tuple[Path, PreTrainedModel]):
    path, model = checkpoint
    edit_config_file(path, set_entry("asentmax", {"positions": "nape"}))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(model))


def test_flags_that_do_not_fit_the_weights_say_so(
    checkpoint: tuple[Path, PreTrainedModel], transformers_log: list[str]
):
    """With 3 scaled heads instead of 2, transformers names the parameters whose shapes differ."""
    path, _ = checkpoint
    edit_config_file(path, set_flag("alibi_heads", 1))
    with pytest.raises(RuntimeError, match=r"(?s)mismatch"):
        AutoModelForCausalLM.from_pretrained(path)
    assert any("length_scaling" in message and "MISMATCH" in message for message in transformers_log)


_BERT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
_BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}


@pytest.mark.parametrize(
    ("model_class", "config", "message"),
    [
        (T5ForConditionalGeneration, T5Config(**_T5), "T5ForConditionalGeneration is an encoder-decoder model"),
        (BartForConditionalGeneration, BartConfig(**_BART), "BartForConditionalGeneration is an encoder-decoder model"),
        (BartForCausalLM, BartConfig(**_BART), "BartDecoder is not causal"),
        (BertModel, BertConfig(**_BERT), "BertSelfAttention at 'encoder.layer.0.attention.self'.* is not causal"),
        (
            MambaForCausalLM,
            MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1),
            "MambaModel .* has no attention that goes through",
        ),
    ],
    ids=["T5", "BART", "BART decoder", "BERT", "Mamba"],
)
@pytest.mark.parametrize("name", ["asentmax", "entmax"])
def test_models_that_are_refused(model_class: Any, config: Any, message: str, name: str):
    with pytest.raises(NotImplementedError, match=message):
        model_class._from_config(copy.deepcopy(config), attn_implementation=name)
    model_class._from_config(copy.deepcopy(config))  # still works without the plugin's attention


def test_too_many_alibi_heads_for_the_model():
    with pytest.raises(ValueError, match=r"alibi_heads must be at most the model's 4 heads, got 5"):
        tiny_model("llama", "asentmax", {"positions": "nape", "alibi_heads": 5})


def test_wrong_type_on_the_config():
    with pytest.raises(TypeError, match=r"must be an ASEntmaxConfig or a dict of its flags, got 'nape'"):
        tiny_model("llama", "asentmax", "nape")
    with pytest.raises(TypeError, match=r"unknown flag 'alfa' \(did you mean 'alpha'\?\)"):
        tiny_model("llama", "asentmax", {"alfa": 1.5})


@pytest.mark.parametrize("requested", ["sdpa", "eager", "ssmax", {"": "sdpa"}])
def test_switching_a_built_model_is_refused(requested: Any):
    model = tiny_model("llama", "asentmax")
    expected = logits(model)
    with pytest.raises(ValueError, match=r"cannot be switched from 'asentmax' to .*from_pretrained"):
        model.set_attn_implementation(requested)
    assert torch.equal(logits(model), expected)
    model.set_attn_implementation("asentmax")
    assert torch.equal(logits(model), expected)


def test_switching_a_softmax_model_to_ours_is_refused_and_to_others_is_not():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"cannot be switched from 'sdpa' to 'asentmax'"):
        model.set_attn_implementation("asentmax")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
