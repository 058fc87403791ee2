"""Every family: the softmax settings equal the model's own attention, and no preset does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import hf_asentmax
from hf_asentmax.integration.families import NoPositionEmbedding
from hf_asentmax.integration.install import installed_attentions

from tiny_models import FAMILIES, PRESETS, perturb_scalings, random_ids, tiny_config, tiny_model

IDS = random_ids(2, 20)
LEFT_PADDED = torch.ones_like(IDS)
LEFT_PADDED[0, :6] = 0

# Families that the package does not name: the general rule covers them.
UNNAMED = (
    "apertus",
    "arcee",
    "cohere",
    "exaone4",
    "glm",
    "granite",
    "llama4_text",
    "mixtral",
    "nemotron",
    "olmo3",
    "phi",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)


def pair(family: str, flags: Any, implementation: str = "asentmax") -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model with its own softmax, and with the plugin's attention, with equal weights."""
    own = tiny_model(family, "eager" if family == "gemma2" else "sdpa")  # sdpa has no soft cap
    ours = tiny_model(family, implementation, flags)
    report = ours.load_state_dict(own.state_dict(), strict=False)
    assert all("length_scaling" in key for key in report.missing_keys)
    return own, ours


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor = IDS, **kwargs: Any) -> torch.Tensor:
    return model(ids, use_cache=False, **kwargs).logits


