"""Saving and reloading: every variant, family, class and format."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_asentmax import ASEntmaxConfig
from hf_asentmax.scaling import LengthScaling

from checkpoints import IDS, VARIANTS, assert_same_parameters, config_file, logits
from tiny_models import PRESETS, perturb_scalings, perturbed_model, tiny_config, tiny_model


@pytest.mark.parametrize("variant", VARIANTS)
def test_reload_restores_every_variant(variant: str, tmp_path: Path):
    """The checkpoint alone restores bit-equal parameters and outputs."""
    model = perturbed_model("llama", *VARIANTS[variant])
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_parameters(reloaded, model)
    assert torch.equal(logits(reloaded), logits(model))
    assert reloaded.config._attn_implementation in PRESETS


def test_reload_restores_every_family(family: str, tmp_path: Path):
    model = perturbed_model(family, flags={"positions": "nape"})
    model.save_pretrained(tmp_path)
    reloaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_parameters(reloaded, model)
    assert torch.equal(logits(reloaded), logits(model))
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_flags_are_in_the_config_file(variant: str, tmp_path: Path):
    name, flags = VARIANTS[variant]
    perturbed_model("llama", name, flags).save_pretrained(tmp_path)
    entries = config_file(tmp_path)
    assert entries["asentmax"] == ASEntmaxConfig.from_preset(name, flags).to_dict()
    assert entries["model_type"] == "llama"
    assert "hf_asentmax" in entries["attn_implementation"]
    assert entries["auto_map"]["AutoConfig"].startswith("configuration_hf_asentmax.")


def test_only_safetensors_are_written(checkpoint: tuple[Path, PreTrainedModel]):
    path, model = checkpoint
    assert {file.name for file in path.iterdir()} == {
        "config.json",
        "configuration_hf_asentmax.py",
        "generation_config.json",
        "model.safetensors",
    }
    saved = load_file(path / "model.safetensors")
    names = [name for name, _ in model.named_parameters() if "length_scaling" in name]
    assert len(names) == 8
    assert all(torch.equal(saved[name], model.get_parameter(name)) for name in names)


@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, LlamaForCausalLM]
)
def test_every_class_restores_the_attention(auto_class: Any, checkpoint: tuple[Path, PreTrainedModel]):
    path, model = checkpoint
    reloaded = auto_class.from_pretrained(path)
    assert reloaded.config._attn_implementation == "asentmax"
    base = reloaded if auto_class is AutoModel else reloaded.model
    assert_same_parameters(base, model.model)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_a_classifier_saves_and_reloads(tmp_path: Path):
    model = perturbed_model(flags={"positions": "nape"}, model_class=AutoModelForSequenceClassification)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_parameters(reloaded, model)
    assert torch.equal(logits(reloaded), logits(model))


def test_saving_again_after_reload_writes_the_same(checkpoint: tuple[Path, PreTrainedModel], tmp_path: Path):
    path, model = checkpoint
    for generation in range(2):
        reloaded = AutoModelForCausalLM.from_pretrained(path)
        next_path = tmp_path / f"again{generation}"
        reloaded.save_pretrained(next_path)
        assert config_file(next_path) == config_file(path)
        path = next_path
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(model))


def test_reload_from_a_config_that_was_read_first(checkpoint: tuple[Path, PreTrainedModel]):
    path, model = checkpoint
    config = AutoConfig.from_pretrained(path)
    before = config.to_dict()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path, config=config)), logits(model))
    assert config.to_dict() == before
    for fresh in (AutoModelForCausalLM.from_config(config), LlamaForCausalLM(LlamaConfig.from_pretrained(path))):
        assert fresh.config._attn_implementation == "asentmax"
        assert fresh.model.layers[0].self_attn.length_scaling.num_heads == 2


@pytest.mark.parametrize("as_dict", [False, True])
def test_saving_a_config_alone(as_dict: bool, tmp_path: Path):
    flags = ASEntmaxConfig(positions="nape")
    config = tiny_config("llama")
    config.asentmax = flags.to_dict() if as_dict else flags
    config.save_pretrained(tmp_path)
    assert config_file(tmp_path)["asentmax"] == flags.to_dict()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert model.config._attn_implementation == "asentmax"
    assert model.model.layers[0].self_attn.asentmax_settings.flags == flags


def test_sharded(checkpoint: tuple[Path, PreTrainedModel], tmp_path: Path):
    _, model = checkpoint
    path = tmp_path / "sharded"
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1 and not list(path.glob("*.bin"))
    reloaded = AutoModelForCausalLM.from_pretrained(path)
    assert_same_parameters(reloaded, model)
    assert torch.equal(logits(reloaded), logits(model))


def test_bfloat16(tmp_path: Path):
    model = perturbed_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.bfloat16}
    assert_same_parameters(reloaded, model)
    assert torch.equal(logits(reloaded), logits(model))
    in_float32 = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(in_float32.get_parameter("model.layers.0.self_attn.length_scaling.beta_weight").bfloat16(),
                       model.get_parameter("model.layers.0.self_attn.length_scaling.beta_weight"))  # fmt: skip


@pytest.mark.parametrize("kwargs", [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}])
def test_loading_through_the_meta_device(kwargs: dict[str, Any], checkpoint: tuple[Path, PreTrainedModel]):
    path, model = checkpoint
    reloaded = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    assert {parameter.device.type for parameter in reloaded.parameters()} == {"cpu"}
    assert torch.equal(logits(reloaded), logits(model))


def test_offloading_layers(checkpoint: tuple[Path, PreTrainedModel], tmp_path: Path):
    """accelerate loads the parameters of a layer from the disk for its forward, including those of the scalings."""
    path, model = checkpoint
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    reloaded = AutoModelForCausalLM.from_pretrained(path, device_map=places, offload_folder=tmp_path / "offload")
    assert reloaded.model.layers[1].self_attn.length_scaling.beta_weight.device.type == "meta"
    assert torch.equal(logits(reloaded), logits(model))


def test_building_on_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation="asentmax")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    model.apply(lambda module: module.reset_parameters() if isinstance(module, LengthScaling) else None)
    assert model.model.layers[0].self_attn.length_scaling.beta_weight.abs().sum() == 0


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_deepcopy_and_pickle(clone: Callable[[Any], Any], tmp_path: Path):
    model = perturbed_model(flags={"positions": "nape"})
    other = clone(model)
    assert torch.equal(logits(other), logits(model))
    perturb_scalings(other, seed=2)
    assert not torch.equal(logits(other), logits(model)), "the copy still uses the original's parameters"
    other.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(other))


def test_state_dict_moves_between_models():
    model, other = perturbed_model(), tiny_model("llama", "asentmax", seed=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_push_to_hub_uploads_all_files(checkpoint: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch):
    """huggingface_hub's API is replaced; all code above it is real."""
    from huggingface_hub import HfApi, RepoUrl

    _, model = checkpoint
    uploaded: dict[str, bytes] = {}

    def create_commit(self: Any, repo_id: str, operations: Any, **kwargs: Any) -> str:
        for operation in operations:
            with operation.as_file() as file:
                uploaded[operation.path_in_repo] = file.read()
        return "done"

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **kwargs: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    model.push_to_hub("someone/tiny")
    assert {"config.json", "configuration_hf_asentmax.py", "model.safetensors"} <= uploaded.keys()
    assert json.loads(uploaded["config.json"])["asentmax"]["positions"] == "nape"
    uploaded.clear()
    model.config.push_to_hub("someone/tiny")
    assert {"config.json", "configuration_hf_asentmax.py"} <= uploaded.keys()


