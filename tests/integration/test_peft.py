"""LoRA adapters by PEFT on models with the attention: training, merging, saving and reloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_asentmax import parameter_groups

from tiny_models import perturbed_model, tiny_model
from training_runs import IDS, NAPE, loss_of, make_trainer


def lora(**overrides: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **overrides})


def train_adapter(model: Any, steps: int = 3) -> None:
    """A few steps on all parameters that require gradients."""
    optimizer = torch.optim.AdamW(parameter_groups(model.train()), lr=1e-2)
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    perturbed_model(flags=NAPE).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("modules_to_save", [None, ["length_scaling"]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_only_its_adapter_and_reloads(
    modules_to_save: list[str] | None, checkpointing: bool, base: Path, tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapted = get_peft_model(model, lora(modules_to_save=modules_to_save, task_type="CAUSAL_LM"))
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    in_scalings = {name for name in trainable if ".length_scaling." in name}
    assert all("lora_" in name for name in trainable - in_scalings)
    assert len(in_scalings) == (8 if modules_to_save else 0)
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": True})
        adapted.enable_input_require_grads()
    start = {name: parameter.clone() for name, parameter in adapted.named_parameters() if name in trainable}
    train_adapter(adapted)
    for name, parameter in adapted.named_parameters():
        if name in trainable:
            assert not torch.equal(parameter, start[name]), f"{name} did not train"
        else:
            original = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
            assert torch.equal(parameter, before[original]), f"{name} was trained"
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        assert not torch.equal(expected, AutoModelForCausalLM.from_pretrained(base)(IDS).logits)
        onto = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
        torch.testing.assert_close(onto(input_ids=IDS).logits, expected, rtol=0, atol=0)
        alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(alone(input_ids=IDS).logits, expected, rtol=0, atol=0)
        if modules_to_save and Version(transformers.__version__) < Version("5.23"):
            return  # transformers 5.17 loses modules_to_save of any model here
        through_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(through_transformers(input_ids=IDS).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("modules_to_save", [None, ["length_scaling"]])
def test_a_merged_adapter_saves_as_a_plain_checkpoint(modules_to_save: list[str] | None, base: Path, tmp_path: Path):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(modules_to_save=modules_to_save))
    train_adapter(adapted)
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        merged = adapted.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert reloaded.state_dict().keys() == AutoModelForCausalLM.from_pretrained(base).state_dict().keys()
        torch.testing.assert_close(reloaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_lora_on_all_linear_layers_leaves_the_scalings_alone(base: Path):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(target_modules="all-linear"))
    assert not any("length_scaling" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert torch.isfinite(adapted(input_ids=IDS).logits).all()


def test_lora_on_a_softmax_checkpoint_with_the_scalings_trained(tmp_path: Path):
    """The usual conversion: the softmax model is frozen; an adapter and the new parameters are trained."""
    tiny_model("llama").save_pretrained(tmp_path / "softmax")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "softmax", attn_implementation="asentmax")
    adapted = get_peft_model(model, lora(modules_to_save=["length_scaling"]))
    train_adapter(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "softmax", attn_implementation="asentmax")
    onto = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(onto(input_ids=IDS).logits, adapted(input_ids=IDS).logits, rtol=0, atol=0)


def test_trainer_with_a_lora_adapter(base: Path, tmp_path: Path):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), lora(modules_to_save=["length_scaling"], task_type="CAUSAL_LM")
    )
    trainer, losses = make_trainer(adapted, tmp_path, gradient_checkpointing=True, max_steps=8)
    trainer.train()
    assert losses[8] < losses[1]
    decayed = set(trainer.get_decay_parameter_names(adapted))
    assert not any("length_scaling" in name for name in decayed)
    trainer.save_model(str(tmp_path / "adapter"))
    onto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(onto(input_ids=IDS).logits, adapted.eval()(input_ids=IDS).logits, rtol=0, atol=0)