def test_alpha_one_without_scaling_is_the_models_own_softmax(family: str) -> None:
    own, ours = pair(family, {"alpha": 1, "scaling": "none"})
    assert torch.allclose(logits(ours), logits(own), atol=2e-6)
    shown = LEFT_PADDED.bool()
    padded = logits(ours, attention_mask=LEFT_PADDED)[shown], logits(own, attention_mask=LEFT_PADDED)[shown]
    assert torch.allclose(*padded, atol=2e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_is_the_models_own_softmax(family: str, preset: str) -> None:
    flags = {"top_k": 2} if preset == "topk_softmax" else None
    own, ours = pair(family, flags, preset)
    with torch.no_grad():  # larger scores, so that every preset has an effect
        for model in (own, ours):
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 and "length_scaling" not in name:
                    parameter.mul_(4)
    assert not torch.allclose(logits(ours), logits(own), atol=1e-4)


@pytest.mark.parametrize("model_type", UNNAMED)
def test_families_covered_by_the_general_rule(model_type: str) -> None:
    def build(implementation: str, flags: Any = None) -> PreTrainedModel:
        config = AutoConfig.for_model(
            model_type,
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        if flags is not None:
            config.asentmax = flags
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()

    own, ours = build("sdpa"), build("asentmax", {"alpha": 1, "scaling": "none"})
    ours.load_state_dict(own.state_dict())
    assert torch.allclose(logits(ours), logits(own), atol=2e-6)
    nape = build("asentmax", {"positions": "nape"})
    nape.load_state_dict(own.state_dict(), strict=False)
    perturb_scalings(nape)
    alone = logits(nape, IDS[:1, 6:])
    padded = logits(nape, attention_mask=LEFT_PADDED)[:1, 6:]
    assert torch.allclose(padded, alone, atol=2e-6)


@pytest.mark.parametrize("positions", ["nope", "alibi", "nape"])
def test_positions_switch_the_models_own_off(family: str, positions: str) -> None:
    """Without its own positions, a model depends on order only through ALiBi and the masks."""
    model = tiny_model(family, "asentmax", {"positions": positions, "alpha": 1, "scaling": "none"})
    shifted = torch.arange(20)[None] + 7  # rotary and learned positions would change; ALiBi does not use position_ids
    stretched = torch.arange(20)[None] * 3
    plain = logits(model)
    assert torch.allclose(logits(model, position_ids=shifted), plain, atol=1e-6)
    # With a mask transformers does not treat these positions as packed sequences.
    mask = torch.ones_like(IDS)
    assert torch.allclose(logits(model, position_ids=stretched, attention_mask=mask), plain, atol=1e-6)
    own = tiny_model(family, "asentmax", {"positions": "model", "alpha": 1, "scaling": "none"})
    differs = logits(own, position_ids=stretched, attention_mask=mask) - logits(own)
    assert differs.abs().max() > 1e-5


def test_nope_is_blind_to_the_order_of_what_it_sees(family: str) -> None:
    model = tiny_model(family, "asentmax", {"positions": "nope"}, num_hidden_layers=1, **_full_attention(family))
    perturb_scalings(model)
    swapped = IDS.clone()
    swapped[:, [17, 18]] = IDS[:, [18, 17]]
    assert torch.allclose(logits(model)[:, -1], logits(model, swapped)[:, -1], atol=1e-6)
    nape = tiny_model(family, "asentmax", {"positions": "nape"}, num_hidden_layers=1, **_full_attention(family))
    assert (logits(nape)[:, -1] - logits(nape, swapped)[:, -1]).abs().max() > 1e-5
    far = IDS.clone()
    far[:, [3, 8]] = IDS[:, [8, 3]]
    assert torch.allclose(logits(nape)[:, -1], logits(nape, far)[:, -1], atol=1e-6), "ALiBi's window under entmax"


def _full_attention(family: str) -> dict[str, Any]:
    if family.startswith("gemma"):
        return {"layer_types": ["full_attention"]}
    return {"sliding_window": None} if family in ("mistral", "phi3") else {}


def test_gpt2_without_learned_positions_has_no_limit_of_length(transformers_log: list[str], tmp_path: Any) -> None:
    model = tiny_model("gpt2", "asentmax", {"positions": "nape"}, n_positions=16)
    assert isinstance(model.transformer.wpe, NoPositionEmbedding)
    assert logits(model, random_ids(1, 40)).shape == (1, 40, 64)
    tiny_model("gpt2", "sdpa", n_positions=16).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.asentmax = {"positions": "nape"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, attn_implementation="asentmax")
    assert logits(loaded, random_ids(1, 40)).isfinite().all()


@pytest.mark.parametrize(("family", "reaches"), [("mistral", 6), ("gemma2", 6), ("gemma3_text", 6), ("phi3", 6)])
def test_sliding_windows_are_honoured(family: str, reaches: int) -> None:
    settings: dict[str, Any] = {"num_hidden_layers": 1, "sliding_window": reaches}
    if family.startswith("gemma"):
        settings["layer_types"] = ["sliding_attention"]
    model = tiny_model(family, "asentmax", {"positions": "nope", "scaling": "none", "alpha": 1.25}, **settings)
    changed = IDS.clone()
    changed[:, -1 - reaches] = 5 + (IDS[:, -1 - reaches] == 5).long()
    assert torch.equal(logits(model)[:, -1], logits(model, changed)[:, -1]), "a key outside of the window was seen"
    changed[:, -reaches] = 5 + (IDS[:, -reaches] == 5).long()
    assert not torch.allclose(logits(model)[:, -1], logits(model, changed)[:, -1], atol=1e-7)


def test_the_soft_cap_is_honoured() -> None:
    flags = {"scaling": "none"}
    capped = tiny_model("gemma2", "asentmax", flags, attn_logit_softcapping=0.01)
    free = tiny_model("gemma2", "asentmax", flags, attn_logit_softcapping=None)
    free.load_state_dict(capped.state_dict())
    assert (logits(capped) - logits(free)).abs().max() > 1e-4


def test_scaling_reaches_only_the_heads_without_alibi() -> None:
    model = tiny_model("llama", "asentmax", {"positions": "nape", "alibi_heads": 3})
    for _, attention in installed_attentions(model):
        assert attention.length_scaling.beta_weight.shape == (1, 32)
    everywhere = tiny_model("llama", "asentmax", {"positions": "alibi"})
    assert next(installed_attentions(everywhere))[1].length_scaling.beta_weight.shape == (4, 32)


def test_all_heads_with_alibi_leave_nothing_to_scale() -> None:
    model = tiny_model("llama", "asentmax", {"positions": "nape", "alibi_heads": 4})
    assert not any("length_scaling" in name for name, _ in model.named_parameters())
    assert logits(model).isfinite().all()


def test_more_alibi_heads_than_heads() -> None:
    with pytest.raises(ValueError, match="alibi_heads must be at most the model's 4 heads, got 5"):
        tiny_model("llama", "asentmax", {"positions": "nape", "alibi_heads": 5})


def test_half_of_an_odd_number_of_heads() -> None:
    with pytest.raises(ValueError, match="set the number with alibi_heads"):
        tiny_model(
            "llama", "asentmax", {"positions": "nape"}, hidden_size=36, num_attention_heads=3, num_key_value_heads=1
        )


def test_softmax_models_stay_untouched() -> None:
    before = tiny_model("llama", "sdpa")
    tiny_model("llama", "asentmax", {"positions": "nape"})
    after = tiny_model("llama", "sdpa")
    assert torch.equal(logits(before), logits(after))
    assert not any(module._forward_pre_hooks for module in after.modules())
    assert next(installed_attentions(after), None) is None


def test_adaptive_temperature_is_for_inference() -> None:
    own, ours = pair("llama", None, "adaptive_temperature")
    assert torch.allclose(logits(ours.train()), logits(own.train()), atol=2e-6)
    assert not torch.allclose(logits(ours.eval()), logits(own.eval()), atol=1e-5)


def test_attention_weights_on_request() -> None:
    model = tiny_model("llama", "asentmax", {"positions": "nape"})
    with torch.no_grad():
        weights = model(IDS, output_attentions=True, use_cache=False).attentions
    assert len(weights) == 2 and weights[0].shape == (2, 4, 20, 20)
    assert torch.allclose(weights[0].sum(-1), torch.ones(2, 4, 20))
    assert (weights[0].tril() == weights[0]).all()


@pytest.mark.parametrize("preset", ["asentmax", "ssmax"])
def test_attention_weights_on_request_of_the_config(preset: str, tmp_path: Any) -> None:
    model = tiny_model("llama", preset)
    model.save_pretrained(tmp_path)
    expected = model(IDS, output_attentions=True, use_cache=False).attentions
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, output_attentions=True)
    assert loaded.config._attn_implementation == preset
    assert all(torch.equal(*pair) for pair in zip(loaded(IDS, use_cache=False).attentions, expected, strict=True))
    assert loaded(IDS, use_cache=False, output_attentions=False).attentions is None
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again(IDS, use_cache=False).attentions is not None
    model.config.output_attentions = True
    assert all(torch.equal(*pair) for pair in zip(model(IDS, use_cache=False).attentions, expected, strict=True))
    with pytest.raises(ValueError, match="output_attentions"):  # other attentions are as before
        tiny_model("llama", "sdpa").config.output_attentions = True
    with pytest.raises(Exception, match="output_attentions"):  # of a class of huggingface_hub
        tiny_config("llama", attn_implementation="sdpa", output_attentions=True)


def test_attention_sinks_are_refused() -> None:
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="asentmax")
    with pytest.raises(NotImplementedError, match="attention sinks"):
        model(IDS)


