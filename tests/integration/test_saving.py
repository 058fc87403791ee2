"""Saving, loading and everything that may go wrong with a checkpoint, as a user of transformers meets it."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_asentmax
from hf_asentmax import ASEntmaxConfig
from hf_asentmax.scaling import LengthScaling

from tiny_models import PRESETS, VOCABULARY, perturb_scalings, random_ids, tiny_config, tiny_model

IDS = random_ids(2, 9)
REPOSITORY = str(Path(hf_asentmax.__file__).parents[1])
# each preset, and flags that differ from every preset
VARIANTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    **{name: (name, None) for name in PRESETS},
    "nape": ("asentmax", {"positions": "nape", "alibi_heads": 1, "alibi_slopes": "geometric", "alpha": 1.25}),
    "learned": ("entmax", {"scaling": "learned", "positions": "alibi", "delta": 0.5}),
    "topk of 3": ("topk_softmax", {"top_k": 3, "positions": "nope"}),
}


def build(family: str = "llama", name: str = "asentmax", flags: Any = None, **kwargs: Any) -> PreTrainedModel:
    model = tiny_model(family, name, flags, **kwargs)
    perturb_scalings(model)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def assert_same_parameters(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    actual_parameters, expected_parameters = dict(actual.named_parameters()), dict(expected.named_parameters())
    assert actual_parameters.keys() == expected_parameters.keys()
    for name, parameter in expected_parameters.items():
        assert torch.equal(actual_parameters[name], parameter), name


def config_file(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def edit_config_file(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    entries = config_file(path)
    edit(entries)
    (path / "config.json").write_text(json.dumps(entries))


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A saved ASEntmax Llama with NAPE, and the model that was saved."""
    model = build(flags={"positions": "nape"})
    model.save_pretrained(tmp_path)
    return tmp_path, model


# --- save and reload


@pytest.mark.parametrize("variant", VARIANTS)
def test_reload_restores_every_variant(variant: str, tmp_path: Path):
    """Bit-equal parameters and outputs, from the checkpoint alone."""
    model = build("llama", *VARIANTS[variant])
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_parameters(reloaded, model)
    assert torch.equal(logits(reloaded), logits(model))
    assert reloaded.config._attn_implementation in PRESETS


def test_reload_restores_every_family(family: str, tmp_path: Path):
    model = build(family, flags={"positions": "nape"})
    model.save_pretrained(tmp_path)
    reloaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_parameters(reloaded, model)
    assert torch.equal(logits(reloaded), logits(model))
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_flags_are_in_the_config_file(variant: str, tmp_path: Path):
    name, flags = VARIANTS[variant]
    build("llama", name, flags).save_pretrained(tmp_path)
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
    model = build(flags={"positions": "nape"}, model_class=AutoModelForSequenceClassification)
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
    model = build(dtype=torch.bfloat16)
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
    """accelerate brings the parameters of one layer from the disk for its forward, those of the scalings too."""
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
    model = build(flags={"positions": "nape"})
    other = clone(model)
    assert torch.equal(logits(other), logits(model))
    perturb_scalings(other, seed=2)
    assert not torch.equal(logits(other), logits(model)), "the copy still uses the original's parameters"
    other.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(other))


def test_state_dict_moves_between_models():
    model, other = build(), tiny_model("llama", "asentmax", seed=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_push_to_hub_uploads_all_files(checkpoint: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch):
    """The network replaced at huggingface_hub's API; everything above it is the real path."""
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
    """Some versions prefix the entry of a downloaded checkpoint with its repository; ours must not point there."""
    model = build()
    model.config.auto_map = {"AutoConfig": "someone/tiny--configuration_hf_asentmax.ASEntmaxAutoConfig"}
    model.save_pretrained(tmp_path)
    assert config_file(tmp_path)["auto_map"] == {"AutoConfig": "configuration_hf_asentmax.ASEntmaxAutoConfig"}
    assert (tmp_path / "configuration_hf_asentmax.py").exists()


def test_a_custom_models_own_entry_stays(tmp_path: Path):
    model = build()
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


# --- a softmax checkpoint as the start


@pytest.fixture
def softmax_checkpoint(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "softmax")
    return tmp_path / "softmax"


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
    # newly initialised by the plugin's own rule, not by the library's normal(0, 0.02) nor left as memory was
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


# --- softmax models in the same process


def test_softmax_models_stay_untouched(family: str, tmp_path: Path):
    """Before and after an ASEntmax model of the same class: outputs, hooks, parameters, config.json."""
    model = tiny_model(family)
    implementation = model.config._attn_implementation
    expected, keys = logits(model), list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    other = build(family, flags={"positions": "nape"})
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
    """transformers writes attn_implementation into the config it is given; neither model may turn into the other."""
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
    """Set directly, the choice does live on the shared object: better an error than a silent softmax."""
    config = LlamaConfig(**tiny_config("llama").to_dict())
    config._attn_implementation = "asentmax"
    model = LlamaForCausalLM(config)
    AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with pytest.raises(RuntimeError, match=r"changed to attn_implementation='sdpa' after it was built"):
        logits(model)


# --- contradictions and refusals


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
    model = build("llama", name, flags)
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
    """From 2 scaled heads to 3: transformers names the parameters whose shapes differ."""
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
    model_class._from_config(copy.deepcopy(config))  # and is as it was


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
    with pytest.raises(ValueError, match=r"can't be switched from 'asentmax' to .*from_pretrained"):
        model.set_attn_implementation(requested)
    assert torch.equal(logits(model), expected)
    model.set_attn_implementation("asentmax")
    assert torch.equal(logits(model), expected)


def test_switching_a_softmax_model_to_ours_is_refused_and_to_others_is_not():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"can't be switched from 'sdpa' to 'asentmax'"):
        model.set_attn_implementation("asentmax")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