def test_a_checkpoint_from_the_hub_is_saved_with_its_own_module(tmp_path: Path):
    """Some versions prefix the auto_map entry with the repository; a saved checkpoint must not refer to it."""
    model = perturbed_model()
    model.config.auto_map = {"AutoConfig": "someone/tiny--configuration_hf_asentmax.ASEntmaxAutoConfig"}
    model.save_pretrained(tmp_path)
    assert config_file(tmp_path)["auto_map"] == {"AutoConfig": "configuration_hf_asentmax.ASEntmaxAutoConfig"}
    assert (tmp_path / "configuration_hf_asentmax.py").exists()


def test_a_custom_models_own_entry_stays(tmp_path: Path):
    model = perturbed_model()
    model.config.auto_map = {"AutoConfig": "configuration_custom.CustomConfig", "AutoModel": "custom.Model"}
    model.save_pretrained(tmp_path)
    assert config_file(tmp_path)["auto_map"] == model.config.auto_map


def test_a_checkpoint_turned_back_into_softmax_is_a_plain_one(checkpoint: tuple[Path, PreTrainedModel], tmp_path: Path):
    config = AutoConfig.from_pretrained(checkpoint[0])
    del config.asentmax
    softmax = AutoModelForCausalLM.from_pretrained(checkpoint[0], config=config, attn_implementation="sdpa")
    softmax.save_pretrained(tmp_path / "softmax")
    assert not {"asentmax", "auto_map", "attn_implementation"} & config_file(tmp_path / "softmax").keys()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "softmax", trust_remote_code=True)
    assert reloaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits(reloaded), logits(softmax))


@pytest.mark.parametrize(
    ("preset", "flags"), [("ssmax", {"alpha": 1.25}), ("entmax", {"scaling": "learned"}), ("asentmax", {"alpha": 1.0})]
)
def test_a_preset_with_other_flags_comes_back_under_its_name(preset: str, flags: dict[str, Any], tmp_path: Path):
    model = tiny_model("llama", preset, flags)
    model.save_pretrained(tmp_path)
    for name in ({}, {"attn_implementation": preset}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **name)
        assert loaded.config._attn_implementation == preset
    with pytest.raises(ValueError, match="contradicts"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="topk_softmax")