def test_models_without_the_attention_interface_are_refused() -> None:
    config = AutoConfig.for_model("codegen", vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    with pytest.raises(NotImplementedError, match="no attention that goes through transformers' attention interface"):
        AutoModelForCausalLM.from_config(config, attn_implementation="asentmax")


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("falcon", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}),
        ("gptj", {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}),
        ("gpt_neo", {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}),
    ],
)
def test_families_with_a_table_of_their_own_are_refused(model_type: str, settings: dict[str, Any]) -> None:
    config = AutoConfig.for_model(model_type, vocab_size=64, **settings)
    message = r"chooses its attention from a table of its own, [A-Z_]+ \(entries: eager, .*Use a decoder"
    with pytest.raises(NotImplementedError, match=message):
        AutoModelForCausalLM.from_config(config, attn_implementation="asentmax")
    assert logits(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).isfinite().all()


@pytest.mark.parametrize("positions", ["model", "nape"])
def test_the_scaling_reads_an_input_wider_than_hidden_size(positions: str) -> None:
    """Zamba concatenates the hidden states and the embeddings."""
    config = AutoConfig.for_model(
        "zamba",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        mamba_d_state=4,
        n_mamba_heads=2,
        initializer_range=0.2,
        attention_hidden_size=64,
        attention_head_dim=16,
        pad_token_id=0,
    )
    config.asentmax = {"positions": positions}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="asentmax").eval()
    _, attention = next(installed_attentions(model))
    assert attention.length_scaling.beta_weight.shape[1] == 64
    before = logits(model)
    perturb_scalings(model)
    assert not torch.allclose(logits(model), before, atol=1e-6)


def test_the_scaling_reads_hidden_size_elsewhere(family: str) -> None:
    """Also where the heads together are wider than hidden_size, and the output projection comes first (Phi-3)."""
    wide = {} if family in ("gpt2", "gpt_neox", "phi3", "llama", "olmo2", "qwen2", "mistral") else {"head_dim": 16}
    for _, attention in installed_attentions(tiny_model(family, "asentmax", **wide)):
        assert attention.length_scaling.beta_weight.shape[1] == 32


def test_unknown_positions_are_refused() -> None:
    config = AutoConfig.for_model(
        "biogpt", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    config.asentmax = {"positions": "nope"}
    with pytest.raises(NotImplementedError, match="does not know where BioGptModel"):
        AutoModelForCausalLM.from_config(config, attn_implementation="asentmax")


def test_importing_twice_is_safe() -> None:
    from hf_asentmax.integration import register

    post_init = PreTrainedModel.post_init
    register()
    assert PreTrainedModel.post_init is post_init
    assert hf_asentmax.__version__


def test_the_base_model_alone() -> None:
    model = AutoModel.from_config(tiny_config("llama"), attn_implementation="asentmax")
    assert isinstance(model, nn.Module)
    assert len(list(installed_attentions(model))) == 2
    assert len(FAMILIES) == 10


@torch.no_grad()
def test_rotary_positions_given_by_place_are_switched_off_too() -> None:
    attention = tiny_model("llama", "asentmax", {"positions": "nope"}).model.layers[0].self_attn
    hidden_states, angles = torch.randn(1, 6, 32), torch.randn(1, 6, 8)
    rotation = (angles.cos(), angles.sin())
    none = (torch.ones(1, 6, 8), torch.zeros(1, 6, 8))
    expected = attention(hidden_states, position_embeddings=none)[0]
    assert torch.equal(attention(hidden_states, rotation)[0], expected)
    assert torch.equal(attention(hidden_states=hidden_states, position_embeddings=rotation)[0], expected)