# --- composite models


_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
BY_PART = {"text_config": "asentmax", "vision_config": "sdpa"}
IMAGE_IDS = torch.tensor([[5, 60, 60, 60, 60, 7, 8, 9]])


def composite_config(kind: str, flags: dict[str, Any] | None = None) -> Any:
    if kind == "llava":
        config: Any = LlavaConfig(
            text_config=tiny_config("llama"),
            vision_config=CLIPVisionConfig(**_VISION),
            image_token_id=60,
            image_seq_length=4,
        )
    else:
        config = Gemma3Config(
            text_config=tiny_config("gemma3_text"),
            vision_config={**_VISION, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            image_token_index=60,
            boi_token_index=61,
            eoi_token_index=62,
        )
    if flags is not None:
        config.text_config.asentmax = flags
    return config


COMPOSITES = {"gemma3": Gemma3ForConditionalGeneration, "llava": LlavaForConditionalGeneration}


def image_logits(model: PreTrainedModel) -> torch.Tensor:
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    extra = {"token_type_ids": (IMAGE_IDS == 60).long()} if isinstance(model, Gemma3ForConditionalGeneration) else {}
    with torch.no_grad():
        return model(input_ids=IMAGE_IDS, pixel_values=pixels, **extra).logits


@pytest.mark.parametrize("kind", COMPOSITES)
def test_composite_model_saves_and_reloads(kind: str, tmp_path: Path):
    config = composite_config(kind, {"positions": "nape"})
    model = COMPOSITES[kind]._from_config(config, attn_implementation=BY_PART).eval()
    perturb_scalings(model)
    names = [name for name, _ in model.named_parameters() if "length_scaling" in name]
    assert len(names) == 8 and all("language_model" in name for name in names)
    model.save_pretrained(tmp_path)
    entries = config_file(tmp_path)
    assert entries["text_config"]["asentmax"]["positions"] == "nape"
    assert "asentmax" not in entries and "asentmax" not in entries["vision_config"]
    for model_class in (COMPOSITES[kind], AutoModelForImageTextToText):
        reloaded = model_class.from_pretrained(tmp_path)
        assert_same_parameters(reloaded, model)
        assert torch.equal(image_logits(reloaded), image_logits(model))
        assert reloaded.config.vision_config._attn_implementation == "sdpa"
    assert model.generate(input_ids=IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 11)


@pytest.mark.parametrize("kind", COMPOSITES)
def test_composite_baseline_equals_its_own_sdpa(kind: str):
    """Images that see both ways inside the text (Gemma 3) included."""
    expected = COMPOSITES[kind]._from_config(composite_config(kind)).eval()
    flags = {"alpha": 1.0, "scaling": "none"}
    model = COMPOSITES[kind]._from_config(composite_config(kind, flags), attn_implementation=BY_PART).eval()
    model.load_state_dict(expected.state_dict())
    torch.testing.assert_close(image_logits(model), image_logits(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", COMPOSITES)
def test_composite_model_refuses_a_plain_name_with_a_hint(kind: str):
    with pytest.raises(NotImplementedError, match=r"'text_config': 'asentmax', 'vision_config': 'sdpa'"):
        COMPOSITES[kind]._from_config(composite_config(kind), attn_implementation="asentmax")


@pytest.mark.parametrize("kind", COMPOSITES)
def test_flags_on_the_top_of_a_composite_config_are_not_lost(kind: str):
    config = composite_config(kind)
    config.asentmax = {"positions": "nape"}
    with pytest.raises(ValueError, match=r"set it on that part, e\.g\. config\.text_config\.asentmax"):
        COMPOSITES[kind]._from_config(config, attn_implementation=BY_PART)
    with pytest.raises(NotImplementedError, match=r"flags in config\.text_config\.asentmax"):
        COMPOSITES[kind]._from_config(config)


# --- other processes: transformers without the plugin


def run_python(script: str, *arguments: Path, home: Path, importable: bool) -> dict[str, Any]:
    """Run a script that ends by printing one JSON line, in a process that has not imported the plugin."""
    hide = """
    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hf_asentmax":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Hide())
    """
    preamble = f"""
    import json, sys
    import torch
    torch.set_num_threads(1)
    {"" if importable else hide}
    def attempt(function):
        try:
            return function()
        except Exception as error:
            return f"{{type(error).__name__}}: {{error}}"
    """
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", ".", REPOSITORY)]
    if importable:
        paths.append(REPOSITORY)
    settings = {"PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(preamble) + textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
        cwd=home,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.strip().splitlines()[-1])


def save_tokenizer(path: Path) -> None:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(path)


STOCK = """
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3ForConditionalGeneration, LlamaForCausalLM,
    pipeline,
)
path, entmax_path, composite_path = sys.argv[1:4]
ids = torch.arange(3, 12)[None]
result = {}
for key, model_class, where in (
    ("auto", AutoModelForCausalLM, path),
    ("auto base", AutoModel, path),
    ("direct", LlamaForCausalLM, path),
    ("entmax", AutoModelForCausalLM, entmax_path),
    ("composite auto", AutoModelForImageTextToText, composite_path),
    ("composite direct", Gemma3ForConditionalGeneration, composite_path),
):
    result[key] = attempt(lambda: model_class.from_pretrained(where).config._attn_implementation)
result["sdpa"] = attempt(lambda: AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa") and "loaded")
result["imported before"] = "hf_asentmax" in sys.modules
def logits():
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    return model(ids).logits.flatten().tolist()
result["trusted"] = attempt(logits)
def pipe():
    generator = pipeline("text-generation", path, trust_remote_code=True)
    return generator("w5 w6 w7", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
result["pipeline"] = attempt(pipe)
result["composite trusted"] = attempt(
    lambda: AutoModelForImageTextToText.from_pretrained(
        composite_path, trust_remote_code=True
    ).config.text_config._attn_implementation
)
print(json.dumps(result))
"""
WITHOUT_PACKAGE = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
path = sys.argv[1]
result = {
    "plain": attempt(lambda: AutoModelForCausalLM.from_pretrained(path)),
    "trusted": attempt(lambda: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)),
    "config": attempt(lambda: AutoConfig.from_pretrained(path, trust_remote_code=True)),
    "direct": attempt(lambda: LlamaForCausalLM.from_pretrained(path, trust_remote_code=True)),
}
print(json.dumps(result, default=str))
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], PreTrainedModel]:
    """What transformers without the plugin (but with the package installed) makes of our checkpoints."""
    home = tmp_path_factory.mktemp("stock")
    model = build(flags={"positions": "nape"})
    model.save_pretrained(home / "asentmax")
    save_tokenizer(home / "asentmax")
    build(name="entmax").save_pretrained(home / "entmax")
    composite = Gemma3ForConditionalGeneration._from_config(composite_config("gemma3"), attn_implementation=BY_PART)
    composite.save_pretrained(home / "composite")
    paths = (home / "asentmax", home / "entmax", home / "composite")
    return run_python(STOCK, *paths, home=home, importable=True), model


