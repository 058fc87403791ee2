"""Softmax checkpoints as a start, and softmax models in the same process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from checkpoints import logits
from tiny_models import perturb_scalings, perturbed_model, tiny_config, tiny_model


@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, LlamaForCausalLM])
def test_loading_a_softmax_checkpoint_says_once_what_is_new(
    model_class: Any, softmax_checkpoint: Path, transformers_log: list[str]
):
    model, report = model_class.from_pretrained(
        softmax_checkpoint, attn_implementation="asentmax", output_loading_info=True
    )
    names = {name for name, _ in model.named_parameters() if ".length_scaling." in name}
    assert set(report["missing_keys"]) == names and len(names) == 8 and not report["unexpected_keys"]
    mentions = [message for message in transformers_log if "length_scaling" in message]
    assert len(mentions) == 1 and "MISSING" in mentions[0]
    assert all(kind in mentions[0] for kind in ("beta_weight", "beta_bias", "gamma_weight", "gamma_bias"))
    # initialised by the plugin, not by transformers' normal(0, 0.02), and not left uninitialised
    assert all((model.get_parameter(name) == 0).all() for name in names)
    expected = AutoModelForCausalLM.from_pretrained(softmax_checkpoint).state_dict()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters()
               if name not in names)  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "count"), [("ssmax", "s", 2), ("entmax", None, 0), ("topk_softmax", None, 0)])
def test_other_presets_on_a_softmax_checkpoint(
    name: str, kind: str | None, count: int, softmax_checkpoint: Path, transformers_log: list[str]
):
    model = AutoModelForCausalLM.from_pretrained(softmax_checkpoint, attn_implementation=name)
    assert sum(".length_scaling." in parameter for parameter, _ in model.named_parameters()) == count
    assert sum("MISSING" in message for message in transformers_log) == (1 if count else 0)
    assert torch.isfinite(logits(model)).all()


def test_flags_for_a_softmax_checkpoint_go_on_its_config(softmax_checkpoint: Path):
    config = AutoConfig.from_pretrained(softmax_checkpoint)
    config.asentmax = {"positions": "nape", "scaling": "none", "alpha": 1}
    model = AutoModelForCausalLM.from_pretrained(softmax_checkpoint, config=config)
    assert model.model.layers[1].self_attn.asentmax_settings.num_alibi_heads == 2


def test_the_start_from_a_softmax_checkpoint_in_bfloat16(softmax_checkpoint: Path):
    model = AutoModelForCausalLM.from_pretrained(
        softmax_checkpoint, attn_implementation="asentmax", dtype=torch.bfloat16, device_map="cpu"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(model)).all()


def test_softmax_models_stay_untouched(family: str, tmp_path: Path):
    """Outputs, hooks, parameters and config.json are the same before and after building an ASEntmax model."""
    model = tiny_model(family)
    implementation = model.config._attn_implementation
    expected, keys = logits(model), list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    other = perturbed_model(family, flags={"positions": "nape"})
    logits(other)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(tiny_model(family)), expected)
    model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "after" / "config.json").read_bytes() == (tmp_path / "before" / "config.json").read_bytes()
    assert not any("asentmax" in file.name for file in (tmp_path / "after").iterdir())
    assert "asentmax" not in (tmp_path / "after" / "config.json").read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert torch.equal(logits(reloaded), expected)
    for softmax in (model, reloaded):
        assert softmax.config._attn_implementation == implementation
        assert list(softmax.state_dict()) == keys
        for module in softmax.modules():
            assert not module._forward_pre_hooks and not module._forward_hooks
            assert not hasattr(module, "asentmax_settings")


def test_one_config_object_for_both():
    """transformers writes attn_implementation into the config that it receives; no model may change another."""
    config = tiny_config("llama")
    softmax = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    expected_softmax = logits(softmax)
    ours = AutoModelForCausalLM.from_config(config, attn_implementation="asentmax").eval()
    perturb_scalings(ours)
    expected_ours = logits(ours)
    assert torch.equal(logits(softmax), expected_softmax)
    later = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    logits(later)
    assert torch.equal(logits(ours), expected_ours)
    assert ours.config._attn_implementation == "asentmax" and later.config._attn_implementation == "eager"


def test_one_config_object_with_two_presets():
    config = tiny_config("llama")
    first = AutoModelForCausalLM.from_config(config, attn_implementation="ssmax").eval()
    expected = logits(first)
    AutoModelForCausalLM.from_config(config, attn_implementation="entmax")
    assert torch.equal(logits(first), expected)
    assert first.config._attn_implementation == "ssmax"


def test_a_config_changed_under_a_built_model_is_an_error():
    """An implementation that is set directly is on the shared object; changing it raises an error."""
    config = LlamaConfig(**tiny_config("llama").to_dict())
    config._attn_implementation = "asentmax"
    model = LlamaForCausalLM(config)
    AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with pytest.raises(RuntimeError, match=r"changed to attn_implementation='sdpa' after it was built"):
        logits(model)