@pytest.mark.parametrize("key", ["auto", "auto base", "direct", "entmax", "composite auto", "composite direct"])
def test_transformers_without_the_plugin_refuses(key: str, stock: tuple[dict[str, Any], PreTrainedModel]):
    result, _ = stock
    assert result["imported before"] is False
    assert result[key].startswith("ValueError") and "pip install hf_asentmax" in result[key]
    assert "trust_remote_code=True" in result[key]


@pytest.mark.xfail(reason="an explicit attn_implementation replaces the entry of config.json", strict=True)
def test_transformers_without_the_plugin_refuses_an_explicit_sdpa(stock: tuple[dict[str, Any], PreTrainedModel]):
    assert "hf_asentmax" in stock[0]["sdpa"]


def test_trust_remote_code_loads_the_same_model(stock: tuple[dict[str, Any], PreTrainedModel]):
    result, model = stock
    with torch.no_grad():
        expected = model(torch.arange(3, 12)[None]).logits.flatten()
    assert isinstance(result["trusted"], list), result["trusted"]
    torch.testing.assert_close(torch.tensor(result["trusted"]), expected, rtol=1e-5, atol=1e-6)
    assert result["composite trusted"] == "asentmax"


def test_pipeline_with_trust_remote_code(stock: tuple[dict[str, Any], PreTrainedModel]):
    result, model = stock
    prompt = torch.tensor([[5, 6, 7]])
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    names = {0: "<pad>", 1: "<s>", 2: "</s>"}
    expected = " ".join(f"w{i}" for i in generated[0, 3:].tolist() if i not in names)
    assert result["pipeline"].split() == expected.split()


def test_without_the_package_the_import_error_names_it(checkpoint: tuple[Path, PreTrainedModel], tmp_path: Path):
    result = run_python(WITHOUT_PACKAGE, checkpoint[0], home=tmp_path, importable=False)
    for key in ("trusted", "config"):
        assert result[key].startswith("ImportError") and "hf_asentmax" in result[key], result[key]
        assert "pip install hf_asentmax" in result[key]
    for key in ("plain", "direct"):
        assert result[key].startswith("ValueError") and "pip install hf_asentmax" in result[key], result[key]


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
